"""What ends a run, put in a status and a line."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import faults
from launch.environment import utc_now
from launch.faults import status_of, status_of_text
from launch.run_dir import read_summary, write_json
from launch.run_log import RunLog
from launch.supervise import settle
from model.config import CheckpointError

FULL = OSError(errno.ENOSPC, "No space left on device", "/runs/a/metrics.jsonl")


def test_memory_that_ran_out_is_called_so() -> None:
    assert status_of(torch.OutOfMemoryError("CUDA out of memory.\nmore")) == (
        "oom",
        "OutOfMemoryError: CUDA out of memory.",
    )
    assert status_of(MemoryError())[0] == "oom"
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60)
    assert status_of(raised.value)[0] == "oom"
    assert status_of(RuntimeError("NCCL error ...\nCuda failure 2 'out of memory'"))[0] == "oom"
    assert status_of(RuntimeError("shapes"))[0] == "failed"
    assert status_of_text("Traceback ...\ntorch.OutOfMemoryError: x") == ("oom", "")
    assert status_of_text("Traceback ...\nAssertionError") == ("failed", "")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_called_so_with_the_path_and_the_way_out(number: int) -> None:
    error = OSError(number, "No room", "/runs/a/metrics.jsonl")
    told = (
        "failed",
        "disk full: /runs/a/metrics.jsonl: No room. Make room; the same command goes on from the last checkpoint",
    )
    assert status_of(error) == told
    wrapped = CheckpointError("step_00000005 could not be saved")
    wrapped.__cause__ = error
    assert status_of(wrapped) == told
    assert status_of_text(f"Traceback ...\nOSError: [Errno {number}] No room: 'x'") == ("failed", "disk full: ")
    assert status_of(OSError(errno.EACCES, "Permission denied"))[1].startswith("PermissionError: ")


@pytest.mark.parametrize("lost_peer", [True, False])
def test_a_disk_that_was_full_on_another_rank_is_why_the_run_ended(tmp_path: Path, lost_peer: bool) -> None:
    write_json(tmp_path / "env.json", {"config_hash": "abc"})
    end = {"status": "failed", "lost_peer": True} if lost_peer else {"status": "running"}
    write_json(tmp_path / "summary.json", {"started": utc_now(), "reason": "lost", "step": 3, **end})
    (tmp_path / "rank1.err").write_text("OSError: [Errno 28] No space left on device: '/runs/a/x'")
    assert settle(tmp_path, "before", 1, tmp_path / "none", stop_requests=0) == 4
    summary = read_summary(tmp_path) or {}
    assert summary["reason"].startswith("disk full: ")
    assert summary["reason"].endswith("; see rank1.err")


def test_stacks_without_a_final_status_tell_of_a_hang(tmp_path: Path) -> None:
    write_json(tmp_path / "env.json", {"config_hash": "abc"})
    write_json(tmp_path / "summary.json", {"started": utc_now(), "status": "running", "reason": "", "step": 3})
    (tmp_path / "rank1.stacks").write_text("{}")
    assert settle(tmp_path, "before", 4, tmp_path / "none", stop_requests=0) == 4
    summary = read_summary(tmp_path) or {}
    assert summary["status"] == "hang"
    assert summary["reason"] == "ranks ended without a final status; launcher exit code 4; see rank1.stacks"


class FullDisk(RunLog):
    """A log whose summary finds no room the first `times`."""

    def __init__(self, times: int) -> None:
        self.times, self.written = times, []

    def finish(self, status: Any, reason: str, figures: dict[str, Any]) -> None:
        self.times -= 1
        if self.times >= 0:
            raise FULL
        self.written.append((status, reason, figures))


def test_a_summary_that_finds_no_room_is_tried_again_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(faults.time, "sleep", lambda _: None)
    log = FullDisk(times=2)
    faults.finish(log, "failed", "disk full: x", {"step": 3})
    assert log.written == [("failed", "disk full: x", {"step": 3})]
    faults.finish(FullDisk(times=99), "failed", "disk full: x", {})
    assert "failed: disk full: x; summary.json may not say so: [Errno 28]" in capsys.readouterr().err
