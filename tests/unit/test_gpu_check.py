"""tools/gpu_check: whatever becomes of a part, the rest is measured, and all of it is written down.

The parts here are those of tests/faulty_part.py; the real ones run in tests/integration/test_gpu_check_dry_run.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.run_config import REPO_ROOT, load_run
from tools.bench_moe.shapes import SETS, parse_shapes
from tools.gpu_check import __main__ as gpu_check
from tools.gpu_check import blocks, gpu_tests, legs, results, targets
from tools.gpu_check.child import DRY, MEASURED, Context, presentable
from tools.gpu_check.gpu_tests import TESTS
from tools.gpu_check.parts import GPU_TESTS, PARTS, RELU2_CASTS, STEP_CASES, Part
from tools.gpu_check.shapes import SHAPES, TOP_K
from tools.gpu_check.tables import markdown, section

Content = dict[str, Any]


def faulty(name: str, *cases: str, share: float = 1.0, limit_s: float = 60.0, function: str = "run") -> Part:
    return Part(name, name, f"tests.faulty_part:{function}", cases, cases, share, limit_s)


def check(monkeypatch: pytest.MonkeyPatch, out: Path, *parts: Part, minutes: float = 2.0) -> tuple[int, Content]:
    """Exit code and content of a dry run of these parts."""
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    code = gpu_check.main(["--out", str(out), "--dry_run", "--minutes", str(minutes)])
    return code, json.loads((out / "gpu_check.json").read_text())


def cases_of(content: Content, part: str) -> dict[str, dict[str, Any]]:
    return content["parts"][part]["cases"]


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# --- parts that fail ------------------------------------------------------------------------------------------------


def test_a_case_that_raises_is_recorded_and_the_same_process_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, content = check(monkeypatch, tmp_path / "out", faulty("a", "raises", "fine"))
    raised, fine = cases_of(content, "a").values()
    assert code == 1
    assert (raised["status"], raised["why"]) == ("failed", "RuntimeError: this case raises")
    assert fine["status"] == "measured"
    assert raised["rows"][0]["pid"] == fine["rows"][0]["pid"]


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("killed", "ended by SIGSEGV: the last that it said"),
        ("leaves", "ended with exit code 1: this case leaves"),
    ],
)
def test_a_process_that_dies_costs_the_case_that_it_was_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str, why: str
) -> None:
    parts = (faulty("a", "fine first", case, "fine then"), faulty("b", "fine"))
    code, content = check(monkeypatch, tmp_path / "out", *parts)
    before, died, after = cases_of(content, "a").values()
    assert code == 1
    assert (died["status"], died["why"]) == ("failed", why)
    assert [row["what"] for row in died["rows"]] == [case]  # what it had measured
    assert (before["status"], after["status"]) == ("measured", "measured")
    assert before["rows"][0]["pid"] != after["rows"][0]["pid"]
    assert cases_of(content, "b")["fine"]["status"] == "measured"
    assert content["status"] == "finished"


def test_a_process_that_lost_its_gpu_hands_the_other_cases_to_a_new_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, content = check(monkeypatch, tmp_path / "out", faulty("a", "loses", "fine"))
    lost, fine = cases_of(content, "a").values()
    assert (lost["status"], fine["status"]) == ("failed", "measured")
    assert lost["why"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert lost["rows"][0]["pid"] != fine["rows"][0]["pid"]


def test_what_a_dead_process_started_ends_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, content = check(monkeypatch, tmp_path / "out", faulty("a", "orphans"))
    died = cases_of(content, "a")["orphans"]
    assert died["why"].startswith("ended by SIGKILL")
    assert len(died["rows"]) == 2
    assert all(is_gone(row["pid"]) for row in died["rows"])


def test_a_case_that_hangs_is_ended_with_all_that_it_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    part = faulty("a", "hangs", "fine", limit_s=1.5)
    code, content = check(monkeypatch, tmp_path / "out", part, faulty("b", "fine"))
    hung, fine = cases_of(content, "a").values()
    assert code == 1
    assert (hung["status"], hung["why"]) == ("failed", "took longer than 2 s and was ended")
    assert len(hung["rows"]) == 2
    assert all(is_gone(row["pid"]) for row in hung["rows"])
    assert fine["status"] == "measured"
    assert cases_of(content, "b")["fine"]["status"] == "measured"


def test_a_part_that_cannot_be_imported_fails_once_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, content = check(monkeypatch, tmp_path / "out", faulty("a", "x", "y", function="nowhere"), faulty("b", "fine"))
    assert code == 1
    for case in cases_of(content, "a").values():
        assert case["status"] == "failed"
        assert "has no attribute 'nowhere'" in case["why"]
    assert (tmp_path / "out" / "logs" / "a.err").read_text().count("Traceback") == 1
    assert cases_of(content, "b")["fine"]["status"] == "measured"


def test_a_row_that_failed_fails_its_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, content = check(monkeypatch, tmp_path / "out", faulty("a", "wrong"))
    assert code == 1
    assert cases_of(content, "a")["wrong"]["status"] == "failed"
    assert "failed: it is wrong" in (tmp_path / "out" / "gpu_check.md").read_text()


def test_a_row_that_is_absent_is_no_failure_and_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, content = check(monkeypatch, tmp_path / "out", faulty("a", "elsewhere"))
    assert code == 0
    assert cases_of(content, "a")["elsewhere"]["status"] == "measured"
    assert "not measured: it is elsewhere" in (tmp_path / "out" / "gpu_check.md").read_text()


# --- time and interrupts --------------------------------------------------------------------------------------------


def test_what_the_time_does_not_reach_is_recorded_as_not_reached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_check, "RESERVE_S", 0.0)
    parts = (faulty("a", "hangs", "fine"), faulty("b", "fine", share=2.0))
    code, content = check(monkeypatch, tmp_path / "out", *parts, minutes=0.2)
    hung, fine = cases_of(content, "a").values()
    assert code == 1
    assert (hung["status"], hung["why"]) == ("not reached", "the time of the part ended after these rows")
    assert (fine["status"], fine["why"]) == ("not reached", "the time of the part ended")
    assert all(is_gone(row["pid"]) for row in hung["rows"])
    assert cases_of(content, "b")["fine"]["status"] == "measured"  # its own share was kept for it


def test_a_check_without_time_reaches_nothing_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, content = check(monkeypatch, tmp_path / "out", faulty("a", "fine"), minutes=0.01)
    assert code == 1
    assert cases_of(content, "a")["fine"]["status"] == "not reached"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_check_leaves_what_was_measured_and_no_process(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    script = f"""
import sys
from tests.unit.test_gpu_check import faulty, gpu_check
gpu_check.PARTS = (faulty("a", "fine", "hangs", "fine too"), faulty("b", "fine"))
sys.exit(gpu_check.main(["--out", {str(out)!r}, "--dry_run"]))
"""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    variables = {**os.environ, "TMPDIR": str(temporary)}
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, cwd=REPO_ROOT, env=variables, stderr=subprocess.PIPE, text=True)
    path = out / "gpu_check.json"
    hung: list[dict[str, Any]] = []
    until = time.monotonic() + 60
    while len(hung) < 2 and time.monotonic() < until:
        time.sleep(0.1)
        if path.exists():
            hung = cases_of(json.loads(path.read_text()), "a")["hangs"]["rows"]
    assert len(hung) == 2
    process.send_signal(number)
    process.send_signal(signal.SIGTERM)  # someone is impatient
    _, said = process.communicate(timeout=30)
    content = json.loads(path.read_text())
    assert process.returncode == 1
    assert said in (f"{number.name}: ended\n", "SIGTERM: ended\n")
    assert list(temporary.iterdir()) == []
    assert content["status"] == "interrupted"
    statuses = {name: case["status"] for name, case in cases_of(content, "a").items()}
    assert statuses == {"fine": "measured", "hangs": "not reached", "fine too": "not reached"}
    assert cases_of(content, "a")["hangs"]["why"] == "the check was interrupted during it"
    assert content["parts"]["b"]["status"] == "not reached"
    assert all(is_gone(row["pid"]) for row in hung)


def test_a_killed_check_takes_the_process_of_its_part_with_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = f"""
from tests.unit.test_gpu_check import faulty, gpu_check
gpu_check.PARTS = (faulty("a", "hangs"),)
gpu_check.main(["--out", {str(out)!r}, "--dry_run"])
"""
    variables = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=REPO_ROOT, env=variables)
    hung: list[dict[str, Any]] = []
    until = time.monotonic() + 60
    while len(hung) < 2 and time.monotonic() < until:
        time.sleep(0.1)
        if (out / "gpu_check.json").exists():
            hung = cases_of(json.loads((out / "gpu_check.json").read_text()), "a")["hangs"]["rows"]
    process.kill()
    process.wait()
    os.kill(hung[1]["pid"], signal.SIGKILL)  # what the part started itself has no such tie
    until = time.monotonic() + 10
    while not is_gone(hung[0]["pid"]) and time.monotonic() < until:
        time.sleep(0.05)
    assert is_gone(hung[0]["pid"])
    assert cases_of(json.loads((out / "gpu_check.json").read_text()), "a")["hangs"]["status"] == "running"


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--parts", "gem"], "--parts gem: no such part. Use environment, tests, gemm"),
        (["--minutes", "0"], "--minutes 0.0: not a time to measure in"),
        (["--cases", "x*"], "--cases 'x*': matches no case"),
        (["--commit", "main"], "--commit main: not 40 hexadecimal digits"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as exit_of_check:
        sys.exit(gpu_check.main(["--out", str(out), "--dry_run", *arguments]))
    said = capsys.readouterr().err
    assert exit_of_check.value.code == 2
    assert said.count("\n") == 1
    assert line in said
    assert not out.exists()


def test_a_machine_without_a_driver_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "has_driver", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("ConfigError: this machine has no NVIDIA driver")
    assert not (tmp_path / "out").exists()


def test_a_torch_that_sees_no_gpu_is_refused_and_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "has_driver", lambda: True)
    monkeypatch.setattr(gpu_check, "PARTS", (faulty("environment", "gpu", function="no_gpu"), faulty("a", "fine")))
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "ConfigError: torch sees no GPU on this machine. Use another machine or torch, or --dry_run.\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("found", [{}, {"commit": "b" * 40, "dirty": False}])
def test_a_copy_without_git_has_the_commit_that_is_stated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], found: dict[str, Any]
) -> None:
    for module in (gpu_check, results):
        monkeypatch.setattr(module, "describe_checkout", lambda _: found)
    monkeypatch.setattr(gpu_check, "PARTS", (faulty("a", "fine"),))
    code = gpu_check.main(["--out", str(tmp_path / "out"), "--dry_run", "--commit", "a" * 40])
    if found:
        assert code == 2
        assert "--commit: this is a git checkout" in capsys.readouterr().err
        return
    assert code == 0
    env = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["env"]
    assert (env["commit"], env["commit_stated"]) == ("a" * 40, True)
    assert "Commit aaaaaaaaaa (as stated with --commit), " in (tmp_path / "out" / "gpu_check.md").read_text()


def test_results_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gpu_check.json").write_text("{}")
    assert gpu_check.main(["--out", str(tmp_path), "--dry_run"]) == 2
    assert "is there and not an empty folder" in capsys.readouterr().err


# --- targets --------------------------------------------------------------------------------------------------------


def content_of(dry_run: bool = False, **parts: dict[str, list[dict[str, Any]]]) -> Content:
    """Results with these rows in these cases of these parts, all measured."""
    return {
        "dry_run": dry_run,
        "parts": {
            part: {"cases": {name: {"status": "measured", "rows": rows} for name, rows in cases.items()}}
            for part, cases in parts.items()
        },
    }


def leg(name: str, dt_ms: float, blocks: list[float], **more: Any) -> dict[str, list[dict[str, Any]]]:
    return {name: [{"what": name, "dt_ms": dt_ms, "dt_ms_blocks": blocks, **more}]}


def judged(content: Content, number: int) -> dict[str, Any]:
    return next(each for each in targets.judge(content) if each["number"] == number)


@pytest.mark.parametrize(
    "content",
    [
        content_of(),
        content_of(dry_run=True, gemm={"rates seed": [{"what": "fp8 3d-3d", "speed_over_bf16": 2.0}]}),
        content_of(gemm={"rates seed": [{"what": "fp8 3d-3d", "error": "no such kernel"}]}),
    ],
    ids=["nothing was asked for", "dry run", "an operator is missing"],
)
def test_every_target_has_a_row_which_says_why_nothing_was_measured(content: Content) -> None:
    found = targets.judge(content)
    assert sorted({each["number"] for each in found}) == list(range(1, 12))
    for each in found:
        assert each["measured"].startswith("not measured: ")
        assert len(each["measured"]) > len("not measured: ")
        assert "verdict" not in each
        assert "x" not in each["measured"].split()


def test_the_reason_is_that_of_the_row_or_of_its_case() -> None:
    content = content_of(gemm={"rates seed": [{"what": "fp8 3d-3d", "error": "no such kernel"}]})
    assert "rates seed, fp8 3d-3d: no such kernel" in judged(content, 1)["measured"]
    case = {"status": "failed", "why": "ended by SIGSEGV: it said nothing", "rows": []}
    content["parts"]["gemm"]["cases"]["rates seed"] = case
    assert "failed: ended by SIGSEGV: it said nothing" in judged(content, 1)["measured"]


def test_a_target_is_met_by_the_better_of_two_ways() -> None:
    rows = [{"what": "fp8 3d-3d", "speed_over_bf16": 1.3}, {"what": "fp8 2d-3d", "speed_over_bf16": 1.5}]
    found = judged(content_of(gemm={"rates seed": rows}), 1)
    assert (found["measured"], found["verdict"]) == ("3d-3d 1.300x, 2d-3d 1.500x", "met")
    found = judged(content_of(gemm={"rates seed": rows[:1]}), 1)
    assert (found["measured"], found["verdict"]) == ("3d-3d 1.300x", "missed")


@pytest.mark.parametrize("missing", ["bf16", "fp8_experts"])
def test_no_ratio_of_steps_without_both_sides(missing: str) -> None:
    steps = leg("bf16", 110.0, [109.0, 110.0, 111.0]) | leg("fp8_experts", 100.0, [99.0, 100.0, 101.0])
    found = judged(content_of(steps=steps), 5)
    assert found["measured"] == "fp8_experts 1.100x [1.079, 1.121]"
    assert found["verdict"] == "met"
    del steps[missing]
    found = judged(content_of(steps=steps), 5)
    assert found["measured"].startswith(f"not measured: steps, {missing}: was not asked for")


def test_a_ratio_whose_interval_holds_its_target_is_undecided() -> None:
    steps = leg("bf16", 105.0, [103.0, 105.0]) | leg("fp8_experts", 100.0, [100.0, 100.0])
    assert judged(content_of(steps=steps), 5)["verdict"] == "undecided"
    assert judged(content_of(steps=steps | leg("bf16_again", 102.0, [102.0])), 5)["measured"].endswith("[1.020, 1.050]")


def test_loss_is_judged_against_the_distance_of_bf16_from_itself() -> None:
    facts = {"steps": 300, "data": "synthetic"}
    loss = {
        name: [{"what": name, **facts, "mean_last50_loss": value}]
        for name, value in (("bf16", 3.0), ("fp8_experts", 3.01))
    }
    assert judged(content_of(loss=loss), 9)["measured"].startswith("300 steps, data synthetic: bf16 3.0000")
    assert judged(content_of(loss=loss), 9)["verdict"] == "undecided"  # nothing to judge by
    again = {"bf16_again": [{"what": "bf16_again", "mean_last50_loss": 3.02}]}
    assert judged(content_of(loss=loss | again), 9)["verdict"] == "met"
    again["bf16_again"][0]["mean_last50_loss"] = 3.005
    assert judged(content_of(loss=loss | again), 9)["verdict"] == "missed"


def test_the_slowest_cast_counts_and_each_by_its_faster_form() -> None:
    rows = [{"what": what, "implementation": "torch, compiled", "gb_per_s": 2000.0} for what in RELU2_CASTS]
    triton = {"implementation": "triton", "gb_per_s": 3500.0, "bytes_differing": 0}
    rows += [{"what": what, **triton} for what in RELU2_CASTS[1:]]
    found = judged(
        content_of(casts={f"seed {cast}": [row for row in rows if row["what"] == cast] for cast in RELU2_CASTS}), 2
    )
    assert found["measured"] == "2.00 (quantize_rows x) to 3.50 TB/s"
    assert found["verdict"] == "missed"


def test_a_triton_cast_with_other_bytes_than_torch_has_no_speed() -> None:
    row = {
        "implementation": "triton",
        "gb_per_s": 3500.0,
        "bytes": "2% differ from plain torch's",
        "bytes_differing": 9,
    }
    content = content_of(casts={f"seed {what}": [{"what": what, **row}] for what in RELU2_CASTS})
    found = judged(content, 2)
    assert "verdict" not in found
    assert "quantize_rows x: Triton's bytes: 2% differ" in found["measured"]
    for case in content["parts"]["casts"]["cases"].values():
        del case["rows"][0]["bytes_differing"]  # not compared, for want of memory
    assert "verdict" not in judged(content, 2)
    for case in content["parts"]["casts"]["cases"].values():
        case["rows"][0]["bytes_differing"] = 0
    assert judged(content, 2)["verdict"] == "met"


def test_seconds_of_compiling_count_only_from_an_empty_cache() -> None:
    steps = {
        name: [{"what": name, "compile_s": 40.0, "inductor_cache": "empty", "launch_to_first_step_s": 95.0}]
        for name in ("bf16", "fp8_experts")
    }
    tens = [each for each in targets.judge(content_of(steps=steps)) if each["number"] == 10]
    assert [each.get("verdict") for each in tens] == [None, "met", "missed"]
    steps["fp8_experts"][0]["inductor_cache"] = "warm"
    tens = [each for each in targets.judge(content_of(steps=steps)) if each["number"] == 10]
    assert "did not begin with an empty cache" in tens[1]["measured"]


# --- rows -----------------------------------------------------------------------------------------------------------


def test_a_row_of_a_dry_run_has_no_figure_of_speed() -> None:
    row = dict.fromkeys(MEASURED, 1.0) | {"what": "a product", "right": True}
    assert presentable(row, dry_run=True) == {"what": "a product", "right": True, "note": DRY}
    assert presentable(row, dry_run=False) == row


def test_what_is_not_a_number_is_written_by_its_name() -> None:
    row = {"relative_error": float("nan"), "deep": {"list": [float("inf"), 1.0]}, "mfu": None}
    assert presentable(row, dry_run=False) == {"relative_error": "nan", "deep": {"list": ["inf", 1.0]}}
    assert json.dumps(presentable(row, dry_run=False), allow_nan=False)


def test_the_speed_of_a_block_is_that_within_rounds() -> None:
    row = {"block": "ours/fp8+static", "ms_median": 2.0, "ms_iqr": 0.1, "ms_rounds": [2.0, 4.0, 1.0],
           "steps_per_sample": 20, "tflops": 1.0}  # fmt: skip
    base = {**row, "block": blocks.BASE, "ms_rounds": [3.0, 8.0, 1.0]}
    assert blocks.from_bench(row, base)["speed_over_bf16"] == 1.5
    assert "speed_over_bf16" not in blocks.from_bench(base, base)
    assert "speed_over_bf16" not in blocks.from_bench(row, {"block": blocks.BASE, "error": "no"})
    assert "speed_over_bf16" not in blocks.from_bench(row, None)


def test_committed_checks_are_measurements_from_clean_checkouts_with_the_table_that_they_make() -> None:
    for path in (REPO_ROOT / "benchmarks").glob("gpu_check_*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert (content["schema"], content["dry_run"]) == (1, False), path
        assert content["env"].get("dirty") is False or "commit_stated" in content["env"], path
        assert path.with_suffix(".md").read_text(encoding="utf-8") == markdown(content), path


def test_the_table_is_made_from_the_file_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, content = check(monkeypatch, tmp_path / "out", faulty("a", "fine", "raises"))
    assert (tmp_path / "out" / "gpu_check.md").read_text() == markdown(content)


# --- the tables of what is run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["steps", "loss", "profile"])
def test_every_leg_is_a_run_that_is_not_refused(part: str) -> None:
    for case in next(each for each in PARTS if each.name == part).cases:
        config, assignments = legs.run_of(part, case, dry_run=False)
        run = load_run(config, assignments)
        assert (run.deepspeed["bf16"]["enabled"], run.train_batch_size) == (True, legs.BATCH[part])
        assert run.fp8.enabled == ("fp8" in case or "torchao" in case)
        assert (run.fp8.enabled and run.fp8.experts) == (run.fp8.enabled and "without_experts" not in case)
        assert (run.deepspeed["optimizer"]["type"] == "AdamW") == case.startswith("adamw")
        assert (run.model.moe is None) == (case == "dense")


def test_legs_and_cases_name_each_other() -> None:
    named = {case for part in PARTS if part.name in legs.BATCH for case in part.cases}
    assert named == set(legs.LEGS)
    assert set(STEP_CASES) <= named


def test_the_files_of_gpu_tests_are_the_cases_of_their_part() -> None:
    assert sorted(GPU_TESTS) == sorted(path.name for path in TESTS.glob("test_*.py"))


def test_a_test_that_loses_the_gpu_hands_the_other_files_to_a_new_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "test_one.py").write_text(
        "import pytest\n\n@pytest.mark.gpu\ndef test_it() -> None:\n    assert False\n"
    )
    monkeypatch.setattr(gpu_tests, "TESTS", tmp_path)
    rows: list[dict[str, Any]] = []
    context = Context(True, tmp_path, tmp_path, rows.append)
    gpu_tests.gpu_tests("test_one.py", context)
    assert [row["outcome"] for row in rows] == ["failed"]
    monkeypatch.setattr(gpu_tests, "device_answers", lambda: False)
    with pytest.raises(RuntimeError, match="without its GPU"):
        gpu_tests.gpu_tests("test_one.py", context)


def test_the_blocks_have_the_shapes_of_the_experts() -> None:
    asked = [
        f"T{E * C // TOP_K.get(name, 2)},D{K},F{N},E{E},k{TOP_K.get(name, 2)}" for name, (E, C, K, N) in SHAPES.items()
    ]
    assert parse_shapes(asked) == SETS["gpu"]


def test_every_part_has_cases_for_a_dry_run_and_a_share_of_the_time() -> None:
    for part in PARTS:
        assert part.dry_cases
        assert set(part.dry_cases) <= set(part.cases)
        assert len(set(part.cases)) == len(part.cases)
        assert part.share > 0


def test_the_table_counts_tests_that_pass_and_names_those_that_fail() -> None:
    rows = [
        {"what": "test_a", "outcome": "passed", "seconds": 1.0},
        {"what": "test_b", "outcome": "failed", "seconds": 1.0, "error": "off by one"},
        {"what": "test_c", "outcome": "passed", "seconds": 1.0},
    ]
    case = {"status": "not reached", "why": "the time of the part ended after these rows", "rows": rows}
    text = "\n".join(section({"status": "not reached", "cases": {"test_file.py": case}}))
    assert "* test_file.py: 2 passed, 1 failed" in text
    assert "test_a" not in text
    assert "test_b" in text
    assert "off by one" in text
