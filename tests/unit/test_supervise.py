"""How the end of a run is judged, and which processes are ours; test_launch_run.py has the launcher itself."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launch.environment import utc_now
from launch.run_dir import checkpoint_name, write_json
from launch.supervise import OwnedProcesses, StopRequests, refuse_if_in_use, settle
from model.config import ConfigError

BEFORE, NOW = "2026-01-01T00:00:00+00:00", utc_now()


@pytest.fixture
def refusal(tmp_path: Path) -> Path:
    return tmp_path / "refusal"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "env.json", {"config_hash": "abc"})
    return tmp_path / "run"


def summarise(run_dir: Path, status: str, started: str) -> None:
    write_json(
        run_dir / "summary.json", {"status": status, "reason": "because", "step": 7, "started": started, "pid": 1}
    )


def save_checkpoint(run_dir: Path, step: int) -> None:
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints" / "latest").write_text(checkpoint_name(step))


def summary_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


@pytest.mark.parametrize(
    ("status", "code"), [("completed", 0), ("stopped", 3), ("failed", 4), ("oom", 4), ("nan", 4), ("hang", 4)]
)
@pytest.mark.parametrize("deepspeed_code", [0, 1, -6])
def test_the_summary_gives_the_exit_code_whatever_deepspeed_says(
    run_dir: Path, refusal: Path, status: str, code: int, deepspeed_code: int
) -> None:
    summarise(run_dir, status, started=NOW)
    assert settle(run_dir, BEFORE, deepspeed_code, refusal, stop_requests=0) == code
    assert summary_of(run_dir)["status"] == status


def test_a_run_that_still_says_running_has_failed_at_its_last_logged_step(run_dir: Path, refusal: Path) -> None:
    summarise(run_dir, "running", started=NOW)
    (run_dir / "metrics.jsonl").write_text('{"step": 3, "train/loss": 1.0}\n{"step": 4, "tra')
    (run_dir / "rank1.err").write_text("Traceback")
    assert settle(run_dir, BEFORE, 7, refusal, stop_requests=0) == 4
    summary = summary_of(run_dir)
    assert (summary["status"], summary["step"]) == ("failed", 3)
    assert summary["reason"] == "ranks ended without a final status; launcher exit code 7; see rank1.err"
    assert summary["total_time_min"] > 0
    assert "pid" not in summary


def lose_a_peer(run_dir: Path) -> None:
    summary = {"status": "failed", "reason": "RuntimeError: reset", "step": 7, "started": NOW, "lost_peer": True}
    write_json(run_dir / "summary.json", summary)


def test_a_rank_that_lost_another_tells_of_a_rank_that_ended_without_a_word(run_dir: Path, refusal: Path) -> None:
    lose_a_peer(run_dir)
    assert settle(run_dir, BEFORE, 7, refusal, stop_requests=0) == 4
    summary = summary_of(run_dir)
    assert summary["reason"] == "a rank ended without a word; another then lost it (RuntimeError: reset)"
    assert summary["ranks_reported"] is False


@pytest.mark.parametrize(("lost", "killed"), [(2, False), (1, True)])
def test_if_every_rank_lost_another_nobody_was_killed(run_dir: Path, refusal: Path, lost: int, killed: bool) -> None:
    write_json(run_dir / "env.json", {"config_hash": "abc", "world_size": 8, "attempts": [{"world_size": 3}]})
    lose_a_peer(run_dir)
    for rank in range(1, lost + 1):
        (run_dir / f"rank{rank}.lost").write_text("Traceback")
    assert settle(run_dir, BEFORE, 7, refusal, stop_requests=0) == 4
    assert (summary_of(run_dir).get("ranks_reported") is False) is killed
    assert summary_of(run_dir)["reason"].startswith("a rank ended" if killed else "every rank lost another")


def test_a_rank_that_lost_another_which_wrote_why_has_failed_of_that(run_dir: Path, refusal: Path) -> None:
    lose_a_peer(run_dir)
    (run_dir / "rank3.err").write_text("Traceback")
    assert settle(run_dir, BEFORE, 7, refusal, stop_requests=0) == 4
    assert summary_of(run_dir)["reason"] == "RuntimeError: reset; see rank3.err"
    assert "ranks_reported" not in summary_of(run_dir)


@pytest.mark.parametrize("end", ["running", "lost_peer"])
@pytest.mark.parametrize(("fault", "status"), [("AssertionError: x", "failed"), ("torch.OutOfMemoryError: x", "oom")])
def test_what_another_rank_wrote_of_its_fault_is_why_a_run_ended(
    run_dir: Path, refusal: Path, end: str, fault: str, status: str
) -> None:
    summarise(run_dir, "running", started=NOW) if end == "running" else lose_a_peer(run_dir)
    (run_dir / "rank1.err").write_text(fault)
    assert settle(run_dir, BEFORE, 1, refusal, stop_requests=0) == 4
    assert summary_of(run_dir)["status"] == status
    assert summary_of(run_dir).get("ranks_reported") is not False  # not killed: a rank said what was wrong


def test_a_fault_of_an_earlier_attempt_is_not_why_this_one_ended(run_dir: Path, refusal: Path) -> None:
    (run_dir / "rank1.err").write_text("torch.OutOfMemoryError: x")
    os.utime(run_dir / "rank1.err", (0, 0))
    summarise(run_dir, "running", started=NOW)
    assert settle(run_dir, BEFORE, -9, refusal, stop_requests=0) == 4
    summary = summary_of(run_dir)
    assert (summary["status"], summary["ranks_reported"]) == ("failed", False)
    assert summary["reason"] == "ranks ended without a final status; launcher exit code -9"


def test_the_summary_of_an_earlier_attempt_is_no_success_of_this_one(run_dir: Path, refusal: Path) -> None:
    summarise(run_dir, "stopped", started=BEFORE)
    assert settle(run_dir, BEFORE, 0, refusal, stop_requests=0) == 4
    assert summary_of(run_dir)["status"] == "failed"


def test_a_folder_without_a_summary_gets_one(run_dir: Path, refusal: Path) -> None:
    assert settle(run_dir, None, 1, refusal, stop_requests=0) == 4
    assert summary_of(run_dir).items() >= {"status": "failed", "step": 0, "config_hash": "abc"}.items()


def test_a_run_that_never_began_fails_and_leaves_nothing(
    tmp_path: Path, refusal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert settle(tmp_path / "none", None, 1, refusal, stop_requests=0) == 4
    assert "no rank began to train; launcher exit code 1" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_refusal_after_the_start_is_not_printed_twice(
    tmp_path: Path, refusal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal.write_text("DataError: no tokens\n")
    assert settle(tmp_path / "none", None, 2, refusal, stop_requests=0) == 2
    assert capsys.readouterr().err == ""


def test_a_stop_before_the_attempt_began_keeps_the_checkpoint_and_is_a_stop(run_dir: Path, refusal: Path) -> None:
    summarise(run_dir, "stopped", started=BEFORE)
    save_checkpoint(run_dir, 7)
    assert settle(run_dir, BEFORE, -9, refusal, stop_requests=1) == 3
    assert (summary_of(run_dir)["status"], summary_of(run_dir)["step"]) == ("stopped", 7)


@pytest.mark.parametrize(("logged", "code"), [(7, 3), (9, 4)])
def test_a_stop_without_a_new_checkpoint_is_a_failure_only_if_steps_are_lost(
    run_dir: Path, refusal: Path, logged: int, code: int
) -> None:
    summarise(run_dir, "running", started=NOW)
    save_checkpoint(run_dir, 7)
    (run_dir / "metrics.jsonl").write_text(f'{{"step": {logged}}}\n')
    assert settle(run_dir, BEFORE, 3, refusal, stop_requests=1) == code


def test_a_stop_without_any_checkpoint_is_a_failure(run_dir: Path, refusal: Path) -> None:
    summarise(run_dir, "running", started=NOW)
    assert settle(run_dir, BEFORE, 3, refusal, stop_requests=1) == 4
    assert summary_of(run_dir)["reason"] == "ended by a request to stop, before a checkpoint was saved"


def test_a_folder_to_which_a_live_process_writes_is_refused(run_dir: Path) -> None:
    content = {"status": "running", "started": utc_now(), "hostname": socket.gethostname(), "pid": os.getpid()}
    write_json(run_dir / "summary.json", content)
    with pytest.raises(ConfigError, match=f"a run is writing to it \\(process {os.getpid()}"):
        refuse_if_in_use(run_dir)


@pytest.mark.parametrize(
    "changed", [{"status": "stopped"}, {"hostname": "another"}, {"started": BEFORE}, {"pid": 2**22 + 1}]
)
def test_a_folder_whose_run_is_over_is_not_in_use(run_dir: Path, changed: dict) -> None:
    content = {"status": "running", "started": utc_now(), "hostname": socket.gethostname(), "pid": os.getpid()}
    write_json(run_dir / "summary.json", {**content, **changed})
    refuse_if_in_use(run_dir)


# A parent that starts one child in its session and one outside it, prints their ids, and waits.
FAMILY = """
import subprocess, sys, time
wait = [sys.executable, "-c", "import time; time.sleep(600)"]
children = [subprocess.Popen(wait), subprocess.Popen(wait, start_new_session=True)]
print(*(child.pid for child in children), flush=True)
time.sleep(600)
"""


@pytest.fixture
def family() -> Iterator[tuple["subprocess.Popen[bytes]", list[int]]]:
    root = subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, start_new_session=True)
    assert root.stdout is not None
    children = [int(pid) for pid in root.stdout.readline().split()]
    yield root, children
    for pid in (root.pid, *children):
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)
    root.wait()


def test_orphans_and_those_who_left_the_session_are_still_owned(
    family: tuple["subprocess.Popen[bytes]", list[int]],
) -> None:
    root, children = family
    owned = OwnedProcesses(root)
    assert {process.pid for process in owned.alive()} == {root.pid, *children}
    root.kill()
    root.wait()
    assert {process.pid for process in owned.alive()} == set(children)
    owned.kill()
    assert owned.alive() == []


def test_an_orphan_in_the_session_is_owned_though_its_parent_died_unseen(
    family: tuple["subprocess.Popen[bytes]", list[int]],
) -> None:
    root, children = family
    owned = OwnedProcesses(root)
    root.kill()
    root.wait()
    assert {process.pid for process in owned.alive()} == {children[0]}


def test_the_same_signal_passed_on_twice_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with StopRequests() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.count == 1
        clock[0] += 2
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.count == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_closed_terminal_stops_nothing_that_nohup_started() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.count == 0
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.count == 1
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
