"""Real runs of two ranks that are asked to stop, or lose what they hang from, or hang: how each ends.

`python -m tests.launcher_table` measures all signals to all processes; here are those that are unlike each other.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from launcher_table import ENDLESS, HELD_TRAIN, PATIENCE, TINY, Case, Started, outcome_of

from launch.run_config import REPO_ROOT
from launch.run_dir import checkpoint_name

STOP_SECONDS = 30  # what is promised
BATCHES = 16  # of a validation on synthetic data, on each of two ranks


@pytest.mark.parametrize(
    ("case", "code"),
    [
        (Case("deepspeed", signal.SIGTERM, "deepspeed"), -15),
    ],
    ids=str,
)
def test_a_run_that_is_asked_or_left_alone_saves_its_last_step_and_stops(case: Case, code: int, tmp_path: Path) -> None:
    outcome = outcome_of(case, tmp_path)
    assert (outcome.status, outcome.saved, outcome.code, outcome.orphans) == ("stopped", True, code, 0), outcome


def test_a_rank_that_is_killed_is_no_request_to_stop(tmp_path: Path) -> None:
    outcome = outcome_of(Case("launch.run", signal.SIGKILL, "rank 1"), tmp_path)
    assert (outcome.status, outcome.saved, outcome.code, outcome.orphans) == ("failed", False, 4, 0), outcome
    assert outcome.reason.startswith("a rank ended without a word")


def test_a_terminal_that_is_closed_asks_for_a_stop(tmp_path: Path) -> None:
    """Nothing can be printed then, by launch.run or the ranks."""
    run_dir = tmp_path / "run"
    process, terminal = pty.fork()
    if process == 0:
        os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "launch.run", str(TINY), "--run_dir", str(run_dir), "--set", *ENDLESS]
        os.chdir(REPO_ROOT)
        os.execv(sys.executable, command)
    os.set_blocking(terminal, False)
    deadline = time.monotonic() + PATIENCE
    while not (run_dir / "metrics.jsonl").is_file() or len(metrics(run_dir)) < 4:
        assert time.monotonic() < deadline
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 65536)  # lest a full terminal holds the run up
        time.sleep(0.1)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 3
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert (run_dir / "checkpoints" / "latest").read_text() == checkpoint_name(summary["step"])


def test_a_rank_knows_its_launch_run_however_that_was_started(tmp_path: Path) -> None:
    """A profiler, a debugger, `python -um launch.run`: no command line that launchers are known by."""
    arguments = [str(TINY), "--run_dir", str(tmp_path / "run"), "--set", "run.train.num_steps=2"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-um", "launch.run", *arguments]
    done = subprocess.run(command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def held(rank: int, phase: str, nth: int, seconds: float, folder: Path) -> dict[str, str]:
    return {"HOLD": f"{rank}|{phase}|{nth}|{seconds}", "HOLD_NOTES": str(folder)}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("launcher", ["deepspeed"])
def test_a_stop_while_the_first_step_compiles_loses_nothing_and_waits_for_nobody(launcher: str, tmp_path: Path) -> None:
    hold = held(1, "backward", 1, 300, tmp_path)
    with Started(launcher, tmp_path, *ENDLESS, script=HELD_TRAIN, **hold) as run:
        run.await_file(tmp_path / "held1")
        run.send(signal.SIGTERM, "rank 1")
        outcome = run.end()
    assert (outcome.status, outcome.saved, outcome.orphans) == ("stopped", True, 0), outcome
    assert outcome.reason.startswith("SIGTERM to rank 1, in '")
    assert outcome.seconds < STOP_SECONDS
    assert run.summary()["step"] == 0


def test_a_stop_during_a_save_ends_with_a_newer_one(tmp_path: Path) -> None:
    hold = held(0, "save: rename", 2, 3, tmp_path)  # the first is that of step 0
    with Started("launch.run", tmp_path, *ENDLESS, "run.train.save_every=2", script=HELD_TRAIN, **hold) as run:
        run.await_file(tmp_path / "held0")
        run.send(signal.SIGTERM, "launch.run")
        outcome = run.end()
    assert (outcome.status, outcome.code, outcome.saved, outcome.orphans) == ("stopped", 3, True, 0), outcome
    assert outcome.seconds < STOP_SECONDS
    assert run.summary()["step"] > 2


def test_a_stop_while_the_last_step_is_being_saved_waits_until_it_is_on_disk(tmp_path: Path) -> None:
    hold = held(0, "save: rename", 2, 9, tmp_path)  # longer than the watch gives the main thread
    with Started("launch.run", tmp_path, "run.train.num_steps=4", script=HELD_TRAIN, **hold) as run:
        run.await_file(tmp_path / "held0")
        run.send(signal.SIGTERM, "rank 0")
        outcome = run.end()
    assert (outcome.status, outcome.code, outcome.saved, outcome.orphans) == ("stopped", 3, True, 0), outcome
    assert run.summary()["step"] == 4


def test_a_validation_that_a_stop_cuts_short_is_done_by_who_continues(tmp_path: Path) -> None:
    settings = ("run.train.num_steps=4", "run.train.eval_every=2")
    hold = held(1, "validation", BATCHES + 2, 3, tmp_path)  # in the second batch after step 2
    with Started("launch.run", tmp_path, *settings, script=HELD_TRAIN, **hold) as run:
        run.await_file(tmp_path / "held1")
        run.send(signal.SIGTERM, "rank 0")
        outcome = run.end()
    assert (outcome.status, outcome.code, outcome.saved) == ("stopped", 3, True), outcome
    assert outcome.seconds < STOP_SECONDS
    assert run.summary()["step"] == 2
    assert ["val/loss" in line for line in metrics(run.run_dir)] == [True, False, False]
    with Started("launch.run", tmp_path, *settings) as run:
        assert run.end(patience=120).code == 0, run.printed()
    assert ["val/loss" in line for line in metrics(run.run_dir)] == [True, False, True, False, True]
    assert all("train/loss" in line for line in metrics(run.run_dir)[1:])


def test_a_rank_that_hangs_ends_the_run_with_its_stacks_and_the_run_is_started_again(tmp_path: Path) -> None:
    settings = ("run.train.num_steps=6", "run.train.save_every=2", "run.train.hang_timeout_s=6")
    hold = held(1, "backward", 5 * 2, 300, tmp_path)  # of step 5, with two micro-steps a step; on the way there
    options = ("--restarts", "1")
    with Started("launch.run", tmp_path, *settings, script=HELD_TRAIN, options=options, **hold) as run:
        outcome = run.end(patience=120)
        printed = run.printed()
    assert (outcome.status, outcome.code, outcome.orphans) == ("completed", 0, 0), printed
    assert "starting again, 1 of 1: hang (no rank got on for 6 s; not waiting in a collective: rank 1" in printed
    assert "rank 1 (in 'forward'); see rank*.stacks); from step 4" in printed
    assert "held_train.py" in (run.run_dir / "rank1.stacks").read_text()
    assert [line["step"] for line in metrics(run.run_dir)] == list(range(7))


def test_a_run_that_went_back_to_a_step_is_started_again_from_there(tmp_path: Path) -> None:
    """Its branch holds no checkpoint of its own yet, and `latest` had named one of the branch that was abandoned."""
    settings = ("run.train.num_steps=6", "run.train.save_every=2", "run.train.keep_last=9")
    with Started("launch.run", tmp_path, *settings, "run.train.stop_at_step=4") as run:
        assert run.end(patience=120).code == 3, run.printed()
    hold = held(1, "backward", 1, 300, tmp_path)
    options = ("--resume", "2", "--restarts", "1")
    with Started("launch.run", tmp_path, *settings, script=HELD_TRAIN, options=options, **hold) as run:
        run.await_file(tmp_path / "held1")
        run.send(signal.SIGKILL, "rank 1")
        outcome = run.end(patience=120)
        printed = run.printed()
    assert (outcome.status, outcome.code) == ("completed", 0), printed
    assert "; from step 2" in printed
    assert (run.run_dir / "log.txt").read_text().count("continued from step_00000002") == 2
    assert [line["step"] for line in metrics(run.run_dir)] == list(range(7))


def test_a_hung_rank_0_says_so_itself_under_plain_deepspeed(tmp_path: Path) -> None:
    hold = held(0, "update", 3, 300, tmp_path)
    with Started("deepspeed", tmp_path, *ENDLESS, "run.train.hang_timeout_s=6", script=HELD_TRAIN, **hold) as run:
        run.await_file(tmp_path / "held0")
        outcome = run.end()
    assert (outcome.status, outcome.orphans) == ("hang", 0), outcome
    assert "not waiting in a collective: rank 0 (in 'backward')" in outcome.reason
    assert outcome.seconds < STOP_SECONDS


def test_a_second_interrupt_ends_a_run_that_waits_in_a_collective(tmp_path: Path) -> None:
    hold = held(1, "backward", 3, 300, tmp_path)
    with Started("launch.run", tmp_path, *ENDLESS, script=HELD_TRAIN, **hold) as run:
        run.await_file(tmp_path / "held1")
        run.send(signal.SIGINT, "rank 0")
        time.sleep(3)
        assert len(run.left()) >= 5, run.printed()
        run.send(signal.SIGINT, "rank 0")
        outcome = run.end()
    assert (outcome.status, outcome.reason, outcome.code) == ("failed", "killed by a second SIGINT", 4)
    assert (outcome.orphans, outcome.seconds < STOP_SECONDS) == (0, True)
