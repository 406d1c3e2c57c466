"""Every nanosecond of a profiled step is in one part: what the profile makes of events, made up and real."""

from __future__ import annotations

import contextlib
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from launch.run_config import REPO_ROOT, load_run
from model.config import ActivationCheckpointing
from model.gpt import GPT
from model.loop import WARM_UP_STEPS, StepTimer
from model.profile import (
    PARTS,
    PREFIX,
    DeviceEvent,
    HostEvent,
    Report,
    StepProfile,
    Times,
    divide,
    events_of,
    part,
)

MAIN, ENGINE = 1, 2  # threads
STEPS = 2


def host(*rows: tuple[Any, ...]) -> list[HostEvent]:
    """Events of the main thread from (name, start, end) and, if they matter, (sequence, forward_thread, thread)."""
    events = []
    for index, (name, start, end, *rest) in enumerate(rows):
        sequence, forward_thread, thread = (*rest, *(-1, 0, MAIN)[len(rest) :])
        events.append(HostEvent(name, start, end, index + 1, thread, sequence, forward_thread))
    return events


def parts(times: Times) -> dict[str, int]:
    assert sum(times.own.values()) == times.total, "the table sums to the step"
    assert all(time >= 0 for time in times.own.values())
    return {name: time for name, time in times.parts().items() if time}


def test_the_parts_have_the_names_that_the_table_promises() -> None:
    assert PARTS == (
        *("attention", "router", "dispatch", "experts", "mlp", "combine", "all-to-all", "head and loss"),
        *("compiled blocks", "optimizer", "data", "other"),
    )


def test_an_operator_belongs_to_the_innermost_mark_and_counts_without_what_is_inside() -> None:
    events = host(
        ("ProfilerStep#1", 0, 1000),
        ("part: data", 0, 50),  # before the step
        ("part: step", 100, 200),
        ("part: experts", 110, 150),
        ("aten::linear", 115, 145),
        ("aten::mm", 120, 140),
        ("part: router", 125, 130),
        ("part: step", 300, 310),
        ("gloo:all_to_all", 100, 200, -1, 0, ENGINE),  # beside the thread that trains
    )
    times = divide(events, None, compiled=False)
    assert parts(times) == {"experts": 35, "router": 5, "other": 70}
    assert times.total == 110
    assert times.own["experts", "aten::linear"] == 10
    assert times.own["experts", "aten::mm"] == 15


def test_events_that_overlap_count_once_for_the_one_begun_last() -> None:
    """Under a dispatch mode, as in selective activation checkpointing, a mark begins inside one event of the mode."""
    events = host(
        ("part: step", 0, 100),
        ("PythonDispatchMode", 10, 20),
        ("part: router", 15, 50),
        ("aten::sort", 30, 40),
        ("PythonDispatchMode", 45, 55),
        ("aten::mm", 90, 110),
    )
    times = divide(events, None, compiled=False)
    assert parts(times) == {"router": 40, "other": 60}
    assert times.own["other", "PythonDispatchMode"] == 5
    assert times.own["router", "PythonDispatchMode"] == 10
    assert times.own["other", "aten::mm"] == 10


def test_a_node_of_the_backward_pass_belongs_to_the_part_that_made_it() -> None:
    events = host(
        ("part: step", 0, 100),
        ("part: router", 1, 5),
        ("aten::sort", 2, 3, 7),  # makes no node, and leaves the number
        ("part: dispatch", 5, 10),
        ("GatherRows", 6, 9, 7),
        ("part: combine", 10, 15),
        ("aten::mul", 11, 12, 8),
        ("autograd::engine::evaluate_function: MulBackward0", 20, 30, 8, MAIN),
        ("MulBackward0", 22, 28, 8, MAIN),
        ("aten::mul", 23, 27),
        ("autograd::engine::evaluate_function: GatherRowsBackward", 30, 50, 7, MAIN),
        ("part: attention", 32, 40),  # computed again by activation checkpointing
        ("aten::mm", 33, 39, 9),
        ("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 50, 60, -1, MAIN),
        ("c10d::allreduce_", 52, 58),
    )
    found = parts(divide(events, None, compiled=False))
    assert found == {"router": 4, "dispatch": 5 + 12, "combine": 5 + 10, "attention": 8, "other": 100 - 44}


def test_all_to_all_is_told_by_its_name_forward_and_backward() -> None:
    events = host(
        ("part: step", 0, 100),
        ("part: experts", 10, 40),
        ("moelab::all_to_all", 12, 20, 3),
        ("GeneratedBackwardFor_moelab_all_to_all_defaultBackward", 13, 18, 3),
        ("moelab::all_to_all_uneven", 30, 35, 4),
        ("autograd::engine::evaluate_function: Uneven", 50, 60, 4, MAIN),
        ("autograd::engine::evaluate_function: Even", 60, 70, 3, MAIN),
        ("moelab::all_to_all", 61, 69),
    )
    assert parts(divide(events, None, compiled=False)) == {"experts": 17, "all-to-all": 8 + 5 + 20, "other": 50}


@pytest.mark.parametrize(("compiled", "name"), [(True, "compiled blocks"), (False, "other")])
def test_what_has_no_part_inside_a_block_is_a_line_of_its_own_only_where_blocks_are_compiled(
    compiled: bool, name: str
) -> None:
    events = host(
        ("part: step", 0, 100),
        ("part: data", 0, 60),
        ("part: optimizer", 60, 80),
        ("part: block", 80, 90),
        ("CompiledFunction", 81, 89, 5),
        ("moelab::all_to_all", 82, 84),
        ("autograd::engine::evaluate_function: CompiledFunctionBackward", 90, 100, 5, MAIN),
    )
    found = parts(divide(events, None, compiled))
    assert found == {"data": 60, "optimizer": 20, "all-to-all": 2, name: 18}


def test_on_a_gpu_an_instant_belongs_to_the_kernel_that_runs_then_to_a_collective_then_to_nothing() -> None:
    events = host(
        ("part: step", 100, 200),
        ("part: attention", 101, 103),
        ("aten::mm", 101, 102, 5),
        ("part: optimizer", 104, 106),
        ("moelab::all_to_all", 107, 108),
        ("MmBackward0", 110, 115, 5, MAIN, ENGINE),
    )
    mm, optimizer, exchange, backward = 3, 4, 5, 6
    device = [
        DeviceEvent("before", 90, 110, mm),
        DeviceEvent("gemm", 110, 120, mm),
        DeviceEvent("adam", 115, 130, optimizer),  # overlaps: an instant counts once, for who came first
        DeviceEvent("ncclDevKernel_AllReduce", 125, 150, 999),  # of no operator that is known
        DeviceEvent("gemm", 140, 145, backward),
        DeviceEvent("ncclDevKernel_SendRecv", 149, 160, exchange),
        DeviceEvent("adam", 195, 205, optimizer),
    ]
    times = divide(events, device, compiled=False)
    assert parts(times) == {"attention": 15, "optimizer": 15, "all-to-all": 10, "other": 60}
    assert times.own["other", "ncclDevKernel_AllReduce"] == 15
    assert times.own["other", "idle"] == 10 + 35
    assert times.total == 100


def kineto(name: str, kind: DeviceType, **facts: Any) -> SimpleNamespace:
    """An event as torch's profiler hands it out, for what this machine cannot record."""
    silent = {"linked_correlation_id": 0, "correlation_id": 0, "is_user_annotation": False, "sequence_nr": -1}
    threads = {"start_thread_id": MAIN, "end_thread_id": MAIN, "fwd_thread_id": 0}
    known = {"name": name, "device_type": kind, "start_ns": 10, "duration_ns": 5, **silent, **threads, **facts}
    return SimpleNamespace(**{key: lambda value=value: value for key, value in known.items()})


def test_kernels_are_linked_to_operators_and_marks_on_the_device_are_none() -> None:
    events = [
        kineto("aten::mm", DeviceType.CPU, correlation_id=7, sequence_nr=3),
        kineto("cudaLaunchKernel", DeviceType.CPU, correlation_id=7, linked_correlation_id=7),
        kineto("cudaDeviceSynchronize", DeviceType.CPU, correlation_id=7),  # of no operator: another 7
        kineto("cuLaunchKernel", DeviceType.CPU, correlation_id=7),
        kineto("gemm", DeviceType.CUDA, correlation_id=8, linked_correlation_id=7),
        kineto("part: experts", DeviceType.CUDA, is_user_annotation=True),
        kineto("gloo:all_reduce", DeviceType.CPU, end_thread_id=ENGINE),
    ]
    results = SimpleNamespace(events=lambda: events)
    profiler: Any = SimpleNamespace(profiler=SimpleNamespace(kineto_results=results))
    operators = [HostEvent("aten::mm", 10, 15, 7, MAIN, 3, 0)]
    assert events_of(profiler, on_gpu=True) == (operators, [DeviceEvent("gemm", 10, 15, 7)])
    assert events_of(profiler, on_gpu=False) == (operators, None)


def test_the_table_shows_parts_in_order_with_their_shares_and_the_sum() -> None:
    step = divide(host(("part: step", 0, 4_000_000), ("part: data", 0, 1_000_000)), None, compiled=True)
    text = Report(4, 5, "cpu", step, step).markdown()
    assert "| data | 0.50 | 25.0% |\n| other | 1.50 | 75.0% |\n| sum | 2.00 | 100.0% |" in text
    assert "Steps 4 to 5" in text
    assert "The same blocks UNCOMPILED" in text
    assert "UNCOMPILED" not in Report(4, 5, "cpu", step, None).markdown()


# --- real events ----------------------------------------------------------------------------------------------------


def take_steps(model: GPT, steps: int) -> Report:
    """Profile forward and backward of a tiny model, after a warm-up, as a run does."""
    config = model.config
    tokens = torch.randint(config.vocab_size, (2, config.seq_len), generator=torch.Generator().manual_seed(1))
    reports: list[Report] = []
    plan = StepProfile(steps, 1, model, torch.device("cpu"), True, lambda report, _: reports.append(report))
    for _ in range(WARM_UP_STEPS + steps + 1):
        if plan.begins and plan.compiled:
            plan.time_uncompiled((tokens, tokens))
        with plan.step():
            model(tokens, tokens)[0].backward()
    (report,) = reports
    return report


def build(*settings: str, how: ActivationCheckpointing = "none") -> GPT:
    return GPT(load_run(REPO_ROOT / "ds_configs" / "moe_tiny.json", list(settings)).model, 1, 0, 3, how)


ONLY_IN = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": {"attention"},
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": {"attention"},
    "aten::sort": {"router"},
    "aten::_softmax": {"router"},
    "aten::_softmax_backward_data": {"router"},
    "aten::_log_softmax": {"head and loss"},
    "ChunkedCrossEntropyBackward": {"head and loss"},
    "GatherRowsBackward": {"dispatch"},
    "WeightedSumBackward": {"combine"},
    "aten::rms_norm": {"attention", "other"},
    "aten::relu": {"experts"},
    "aten::threshold_backward": {"experts"},
    "aten::mm": {"attention", "router", "head and loss"},
    "aten::bmm": {"experts"},
    "torch::autograd::AccumulateGrad": {"other"},
}


@pytest.mark.parametrize("how", ["none", "selective", "block"])
def test_operators_of_both_passes_are_found_in_their_parts_whatever_is_computed_again(
    how: ActivationCheckpointing,
) -> None:
    report = take_steps(build(how=how), STEPS)
    found = parts(report.step)
    assert set(found) == {"attention", "router", "dispatch", "experts", "combine", "head and loss", "other"}
    assert report.uncompiled is None
    assert (report.first_step, report.last_step) == (1 + WARM_UP_STEPS, WARM_UP_STEPS + STEPS)
    for operator, expected in ONLY_IN.items():
        assert {name for name, event in report.step.own if event == operator} == expected, operator


def test_a_dense_model_has_an_mlp_and_no_experts() -> None:
    found = parts(take_steps(build("run.model.moe=null", "run.model.ffn_hidden_size=64"), 1).step)
    assert set(found) == {"attention", "mlp", "head and loss", "other"}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_block_stays_one_graph_that_marks_do_not_touch(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = build("run.model.num_layers=1")
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    with caplog.at_level(logging.WARNING):
        report = take_steps(model, 1)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1, "nothing is compiled again for the profile"
    assert not counters["graph_break"]
    assert caplog.records == []
    assert set(parts(report.step)) == {"compiled blocks", "head and loss", "other"}
    assert ("compiled blocks", "CompiledFunctionBackward") in report.step.own
    assert report.uncompiled is not None
    uncompiled = {"attention", "router", "dispatch", "experts", "combine", "head and loss", "other"}
    assert set(parts(report.uncompiled)) == uncompiled


def test_timing_blocks_uncompiled_leaves_no_gradients() -> None:
    model = build("run.model.num_layers=1")
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    plan = StepProfile(1, 1, model, torch.device("cpu"), True, lambda *_: None)
    plan.time_uncompiled((tokens, tokens))
    assert plan.uncompiled is not None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_profile_that_is_cut_short_says_so_and_reports_nothing() -> None:
    plan = StepProfile(2, 1, torch.nn.Identity(), torch.device("cpu"), True, lambda *_: pytest.fail("a report"))
    for _ in range(WARM_UP_STEPS + 1):
        with plan.step():
            pass
    assert not plan.close()
    assert isinstance(part("experts"), contextlib.nullcontext)
    assert StepProfile(0, 1, torch.nn.Identity(), torch.device("cpu"), True, lambda *_: None).close()


def test_a_mark_is_nothing_where_nothing_is_profiled() -> None:
    assert isinstance(part("experts"), contextlib.nullcontext)
    with torch.profiler.profile() as profiler:
        build()
    assert not [event for event in profiler.events() if event.name.startswith(PREFIX)]


def test_profiled_steps_are_left_out_of_the_times_of_steps() -> None:
    timer = StepTimer("cpu", profiled_steps=2)
    for _ in range(WARM_UP_STEPS + 2):
        timer.start()
        timer.stop()
        assert timer.since_last_call() == []
    timer.start()
    timer.stop()
    assert len(timer.since_last_call()) == 1
    assert len(timer.measured()) == 1
