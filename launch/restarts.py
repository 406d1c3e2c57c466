"""`launch.run --restarts N`: start a run again, in its folder, that died of a fault which may not come back.

An error, memory that ran out, a hang, a rank that was killed: again, from the last checkpoint. Never what is complete,
was stopped (a killed launcher is a stop too), was refused, became NaN or met too many spikes, or found the disk full:
that is for a person.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from launch.faults import DISK_FULL
from launch.run_dir import EXIT_FAILED, latest_step, read_summary
from launch.supervise import StopRequests, say, started_of
from model.config import ConfigError

AGAIN = ("failed", "oom", "hang")
FOR_A_PERSON = (DISK_FULL, "LossSpike: ")  # how the reasons of such failures begin


def run_with_restarts(attempt: Callable[[int], int], run_dir: Path, restarts: int, stop: StopRequests) -> int:
    """The exit code of the last of at most 1 + restarts attempts; `attempt` gets the number of those before it."""
    for number in range(restarts + 1):
        try:
            started_before = started_of(run_dir)
        except (ConfigError, OSError):  # the attempt refuses such a folder, and says why
            started_before = None
        code = attempt(number)
        if code != EXIT_FAILED or stop.count > 0 or number == restarts:
            return code
        why = why_again(run_dir, started_before)
        if why is None:
            return code
        say(f"starting again, {number + 1} of {restarts}: {why}; from step {latest_step(run_dir) or 0}")
    raise AssertionError("range is not empty")


def why_again(run_dir: Path, started_before: str | None) -> str | None:
    """What the attempt died of; None if another would be wrong."""
    summary = read_summary(run_dir)
    if summary is None or summary["started"] == started_before:
        return "no rank began to train"
    if summary["status"] not in AGAIN or summary.get("asked_to_stop") or summary["reason"].startswith(FOR_A_PERSON):
        return None
    return f"{summary['status']} ({summary['reason']})"
