"""Steps of two ranks that are not finite, or whose loss is a spike: who skips, what stays, and what is said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from test_expert_parallelism import convert
from test_zero_and_memory import OFFLOAD, PARTITIONED, Case, build, micro_batch, start_engine, whole_weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from launch.run_config import REPO_ROOT, load_run
from launch.run_dir import EXIT_COMPLETED, EXIT_FAILED, EXIT_STOPPED, saved_steps
from model.config import ActivationCheckpointing
from model.fp8_weights import refresh_fp8
from model.gpt import GPT
from model.guard import HISTORY, UpdateGuard
from model.not_finite import locate
from ranks import RankPool, train_on_this_rank

TINY = REPO_ROOT / "ds_configs" / "moe_tiny.json"
MICRO_STEPS = 2  # of two ranks
NOT_A_RESULT = ("dt_ms", "tok_per_sec", "peak_mem", "time/")  # what may differ between equal runs

# --- one engine -------------------------------------------------------------------------------------------------------


def train_past_a_fault(case: Case, fault: str | None) -> dict[str, Any]:
    """On every rank: steps 0 to 3 with a fault on rank 1 in the first micro-step of step 1; or steps 0, 2 and 3."""
    import torch.distributed as dist

    engine, guard = start_engine(case), UpdateGuard(None)
    guard.watch(engine)
    skipped = []
    for step in (0, 2, 3) if fault is None else (0, 1, 2, 3):
        for micro_step in range(MICRO_STEPS):
            loss, stats = engine(*micro_batch(step, micro_step))
            if (step, micro_step, dist.get_rank()) == (1, 0, 1):
                if fault == "gradient":
                    loss.register_hook(lambda gradient: gradient * torch.inf)
                elif fault is not None:
                    loss = loss + float(fault)
            engine.backward(guard.loss(loss, stats.cross_entropy))
            engine.step()
        if guard.after_update() is not None:
            skipped.append(step)
    state = whole_weights(engine, case)
    optimizer = engine.optimizer
    while not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    for number, of_parameter in enumerate(optimizer.state.values()):
        state |= {f"{number}/{name}": torch.as_tensor(value).clone() for name, value in of_parameter.items()}
    engine.destroy()
    return {"state": state, "skipped": skipped}


@pytest.mark.parametrize(
    "case",
    [
        Case("MOE", {"stage": 1}, 2),
        Case("MOE", {"stage": 1}, 2, muon=True, bf16=True),
        Case("MOE", {"stage": 1, **OFFLOAD}, 1, bf16=True),
        Case("MOE", {"stage": 1, **OFFLOAD}, 2, muon=True),
        Case("MOE", {"stage": 2}, 1, muon=True),
        Case("MOE", {"stage": 2}, 2, bf16=True),
        Case("MOE", {"stage": 2, **OFFLOAD}, 2),
        Case("MOE", {"stage": 2, **OFFLOAD}, 1, muon=True, bf16=True),
        Case("DENSE", {"stage": 0}),
        Case("DENSE", {"stage": 0}, bf16=True),
        Case("DENSE", PARTITIONED),
        Case("DENSE", {**PARTITIONED, **OFFLOAD}, bf16=True),
    ],
    ids=str,
)
def test_a_step_that_is_not_finite_on_one_rank_is_as_if_it_had_never_been(two_ranks: RankPool, case: Case) -> None:
    """Weights, moments, momentum and counts of updates are those of ranks that never saw it, bit for bit. An infinite
    loss has finite gradients here."""
    never = two_ranks.run(train_past_a_fault, case, None)
    for fault in ("nan", "inf", "gradient"):
        for found, expected in zip(two_ranks.run(train_past_a_fault, case, fault), never, strict=True):
            assert found["skipped"] == [1], fault
            assert found["state"].keys() == expected["state"].keys()
            for name, value in found["state"].items():
                assert torch.equal(value, expected["state"][name]), (fault, name)


# --- whole runs -------------------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """What goes wrong on one rank, in these steps of an attempt, counted from 1."""

    kind: str  # "loss", "layer", "gradient" or "spike"
    rank: int
    steps: range


@contextmanager
def faulty(fault: Fault) -> Iterator[None]:
    """On the fault's rank: a GPT that fails so. Forward passes in training are counted; a diagnosis runs later ones."""
    import torch.distributed as dist

    forward, calls, hooked = GPT.forward, 0, False

    def in_a_faulty_step() -> bool:
        return (calls - 1) // MICRO_STEPS + 1 in fault.steps

    def spoil(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if not in_a_faulty_step() or not torch.is_grad_enabled():
            return None
        if fault.kind == "layer":
            return output * torch.nan
        output.register_hook(lambda gradient: gradient * torch.inf)
        return None

    def faulty_forward(self: GPT, *inputs: Any) -> Any:
        nonlocal calls, hooked
        if not self.training:
            return forward(self, *inputs)
        calls += 1
        if fault.kind in ("layer", "gradient") and not hooked:
            hooked = True
            self.blocks[1].attention.k_proj.register_forward_hook(spoil)
        loss, stats = forward(self, *inputs)
        if in_a_faulty_step() and fault.kind in ("loss", "spike"):
            factor = torch.nan if fault.kind == "loss" else 4.0
            return loss * factor, stats._replace(cross_entropy=stats.cross_entropy * factor)
        return loss, stats

    if dist.get_rank() == fault.rank:
        GPT.forward = faulty_forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        GPT.forward = forward  # type: ignore[method-assign]


def train_with_a_fault(fault: Fault, run_dir: Path, settings: list[str]) -> int:
    with faulty(fault):
        return train_on_this_rank(TINY, run_dir, settings)


def train(two_ranks: RankPool, run_dir: Path, fault: Fault | None, *settings: str) -> int:
    fault = fault or Fault("none", 0, range(0))
    codes = two_ranks.run(train_with_a_fault, fault, run_dir, list(settings))
    assert codes[0] == codes[1]
    return codes[0]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(run_dir: Path) -> dict[int, dict[str, Any]]:
    return {
        line["step"]: {key: value for key, value in line.items() if not any(word in key for word in NOT_A_RESULT)}
        for line in lines_of(run_dir / "metrics.jsonl")
    }


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


BALANCED = ("run.model.moe.balance=bias", "run.model.moe.score_func=sigmoid", "bf16.enabled=true")


def test_a_skipped_step_moves_no_bias_and_is_recorded_and_the_run_goes_on(two_ranks: RankPool, tmp_path: Path) -> None:
    run_dir, settings = tmp_path / "run", (*BALANCED, "run.train.eval_every=1", "run.fp8.enabled=true")
    assert train(two_ranks, run_dir, Fault("loss", 1, range(4, 5)), *settings) == EXIT_COMPLETED
    lines = metrics(run_dir)
    assert list(lines) == list(range(11))
    assert lines[4]["train/loss"] is None
    assert lines[4]["train/grad_norm"] is None
    assert lines[4]["val/loss"] == lines[3]["val/loss"] != lines[5]["val/loss"], "of the same weights and biases"
    assert [line.get("train/skipped_steps") for line in lines.values()] == [None] * 4 + [1.0] * 7
    assert lines[10]["train/loss"] < lines[3]["train/loss"]
    bias = {line["step"]: line["selection_bias"] for line in lines_of(run_dir / "expert_load.jsonl")}
    assert bias[4] == bias[3] != bias[5]
    assert (summary(run_dir)["skipped_steps"], summary(run_dir)["step"]) == (1, 10)
    assert (
        "no update in step 4: the loss is not finite on rank 1 (1 in a row, 3 allowed)"
        in (run_dir / "log.txt").read_text()
    )


def test_past_the_limit_a_run_ends_and_names_rank_step_and_layer(two_ranks: RankPool, tmp_path: Path) -> None:
    run_dir, settings = tmp_path / "run", ("run.train.save_every=1", "run.train.max_skipped_steps=1")
    assert train(two_ranks, run_dir, Fault("layer", 1, range(3, 100)), *settings) == EXIT_FAILED
    found = summary(run_dir)
    assert (found["status"], found["step"], found["skipped_steps"]) == ("nan", 4, 2)
    assert found["reason"] == (
        "no update in step 4: the loss is not finite on rank 1 (2 in a row, 1 allowed); first in the "
        "forward pass: the output of blocks.1.attention.k_proj (layer 1) on rank 1, in micro-step 1 of 2; "
        "last saved: step_00000002"
    )


def locate_a_poisoned_weight(compiled: bool, recomputed: ActivationCheckpointing) -> str:
    """On every rank: what is said of a model whose experts the ranks share, and of which rank 1 has a bad weight."""
    import torch.distributed as dist

    model = build(Case("MOE", {}, 2, recomputed), dist.get_rank())
    for block in model.blocks:
        block.mlp.set_deepspeed_parallelism()  # else the engine's to do
    if compiled:
        for block in model.blocks:
            block.compile(backend="eager")
    model(*micro_batch(0, 0))[0].backward()
    if dist.get_rank() == 1:
        model.blocks[1].attention.o_proj.weight.data[0, 0] = torch.nan
    return locate(model, [micro_batch(0, 0)])


@pytest.mark.parametrize(("compiled", "recomputed"), [(True, "none"), (False, "block"), (False, "selective")])
def test_a_layer_is_found_in_what_is_compiled_or_computed_twice(
    two_ranks: RankPool, compiled: bool, recomputed: ActivationCheckpointing
) -> None:
    """No hook of a module would run where its block has been compiled."""
    expected = (
        "not finite before the step: blocks.1.attention.o_proj.weight on rank 1; first in the forward pass: "
        "the output of blocks.1.attention.o_proj (layer 1) on rank 1, in micro-step 1 of 1"
    )
    assert two_ranks.run(locate_a_poisoned_weight, compiled, recomputed) == [expected, expected]


def locate_in_a_healthy_model(settings: list[str]) -> str:
    """On every rank: what is said of two micro-steps in which nothing is wrong."""
    import torch.distributed as dist

    run = load_run(TINY, settings)
    model = GPT(run.model, 2, dist.get_rank()).bfloat16()
    for block in model.blocks:
        block.mlp.set_deepspeed_parallelism()
    convert(model, {} if run.fp8.enabled else None)
    refresh_fp8(model)
    found = locate(model, [micro_batch(0, 0), micro_batch(0, 1)])
    assert all(parameter.grad is None for parameter in model.parameters())
    return found


@pytest.mark.parametrize(
    "settings",
    [
        ["run.model.moe.capacity_factor=0", "run.model.moe.aux_loss_scope=global_batch"],
        ["run.model.moe.expert_backend=loop", "run.model.moe.num_shared_experts=1"],
        ["run.fp8.enabled=true", "bf16.enabled=true"],
    ],
    ids=str,
)
def test_nothing_is_found_where_nothing_is_wrong(two_ranks: RankPool, settings: list[str]) -> None:
    answers = two_ranks.run(locate_in_a_healthy_model, settings)
    assert answers == ["not reproduced: computed again, all losses and gradients are finite"] * 2


def test_a_gradient_that_is_not_finite_is_found_where_the_loss_is(two_ranks: RankPool, tmp_path: Path) -> None:
    run_dir, settings = tmp_path / "run", ("run.train.max_skipped_steps=0", "run.model.moe.aux_loss_scope=global_batch")
    assert train(two_ranks, run_dir, Fault("gradient", 1, range(3, 100)), *settings) == EXIT_FAILED
    assert summary(run_dir)["reason"].startswith(
        "no update in step 3: the losses are finite, but the gradients' norm is not (1 in a row, 0 allowed); "
        "first in the backward pass: the gradient of blocks.1.attention.k_proj.weight (layer 1) "
        "on rank 1, in micro-step 1 of 2; last saved: "
    )


def test_a_fault_that_does_not_happen_again_is_said_to_be_one(two_ranks: RankPool, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    fault = Fault("layer", 0, range(2, 3))
    assert train(two_ranks, run_dir, fault, "run.train.max_skipped_steps=0") == EXIT_FAILED
    assert "; not reproduced: computed again, all losses and gradients are finite; " in summary(run_dir)["reason"]


def locate_without_memory(run_dir: Path) -> str:
    """What looking for the layer says where its computation, which is not the compiled one, finds no memory."""
    from model import not_finite

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(not_finite, "first_in_micro_steps", no_memory)
        return not_finite.locate(torch.nn.Linear(2, 2), [])  # type: ignore[arg-type]


def test_memory_that_runs_out_while_the_layer_is_looked_for_hides_no_nan(two_ranks: RankPool, tmp_path: Path) -> None:
    assert two_ranks.run(locate_without_memory, tmp_path) == ["not located: memory ran out"] * 2


def train_with_a_weight_gone_bad(run_dir: Path) -> int:
    """On every rank: after step 3, a weight of rank 1 is infinite, as no update made it."""
    import torch.distributed as dist

    import train

    def train_step(trainer: Any) -> Any:
        stats = whole_step(trainer)
        if trainer.step == 3 and dist.get_rank() == 1:
            trainer.engine.module.blocks[0].attention.v_proj.weight.data[0, 0] = torch.inf
        return stats

    whole_step, train.Trainer.train_step = train.Trainer.train_step, train_step  # type: ignore[method-assign]
    try:
        return train_on_this_rank(TINY, run_dir, ["run.train.save_every=1"])
    finally:
        train.Trainer.train_step = whole_step  # type: ignore[method-assign]


def test_a_weight_that_is_not_finite_is_not_saved(two_ranks: RankPool, tmp_path: Path) -> None:
    assert two_ranks.run(train_with_a_weight_gone_bad, tmp_path / "run") == [EXIT_FAILED] * 2
    assert summary(tmp_path / "run")["status"] == "nan"
    assert summary(tmp_path / "run")["reason"] == (
        "not saved after step 3: not finite are blocks.0.attention.v_proj.weight on rank 1; last saved: step_00000002"
    )
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000002"


def test_a_run_that_is_resumed_after_a_skipped_step_continues_bit_for_bit(two_ranks: RankPool, tmp_path: Path) -> None:
    fault = Fault("loss", 1, range(3, 4))
    assert train(two_ranks, tmp_path / "whole", fault, *BALANCED) == EXIT_COMPLETED
    assert train(two_ranks, tmp_path / "halves", fault, *BALANCED, "run.train.stop_at_step=3") == EXIT_STOPPED
    assert train(two_ranks, tmp_path / "halves", None, *BALANCED) == EXIT_COMPLETED
    whole, halves = metrics(tmp_path / "whole"), metrics(tmp_path / "halves")
    for name in ("train/loss", "train/grad_norm", "moe/bias_range", "train/lr"):
        assert [line.get(name) for line in halves.values()] == [line.get(name) for line in whole.values()], name


def test_a_row_of_skipped_steps_is_not_saved_before_a_validation_that_will_be_compiled(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    run_dir, settings = tmp_path / "run", ("run.compile.mode=static", "run.train.eval_every=2", "run.train.keep_last=9")
    assert train(two_ranks, run_dir, None, *settings, "run.train.stop_at_step=1") == EXIT_STOPPED
    fault = Fault("loss", 1, range(1, 2))  # in step 2, the first of this attempt
    assert train(two_ranks, run_dir, fault, *settings, "run.train.stop_at_step=3") == EXIT_STOPPED
    assert "val/loss" in metrics(run_dir)[2]
    assert saved_steps(run_dir) == [0, 1, 3]


# --- spikes -----------------------------------------------------------------------------------------------------------

LONG = ("run.train.num_steps=40", "run.train.schedule=constant", "run.train.spike_factor=2.0")


def test_a_spike_is_skipped_on_all_ranks_and_nothing_else_is(two_ranks: RankPool, tmp_path: Path) -> None:
    """Twice the median: a loss of 4 times the usual on one of two ranks is 2.5 times in the mean."""
    run_dir = tmp_path / "run"
    assert train(two_ranks, run_dir, Fault("spike", 1, range(36, 37)), *LONG) == EXIT_COMPLETED
    lines = metrics(run_dir)
    counts = [(line.get("train/skipped_steps"), line.get("train/skipped_spikes")) for line in lines.values()]
    assert counts == [(None, None)] * 36 + [(1.0, 1.0)] * 5
    assert lines[36]["train/loss"] == pytest.approx(2.5 * lines[35]["train/loss"], rel=0.1), "a spike is a number"
    assert "no update in step 36: a spike of the loss to " in (run_dir / "log.txt").read_text()


def test_a_loss_that_stays_up_ends_the_run_as_a_spike(two_ranks: RankPool, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert train(two_ranks, run_dir, Fault("spike", 0, range(34, 100)), *LONG) == EXIT_FAILED
    found = summary(run_dir)
    assert (found["status"], found["step"], found["skipped_steps"]) == ("failed", 37, 4)
    assert found["reason"].startswith("LossSpike: no update in step 37: a spike of the loss to ")


def test_no_step_is_a_spike_before_there_are_enough_to_compare_it_with(two_ranks: RankPool, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert train(two_ranks, run_dir, Fault("spike", 1, range(HISTORY, HISTORY + 1)), *LONG) == EXIT_COMPLETED
    assert summary(run_dir)["skipped_steps"] == 0


class NothingGoesToTheHost(TorchDispatchMode):
    """Raise where a GPU would make the host wait for a value."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = function.name()
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "aten::equal", "_to_cpu")), name
        return function(*arguments, **(options or {}))


def decisions(losses: list[float], state: dict[str, Any] | None) -> tuple[list[bool], dict[str, Any]]:
    """On every rank: a guard's decisions on steps of one micro-step, with nothing copied to the host before a skip."""
    engine = SimpleNamespace(device="cpu", optimizer=None, is_gradient_accumulation_boundary=lambda: True)
    guard = UpdateGuard(2.0)
    guard.watch(engine)
    if state is not None:
        guard.load(json.loads(json.dumps(state)))
    skipped = []
    for value in losses:
        loss = torch.tensor(value, requires_grad=True)
        with NothingGoesToTheHost():
            poisoned = guard.loss(loss, loss.detach())
        poisoned.backward()
        assert loss.grad is not None
        finite = bool(loss.grad.isfinite())
        engine.was_step_applied = lambda finite=finite: finite
        if finite:
            with NothingGoesToTheHost():
                assert guard.after_update() is None
        else:
            assert guard.after_update() is not None
        skipped.append(not finite)
    return skipped, guard.state()


def test_a_guard_that_continues_from_its_state_decides_the_same_and_nothing_waits(two_ranks: RankPool) -> None:
    """The median of the last accepted losses: it follows a slow rise, a spike does not enter it, and NaN neither."""
    losses = [5.0 + step for step in range(HISTORY)] + [43.5, 40.0, float("nan"), 41.0, 45.0, 47.5, 47.5]
    expected = [False] * HISTORY + [True, False, True, False, False, True, True]
    (whole, state), _ = two_ranks.run(decisions, losses, None)
    assert whole == expected
    assert (state["skipped_steps"], state["skipped_spikes"], state["in_a_row"]) == (4, 3, 2)
    for cut in (10, HISTORY + 1, HISTORY + 3):
        (first, between), _ = two_ranks.run(decisions, losses[:cut], None)
        (second, after), _ = two_ranks.run(decisions, losses[cut:], between)
        assert first + second == whole
        assert after == state
