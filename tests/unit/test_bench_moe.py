"""tools/bench_moe: every peer computes what it should, the arithmetic is right, and no fault loses the other rows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import reference
from launch.run_config import REPO_ROOT
from model.config import ConfigError, MoEConfig
from model.loop import WARM_UP_STEPS
from tools.bench_moe import blocks, results, timing, training_steps
from tools.bench_moe.__main__ import figures, main
from tools.bench_moe.blocks import Block, Case
from tools.bench_moe.rounds import interquartile_range, median_ratio, order_of_round
from tools.bench_moe.shapes import ALSO_COMPILED, BLOCKS, SETS, Shape, parse_blocks, parse_shapes

T, D, F, E = 40, 16, 32, 4
IN_FP8 = ("ours/fp8", "ours/fp8_grouped", "torchao/grouped", "torchao/loop")
TINY = f"T{T},D{D},F{F},E{E},k2"
CPU = torch.device("cpu")
FP32_SUMS = {
    "rtol": 1e-4,
    "atol": 1e-4,
}  # of some hundred products around 1, added in any order; a wrong route moves 0.1


def case(top_k: int = 2, scale: float = 25.0) -> Case:
    """A tiny case in fp32 with weights large enough that no tolerance hides a wrong one."""
    built = Case(Shape(T, D, F, E, top_k), torch.float32, CPU)
    built.gate_ED *= scale
    experts = built.experts
    built.experts = lambda activation: blocks.Experts(  # type: ignore[method-assign]
        activation, experts(activation).w1_ERD * scale, experts(activation).w2_EDF * scale
    )
    return built


def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of the tool on a tiny shape, in samples of a moment."""
    monkeypatch.setattr(timing, "SAMPLE_MS", 0.1)
    out = tmp_path / "out.json"
    code = main(["--malloc", "system", "--shapes", TINY, "--rounds", "2", "--json", str(out), *options])
    return code, json.loads(out.read_text())


# --- what is compared -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in ("deepspeed/stock", "dense/iso_flop")])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_moe_block_equals_the_reference_in_values_and_gradients(name: str, top_k: int) -> None:
    tiny = case(top_k)
    block = tiny.build(name)
    capacity_factor, activation = block.facts["capacity_factor"], block.facts["activation"]
    y = block.forward(tiny.x)
    y.backward(tiny.grad)

    experts = tiny.experts(activation)
    x_TD, gate_ED, w1_ERD = (
        tensor.detach().clone().requires_grad_() for tensor in (tiny.x[0], tiny.gate_ED, experts.w1_ERD)
    )
    config = MoEConfig(num_experts=E, top_k=top_k, ffn_hidden_size=experts.width, capacity_factor=capacity_factor)
    routed = reference.moe_layer(x_TD, gate_ED, w1_ERD, experts.w2_EDF, config, activation)
    expected_TD, kept = routed.y_TD, routed.kept
    expected_TD.backward(tiny.grad[0])

    gate = next(each for each in block.module.parameters() if each.shape == (E, D))
    pairs = ((y[0], expected_TD), (tiny.x.grad[0], x_TD.grad), (gate.grad, gate_ED.grad))
    for got, expected in pairs:
        assert expected.abs().mean() > 0.1  # so that the absolute tolerance hides nothing
        if name in IN_FP8:  # far more than rounding in fp32 does, and less than a lost factor
            assert 1e-2 < float(((got - expected).norm() / expected.norm()).detach()) < 0.3
        else:
            torch.testing.assert_close(got, expected, **FP32_SUMS)
    tiny.check(block)
    assert block.facts["dropped_frac"] == pytest.approx(1 - len(kept) / (T * top_k))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_deepspeeds_block_differs_from_the_dropless_one_only_where_it_drops(top_k: int) -> None:
    tiny = case(top_k)
    stock, dropless, ours = (
        tiny.build(f"{name}") for name in ("deepspeed/stock", "deepspeed/stock_dropless", "ours/bmm")
    )
    for block in (stock, ours):
        tiny.check(block)
    assert stock.facts["dropped_frac"] == ours.facts["dropped_frac"] > 0
    other_T = ~torch.isclose(stock.forward(tiny.x), dropless.forward(tiny.x), **FP32_SUMS).all(-1)[0]
    assert 0 < int(other_T.sum()) <= stock.facts["dropped_frac"] * T * top_k


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_deepspeeds_block_draws_nothing_at_random(top_k: int) -> None:
    block = case(top_k).build("deepspeed/stock")
    x = torch.randn(1, T, D)
    assert all(torch.equal(block.forward(x), block.forward(x)) for _ in range(5))


def test_bmm_and_stock_drop_beyond_capacity_one_and_all_others_nothing() -> None:
    built = {name: case().build(name).facts.get("capacity_factor") for name in BLOCKS}
    limited = ("ours/bmm", "ours/loop", "ours/fp8", "torchao/grouped", "torchao/loop", "deepspeed/stock")
    assert built == {**dict.fromkeys(BLOCKS, 0.0), **dict.fromkeys(limited, 1.0), "dense/iso_flop": None}


@pytest.mark.parametrize("name", ["dense/iso_flop", "seed/loop", "transformers/eager"])
def test_the_flops_stated_are_those_executed(name: str) -> None:
    tiny = case()
    block = tiny.build(name)
    with FlopCounterMode(display=False) as counter:
        block.step(tiny.x, tiny.grad)
    gate = 0 if name == "dense/iso_flop" else 3 * 2 * T * D * E
    assert counter.get_total_flops() == block.facts["flops"] + gate


def test_the_floor_has_the_flops_and_the_active_parameters_of_the_chosen_experts() -> None:
    tiny = case(top_k=3)
    dense, ours = tiny.build("dense/iso_flop"), tiny.build("ours/bmm")
    assert dense.facts["flops"] == ours.facts["flops"] == 3 * 2 * T * 3 * (2 * D * F)
    assert dense.facts["parameters"] == 3 * 2 * D * F
    assert ours.facts["parameters"] == E * 2 * D * F + E * D


def test_all_moe_blocks_get_the_same_weights_in_the_precision_asked_for() -> None:
    tiny = Case(Shape(T, D, F, E, 2), torch.bfloat16, CPU)
    built = {name: tiny.build(name) for name in BLOCKS}
    sums = {name: sum(p.double().sum() for p in block.parameters) for name, block in built.items()}
    assert {p.dtype for block in built.values() for p in block.parameters} == {torch.bfloat16}
    for activation in ("relu2", "swiglu"):
        equal = [sums[name] for name in BLOCKS[:-1] if built[name].facts["activation"] == activation]
        torch.testing.assert_close(torch.stack(equal), equal[0].expand(len(equal)))


def test_a_step_leaves_no_gradient_behind() -> None:
    tiny = case()
    block = tiny.build("ours/bmm")
    block.step(tiny.x, tiny.grad)
    assert tiny.x.grad is None
    assert all(parameter.grad is None for parameter in block.parameters)


def test_a_shape_of_the_gpu_set_gives_each_expert_the_rows_that_were_asked_for() -> None:
    rows = [(shape.E, shape.T * shape.k // shape.E, shape.D, shape.F) for shape in SETS["gpu"]]
    assert rows == [(8, 4096, 768, 1536), (8, 4096, 2048, 4096), (64, 1536, 2048, 1408), (8, 4096, 4096, 14336),
                    (1, 32768, 768, 1536)]  # fmt: skip
    assert all(shape.T * shape.k % shape.E == 0 for shape in SETS["gpu"])


@pytest.mark.parametrize(("width", "gated"), [(1536, 1024), (512, 344), (128, 88), (8, 8)])
def test_gated_experts_have_the_flops_of_plain_ones_up_to_a_multiple_of_eight(width: int, gated: int) -> None:
    assert Shape(T, D, width, E, 2).gated_width == gated


def test_shapes_and_blocks_are_chosen_by_name() -> None:
    assert parse_shapes(["cpu", TINY, TINY]) == (*SETS["cpu"], Shape(T, D, F, E, 2))
    assert parse_blocks(["ours/bmm", "seed/loop+dynamic"], compiled=True) == (
        "ours/bmm", "seed/loop+dynamic", "ours/bmm+static")  # fmt: skip


# --- how it is timed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 10])
def test_every_block_has_every_place_and_follows_every_other_equally_often(count: int) -> None:
    rounds = count if count % 2 == 0 else 2 * count
    orders = [order_of_round(number, count) for number in range(rounds)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    for place in range(count):
        assert Counter(order[place] for order in orders) == dict.fromkeys(range(count), rounds // count)
    followed = Counter(pair for order in orders for pair in pairwise(order))
    assert len(followed) == count * (count - 1)
    assert set(followed.values()) <= {rounds // count}


def test_rounds_are_interleaved_in_that_order_and_the_warm_up_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SAMPLE_MS", 1e-9)
    calls: list[str] = []
    steps = {name: (lambda _, name=name: calls.append(name)) for name in "abcd"}
    measured = timing.measure(steps, (torch.zeros(1),), rounds=3)
    assert "".join(calls[:12]) == "abcd" + "aabbccdd"  # first steps, then those that say how long a step takes
    assert calls[12:] == ["abcd"[place] for number in range(3) for place in order_of_round(number, 4)]
    assert all(len(series.ms) == 3 for series in measured.values())


def test_what_failed_once_is_not_tried_again() -> None:
    calls: list[str] = []

    def fails(_: torch.Tensor) -> None:
        calls.append("fails")
        raise RuntimeError

    measured = timing.measure({"fails": fails, "works": lambda _: None}, (torch.zeros(1),), rounds=2)
    assert calls == ["fails"]
    assert measured["fails"].error == "RuntimeError: "
    assert len(measured["works"].ms) == 2


def test_a_sample_has_as_many_steps_as_fill_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 0.03 * next(clock))  # every look at it takes 30 ms
    series = timing.Series()
    timing.warm_up(lambda: None, series, CPU)
    assert series.steps_per_sample == 4
    timing.sample(lambda: None, series, CPU)
    assert series.ms == [pytest.approx(30 / 4)]


def test_a_gpu_is_timed_by_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("record")

        def elapsed_time(self, ended: Event) -> float:
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("synchronize"))
    assert timing.ms_per_step(lambda: happened.append("step"), 3, torch.device("cuda")) == 2.0
    assert happened == ["synchronize", "record", "step", "step", "step", "record", "synchronize"]


def test_spread_and_ratios() -> None:
    assert interquartile_range([1.0, 2.0, 3.0, 4.0, 9.0]) == 2.0  # from 2 to 4
    assert interquartile_range([1.0, 2.0]) == 0.5
    assert median_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == 2.0  # of 2, 3 and 1: within the round


def test_freed_memory_stays_in_the_process() -> None:
    """Blocks of 32 MiB, which glibc maps and unmaps one by one if left alone."""
    script = """
import resource
from tools.bench_moe.timing import keep_freed_memory
print(keep_freed_memory())
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(32 << 20)
before = faults()
for _ in range(10):
    bytearray(32 << 20)
print(faults() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO_ROOT, capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    if kept == "False":
        pytest.skip("this C library has no mallopt")
    assert int(faults) < 100  # 81,920 pages were used


def test_steps_are_asked_for_in_numbers_that_a_run_can_time() -> None:
    assert training_steps.FEWEST_STEPS == WARM_UP_STEPS + 1


def test_every_run_compiles_anew_and_is_not_shown_to_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no run finds the kernels that another has compiled, whatever the order of the runs."""
    started: list[tuple[list[str], str]] = []

    class Process:
        def __init__(self, command: list[str], env: dict[str, str], **_: Any) -> None:
            started.append((command, env["TORCHINDUCTOR_CACHE_DIR"]))
            assert not Path(env["TORCHINDUCTOR_CACHE_DIR"]).exists()

        def wait(self) -> None:
            Path(started[-1][1]).mkdir()

    monkeypatch.setattr(training_steps.subprocess, "Popen", Process)
    for _ in range(2):
        with pytest.raises(training_steps.RunFailed, match="it printed nothing"):
            training_steps.run_once(training_steps.Trial(Path("a.json"), REPO_ROOT), 4, ["run.train.seed=1"])
    assert started[0][1] != started[1][1]
    for command, cache in started:
        assert command[-4:] == ["--set", "run.train.stop_at_step=4", 'run.wandb.mode="disabled"', "run.train.seed=1"]
        assert not Path(cache).exists()


# --- what is written ------------------------------------------------------------------------------------------------


def test_all_blocks_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    code, written = bench(tmp_path, monkeypatch, "--blocks", *BLOCKS)
    assert code == 0
    rows = written["rows"]
    assert [(row["dtype"], row["block"]) for row in rows] == [(t, name) for t in ("fp32", "bf16") for name in BLOCKS]
    for row in rows:
        assert row["shape"] == {"T": T, "D": D, "F": F, "E": E, "k": 2}
        assert len(row["ms_rounds"]) == 2
        assert row["ms_median"] == pytest.approx(sum(row["ms_rounds"]) / 2, abs=1e-3)
        for key in ("ms_iqr", "flops", "parameters", "activation"):
            assert key in row, key
        emulated = row["block"] in IN_FP8
        assert row.get("emulated", False) == emulated == ("fp8" in row)
        for key in ("tflops", "speed_over_stock", "time_over_dense"):  # not of FP8 products that a CPU does not have
            assert (key in row) != emulated, key
        assert ("capacity_factor" in row) == ("dropped_frac" in row) == (row["block"] != "dense/iso_flop")
        assert "peak_mem_mib" not in row  # not measured on a CPU
    env = written["env"]
    for key in ("tool", "command", "date", "commit", "packages", "cpu", "cpu_flags", "threads", "malloc", "rounds"):
        assert key in env, key
    assert {"torch", "deepspeed", "transformers"} <= set(env["packages"])
    assert env["malloc"] == "as the system has it"
    assert not any("time_over_dense_static" in row for row in rows)
    printed = capsys.readouterr().out
    assert all(f"| `{name}`{', emulated' if name in IN_FP8 else ' '}" in printed for name in BLOCKS)


def test_what_is_compiled_is_compared_with_the_floor_compiled_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["ours/bmm", "ours/bmm+static", "dense/iso_flop", "dense/iso_flop+static"]
    code, written = bench(tmp_path, monkeypatch, "--dtypes", "fp32", "--blocks", *names)
    assert code == 0
    rows = {row["block"]: row for row in written["rows"]}
    assert [name for name in names if "time_over_dense_static" in rows[name]] == [names[1], names[3]]
    assert rows["dense/iso_flop+static"]["time_over_dense_static"] == rows["dense/iso_flop"]["time_over_dense"] == 1.0
    assert rows["ours/bmm+static"]["compile_s"] > 0


def test_the_compiled_form_of_ours_and_of_the_floor_is_measured_by_default() -> None:
    assert {"ours/bmm+static", "dense/iso_flop+static"} <= set(ALSO_COMPILED)
    assert parse_blocks(list(ALSO_COMPILED), compiled=True) == ALSO_COMPILED


def test_a_block_that_fails_does_not_lose_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One cannot be built, one raises when it runs, one returns nonsense; the first is what ratios are taken to."""

    def cannot_be_built(case: Case, variant: str) -> Block:
        raise ImportError("no such package")

    def breaks(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setitem(blocks.MAKERS, "deepspeed", cannot_be_built)
    monkeypatch.setattr(blocks.MaskedLoop, "forward", breaks)
    monkeypatch.setattr(blocks.Expert, "forward", lambda self, x: x * float("nan"))
    names = ("deepspeed/stock", "seed/loop", "dense/iso_flop", "ours/bmm", "transformers/eager")
    code, written = bench(tmp_path, monkeypatch, "--dtypes", "fp32", "--blocks", *names)
    assert code == 1
    rows = {row["block"]: row for row in written["rows"]}
    assert list(rows) == list(names)
    assert rows["deepspeed/stock"]["error"] == "ImportError: no such package"
    assert rows["seed/loop"]["error"] == "RuntimeError: out of memory"
    assert "not finite" in rows["dense/iso_flop"]["error"]
    assert rows["ours/bmm"]["ms_median"] > 0
    assert "ms_median" not in rows["dense/iso_flop"]
    for name in ("ours/bmm", "transformers/eager"):
        assert not {"error", "speed_over_stock", "time_over_dense"} & set(rows[name])
    assert "failed: seed/loop: RuntimeError: out of memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shapes", "T64,D16"], "--shapes T64,D16: not a shape. Write one as T4096,D256,F512,E8,k2"),
        (["--shapes", "T64,D16,F0,E4,k2"], "not a shape"),
        (["--shapes", "T64,D16,F16,E4,k5"], "k5 of E4 experts. Use a k of at most 4."),
        (["--blocks", "ours/fast"], "--blocks ours/fast: no such block. Use ours/bmm,"),
        (["--blocks", "seed/loop+swiglu"], "no such block"),
        (["--blocks", "ours/bmm+static+dynamic"], "static and dynamic contradict each other"),
        (["--dtypes", "fp8"], "invalid choice: 'fp8'"),
        (["--rounds", "1"], "--rounds 1: a spread needs at least 2"),
        (["--steps", "9"], "--steps has no effect without --step"),
        (["--set", "a=1"], "--set has no effect without --step"),
        (["--step", "x.json", "--shapes", "cpu"], "--shapes has no effect with --step"),
        (["--step", "nowhere.json"], "nowhere.json: no such run file"),
        (["--step", "ds_configs/moe_tiny.json", "--steps", "3"], "a run times no step before its step 4"),
        (["--step", "ds_configs/moe_tiny.json", "--set", "run.train.sed=1"], "run.train.sed is not a known key"),
        (["--step", "ds_configs/moe_tiny.json@tests"], "has no launch/run.py. Name a checkout"),
        (["--step", "ds_configs/nowhere.json@."], "has no ds_configs/nowhere.json. Name a run file of that checkout"),
        (["--json", "nowhere/out.json"], "--json nowhere/out.json: is a folder, or in one that does not exist"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda: this machine shows no GPU to torch",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    options: list[str], said: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO_ROOT)
    try:
        code = main(options)
    except SystemExit as ended:
        code = ended.code
    printed = capsys.readouterr()
    assert code == 2
    assert printed.err.startswith("ConfigError: ")
    assert printed.err.count("\n") == 1
    assert said in printed.err
    assert printed.out == ""


# --- benchmarks/README.md -------------------------------------------------------------------------------------------


def test_the_readme_shows_the_committed_results() -> None:
    readme = results.README.read_text(encoding="utf-8")
    assert results.with_results(readme) == readme, "run: python -m tools.bench_moe --readme"


def test_committed_results_are_whole_and_come_from_clean_checkouts() -> None:
    for path in filter(results.is_ours, results.FOLDER.glob("*.json")):
        written = json.loads(path.read_text(encoding="utf-8"))
        assert written["env"]["dirty"] is False, path
        assert not [row for row in written["rows"] if "error" in row], path


def test_a_file_of_results_becomes_a_section_with_its_command_commit_machine_and_figures(tmp_path: Path) -> None:
    env = {"tool": "bench_moe", "command": "python -m tools.bench_moe", "commit": "0123456789abcdef", "dirty": True,
           "date": "2026-11-21T12:00:00+00:00", "cores": 2, "cpu": "A CPU", "cpu_flags": ["avx2"], "device": "cpu",
           "packages": {"torch": "2.13.0"}, "load_before": 0.25}  # fmt: skip
    shape = {"T": 8, "D": 4, "F": 4, "E": 2, "k": 1}
    rows = [
        {"shape": shape, "dtype": "bf16", "block": "a", "ms_median": 12.345, "ms_iqr": 0.5, "capacity_factor": 1.0,
         "dropped_frac": 0.025},
        {"shape": shape, "dtype": "bf16", "block": "b", "error": "RuntimeError: 1 | 2", "capacity_factor": 0.0},
        {"shape": shape, "dtype": "fp32", "block": "a", "ms_median": 1234.5, "ms_iqr": 1.0},
    ]  # fmt: skip
    results.write_results(tmp_path / "cpu.json", env, rows)
    assert json.loads((tmp_path / "cpu.json").read_text()) == {"env": env, "rows": rows}

    (tmp_path / "gpu_check_h200.json").write_text('{"tool": "gpu_check", "env": {}}')  # another tool's are left alone

    readme = f"before\n\n{results.BEGIN}\n\nold\n\n{results.END}\n\nafter\n"
    shown = results.with_results(readme, tmp_path)
    assert shown == results.with_results(shown, tmp_path)
    assert shown.startswith("before\n")
    assert shown.endswith("\nafter\n")
    assert "old" not in shown
    for part in (
        "### cpu.json\n\n`python -m tools.bench_moe`\n",
        "Commit 0123456789 with changes, 2026-11-21. 2 cores of A CPU (avx2). torch 2.13.0. Load before: 0.25.",
        "T=8, D=4, F=4, E=2, k=1, bf16\n\n"
        "| block | routing                    | ms                  | IQR  |\n"
        "| ----- | -------------------------- | ------------------- | ---- |\n"
        "| `a`   | capacity 1.0, 2.5% dropped | 12.35               | 0.50 |\n"
        "| `b`   | dropless                   | RuntimeError: 1 / 2 |      |\n",
        "| `a`   | 1,234.50 | 1.00 |",
    ):
        assert part in shown, shown


def test_every_figure_of_a_block_has_its_column() -> None:
    """Of a GPU too: the columns read what `figures` writes."""
    measured = {
        name: timing.Series(ms=[2.0, 2.0], peak_memory_mib=1234.0, first_step_s=56.0)
        for name in ("deepspeed/stock", "dense/iso_flop", "dense/iso_flop+static")
    }
    row = figures("dense/iso_flop+static", {"flops": int(7e12)}, measured)
    head = {"shape": {"T": 8, "D": 4, "F": 4, "E": 2, "k": 1}, "dtype": "bf16", "block": "a", "flops": int(7e12)}
    title, _, cells = results.tables([head | row]).splitlines()[-3:]
    shown = dict(zip(title.split(" | "), cells.split(" | "), strict=True))
    found = {name.strip(" |"): text.strip(" |") for name, text in shown.items()}
    assert found == {
        "block": "`a`", "GFLOP": "7,000.0", "ms": "2.00", "IQR": "0.00", "speed / stock": "1.00",
        "time / dense": "1.00", "compiled / dense compiled": "1.00", "TFLOP/s": "3,500.00", "peak MiB": "1,234",
        "compile s": "56",
    }  # fmt: skip


def test_rows_of_training_steps_are_medians_over_their_rounds() -> None:
    rounds = [{"tok_per_sec": 100.0, "dt_ms": 5.0, "launch_to_first_step_s": 8.0, "world_size": 2},
              {"tok_per_sec": 120.0, "dt_ms": 4.0, "launch_to_first_step_s": 9.0, "world_size": 2}]  # fmt: skip
    row = training_steps.row_of(rounds)
    assert row == {"rounds": 2, "world_size": 2, "tok_per_sec_median": 110.0, "tok_per_sec_iqr": 10.0,
                   "dt_ms_median": 4.5, "dt_ms_iqr": 0.5, "launch_to_first_step_s_median": 8.5,
                   "launch_to_first_step_s_iqr": 0.5}  # fmt: skip
    assert results.tables([{"run": "a.json", "commit": "0123456789abcdef", "dirty": False, **row}]).splitlines() == [
        "| run      | commit     | ranks | tok/s | IQR of tok/s | dt ms | launch to first step s |",
        "| -------- | ---------- | ----- | ----- | ------------ | ----- | ---------------------- |",
        "| `a.json` | 0123456789 | 2     | 110   | 10           | 4.5   | 8.5                    |",
    ]


def test_a_run_of_forced_balance_says_so_in_its_row() -> None:
    forced = {"run": "a.json", **training_steps.row_of([{"tok_per_sec": 1.0, "moe/force_balanced": 1.0}])}
    free = {"run": "a.json", **training_steps.row_of([{"tok_per_sec": 1.0}])}
    assert "| `a.json`, load forced |" in results.tables([forced])
    assert "forced" not in results.tables([free])


def test_a_readme_without_a_place_for_the_tables_is_refused() -> None:
    with pytest.raises(ConfigError, match="lacks the lines"):
        results.with_results("no markers")


def test_the_machine_is_described_without_paths_or_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/opt/lib/libjemalloc.so.2")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    env = results.describe_machine(["--shapes", "cpu"])
    assert env["command"] == "python -m tools.bench_moe --shapes cpu"
    assert env["preloaded"] == ["libjemalloc.so.2"]
    assert env["variables"]["OMP_NUM_THREADS"] == "2"
    assert "secret" not in json.dumps(env)
    assert str(REPO_ROOT) not in json.dumps(env)
