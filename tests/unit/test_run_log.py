"""The run folder's files and the figures in them. W&B itself is tested in tests/integration/test_wandb.py."""

import json
import math
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from launch.run_config import REPO_ROOT, Run, load_run
from launch.run_dir import decide_beginning
from launch.run_log import RunLog, readable_line, tail_figures, thousands

STEPS, TOKENS_PER_STEP, RANKS, FLOPS_PER_TOKEN, PEAK = 10, 1000, 2, 10**9, 1e12


@pytest.fixture
def run() -> Run:
    return load_run(REPO_ROOT / "ds_configs" / "moe_tiny.json")  # W&B is disabled in this file


def open_log(run_dir: Path, run: Run, resumed_step: int = 0, **changed: object) -> RunLog:
    options = {"total_steps": STEPS, "enabled": True, "environment": {"started": "now", "launch_line": "train.py"}}
    return RunLog(run_dir, run, resumed_step=resumed_step, **{**options, **changed})  # type: ignore[arg-type]


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def logged(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_fresh_folder_holds_the_resolved_file_the_environment_and_a_running_summary(tmp_path: Path, run: Run) -> None:
    open_log(tmp_path / "a" / "run", run)
    folder = tmp_path / "a" / "run"
    assert read(folder / "config.json") == run.resolved
    assert (
        read(folder / "env.json").items() >= {"started": "now", "config_hash": run.config_hash, "attempts": []}.items()
    )
    summary = read(folder / "summary.json")
    assert summary["status"] == "running"
    assert "total_time_min" not in summary  # not measured yet
    assert decide_beginning(folder, run.config_hash, "auto").action == "fresh"


def test_other_ranks_write_and_print_nothing(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path / "run", run, enabled=False)
    log.say("hello")
    log.log(1, {"train/loss": 1.0})
    log.progress(2)
    log.finish("completed", "done", {})
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_metrics_are_one_object_per_logged_step_and_readable_while_the_run_goes_on(tmp_path: Path, run: Run) -> None:
    log = open_log(tmp_path, run)
    log.log(1, {"train/loss": 5.0, "train/tokens": 256})
    log.progress(2)
    log.log(3, {"train/loss": 4.0})
    assert logged(tmp_path) == [{"step": 1, "train/loss": 5.0, "train/tokens": 256}, {"step": 3, "train/loss": 4.0}]


def test_logging_a_step_again_adds_to_its_line(tmp_path: Path, run: Run) -> None:
    log = open_log(tmp_path, run)
    log.log(1, {"train/loss": 5.0})
    log.log(2, {"train/loss": 4.0})
    log.log(2, {"val/loss": 4.5})
    assert logged(tmp_path) == [{"step": 1, "train/loss": 5.0}, {"step": 2, "train/loss": 4.0, "val/loss": 4.5}]


def test_a_step_that_goes_back_is_refused(tmp_path: Path, run: Run) -> None:
    log = open_log(tmp_path, run)
    log.log(2, {"train/loss": 5.0})
    with pytest.raises(ValueError, match="step 1 logged after step 2"):
        log.log(1, {"train/loss": 4.0})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null_in_metrics_and_absent_from_the_summary(
    tmp_path: Path, run: Run, value: float
) -> None:
    log = open_log(tmp_path, run)
    log.log(1, {"train/loss": value})
    log.finish("nan", "train/loss at step 1", {"train/loss": value})
    assert logged(tmp_path) == [{"step": 1, "train/loss": None}]
    assert "train/loss" not in read(tmp_path / "summary.json")


def test_resuming_drops_the_steps_after_the_checkpoint_so_that_none_stands_twice(tmp_path: Path, run: Run) -> None:
    first = open_log(tmp_path, run)
    for step in (0, 2, 4, 6):
        first.log(step, {"train/loss": float(step)})
    second = open_log(tmp_path, run, resumed_step=4)
    assert [line["step"] for line in logged(tmp_path)] == [0, 2, 4]
    second.log(4, {"val/loss": 1.0})
    second.log(6, {"train/loss": 0.5})
    assert logged(tmp_path)[2:] == [{"step": 4, "train/loss": 4.0, "val/loss": 1.0}, {"step": 6, "train/loss": 0.5}]


def test_starting_over_without_a_checkpoint_drops_every_step(tmp_path: Path, run: Run) -> None:
    open_log(tmp_path, run).log(0, {"val/loss": 9.0})
    open_log(tmp_path, run).log(0, {"val/loss": 9.0})
    assert logged(tmp_path) == [{"step": 0, "val/loss": 9.0}]


def test_half_a_line_left_by_a_killed_process_is_dropped_on_resume(tmp_path: Path, run: Run) -> None:
    open_log(tmp_path, run).log(2, {"train/loss": 5.0})
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 3, "train/lo')
    open_log(tmp_path, run, resumed_step=3).log(4, {"train/loss": 4.0})
    assert [line["step"] for line in logged(tmp_path)] == [2, 4]


def test_resuming_keeps_the_first_environment_and_lists_later_attempts(tmp_path: Path, run: Run) -> None:
    open_log(tmp_path, run, environment={"started": "monday"})
    first = read(tmp_path / "env.json")
    open_log(tmp_path, run, resumed_step=2, environment={"started": "tuesday"})
    env = read(tmp_path / "env.json")
    assert (env["started"], env["wandb_id"], env["config_hash"]) == ("monday", first["wandb_id"], run.config_hash)
    assert [attempt["started"] for attempt in env["attempts"]] == ["tuesday"]


def test_the_summary_leaves_out_what_was_not_measured(tmp_path: Path, run: Run) -> None:
    log = open_log(tmp_path, run)
    log.log(3, {"train/loss": 4.0})
    log.finish("completed", "done", {"tail50_mfu": None, "peak_mem_mib": 12.5, "parameters": {"total": 7}})
    summary = read(tmp_path / "summary.json")
    assert summary.items() >= {
        "status": "completed", "reason": "done", "step": 3, "peak_mem_mib": 12.5, "parameters": {"total": 7},
        "config_hash": run.config_hash,
    }.items()  # fmt: skip
    assert "tail50_mfu" not in summary
    assert summary["started"] <= summary["ended"]
    assert decide_beginning(tmp_path, run.config_hash, "auto").action == "completed"


def test_total_time_adds_up_over_the_attempts_of_a_run(tmp_path: Path, run: Run) -> None:
    open_log(tmp_path, run).finish("stopped", "asked", {})
    summary = read(tmp_path / "summary.json")
    (tmp_path / "summary.json").write_text(json.dumps({**summary, "total_time_min": 100.0}))
    log = open_log(tmp_path, run, resumed_step=2)
    assert read(tmp_path / "summary.json")["total_time_min"] == 100.0  # what a crash would leave
    log.finish("completed", "done", {})
    assert 100.0 < read(tmp_path / "summary.json")["total_time_min"] < 101.0


@pytest.mark.parametrize(("steps_now", "kept"), [(3, 12), (0, 12), (12, 12), (20, 20)])
def test_a_tail_of_few_steps_after_a_break_does_not_replace_a_longer_one(
    tmp_path: Path, run: Run, steps_now: int, kept: int
) -> None:
    open_log(tmp_path, run).finish("stopped", "asked", {"tail_steps": 12, "tail50_tok_per_sec": 12.0})
    now = {"tail_steps": steps_now, "tail50_tok_per_sec": 5.0} if steps_now else {}
    open_log(tmp_path, run, resumed_step=2).finish("completed", "done", now)
    summary = read(tmp_path / "summary.json")
    assert (summary["tail_steps"], summary["tail50_tok_per_sec"]) == (kept, 12.0 if steps_now < 12 else 5.0)


def test_a_run_that_begins_again_keeps_nothing_of_an_earlier_tail(tmp_path: Path, run: Run) -> None:
    open_log(tmp_path, run).finish("failed", "no reason", {"tail_steps": 12, "tail50_tok_per_sec": 12.0})
    open_log(tmp_path, run).finish("completed", "done", {})
    assert "tail_steps" not in read(tmp_path / "summary.json")


def test_the_time_of_an_attempt_that_nobody_saw_end_counts_until_its_last_line(tmp_path: Path, run: Run) -> None:
    open_log(tmp_path, run).log(1, {"train/loss": 5.0})
    summary = read(tmp_path / "summary.json")
    began = (datetime.fromisoformat(summary["started"]) - timedelta(minutes=30)).isoformat()
    (tmp_path / "summary.json").write_text(json.dumps({**summary, "started": began, "total_time_min": 100.0}))
    open_log(tmp_path, run, resumed_step=1).finish("completed", "done", {})
    assert 130.0 < read(tmp_path / "summary.json")["total_time_min"] < 131.0


def test_each_attempt_has_its_own_start_by_which_its_summary_is_known(tmp_path: Path, run: Run) -> None:
    open_log(tmp_path, run)
    first = read(tmp_path / "summary.json")["started"]
    open_log(tmp_path, run, resumed_step=2)
    assert read(tmp_path / "summary.json")["started"] != first


def test_what_is_said_is_printed_and_kept_over_attempts(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    open_log(tmp_path, run).say("one")
    log = open_log(tmp_path, run, resumed_step=1)
    log.say("two")
    log.log(2, {"train/loss": 5.1234})
    expected = "one\ntwo\nstep 2/10 | loss 5.123\n"
    assert (tmp_path / "log.txt").read_text() == expected
    assert capsys.readouterr().out == expected


def test_on_a_terminal_a_bar_stands_for_the_lines_and_validation_is_still_printed(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    log = open_log(tmp_path, run, resumed_step=4)
    log.log(5, {"train/loss": 5.0, "train/tok_per_sec": 16000.0})
    log.progress(7)
    assert log.bar is not None
    assert log.bar.n == 7
    assert "loss=5.000, tok/s=16.0k" in str(log.bar)
    log.log(8, {"val/loss": 4.0})
    log.finish("completed", "done", {})
    printed = capsys.readouterr().out
    assert "step 8/10 | val loss 4.000" in printed
    assert "step 5/10" not in printed
    assert "step 5/10 | loss 5.000" in (tmp_path / "log.txt").read_text()


class BrokenWandb:
    """A W&B run whose service is gone."""

    def log(self, metrics: dict, step: int) -> None:
        raise ConnectionResetError("Connection lost")


def test_wandb_is_off_after_its_first_failure_and_the_reason_is_said_once(tmp_path: Path, run: Run) -> None:
    log = open_log(tmp_path, run)
    log.wandb.run = BrokenWandb()
    for step in range(3):
        log.log(step, {"train/loss": 5.0})
    log.finish("completed", "done", {})
    text = (tmp_path / "log.txt").read_text()
    assert text.count("W&B is off from here: ConnectionResetError: Connection lost") == 1
    assert len(logged(tmp_path)) == 3


def test_a_line_shows_what_was_measured_and_nothing_else() -> None:
    metrics = {
        "train/loss": 5.1234, "train/aux_loss": 1.0123, "train/lr": 4e-3, "train/grad_norm": 1.234,
        "train/dt_ms": 512.3, "train/tok_per_sec": 16000.0, "train/mfu": 41.23, "train/tokens": 99.0,
    }  # fmt: skip
    expected = "step 20/200 | loss 5.123 | aux 1.01 | lr 4.0e-03 | grad 1.23 | dt 512 ms | 16.0k tok/s | mfu 41.2%"
    assert readable_line(20, 200, metrics) == expected
    assert readable_line(20, 200, {"val/bpb": 1.5}) == "step 20/200 | val bpb 1.5000"


@pytest.mark.parametrize(("value", "text"), [(870.4, "870"), (16000.0, "16.0k"), (1_310_000.0, "1.31M")])
def test_large_numbers_are_shown_short(value: float, text: str) -> None:
    assert thousands(value) == text


def test_tail_throughput_is_tokens_over_the_sum_of_the_times_not_the_mean_of_rates() -> None:
    figures = tail_figures([1.0, 3.0], TOKENS_PER_STEP, RANKS, FLOPS_PER_TOKEN, PEAK)
    assert figures == {
        "tail_steps": 2,
        "tail50_tok_per_sec": 500.0,  # 2000 tokens in 4 seconds; the mean of the rates would be 667
        "tail50_tok_per_sec_per_gpu": 250.0,
        "tail50_dt_ms": 2000.0,
        "tail50_step_ms": [1000.0, 3000.0],
        "tail50_mfu": 25.0,  # 250 tokens/s of 1 GFLOP on 1 TFLOP/s
    }


def test_the_tail_is_the_last_fifty_steps() -> None:
    figures = tail_figures([100.0] * 5 + [1.0] * 50, TOKENS_PER_STEP, RANKS, FLOPS_PER_TOKEN, PEAK)
    assert (figures["tail_steps"], figures["tail50_dt_ms"]) == (50, 1000.0)


def test_mfu_is_absent_where_the_peak_is_unknown() -> None:
    assert "tail50_mfu" not in tail_figures([1.0], TOKENS_PER_STEP, RANKS, FLOPS_PER_TOKEN, None)


def test_no_measured_step_gives_no_figure() -> None:
    assert tail_figures([], TOKENS_PER_STEP, RANKS, FLOPS_PER_TOKEN, PEAK) == {}
