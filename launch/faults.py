"""What ends a run against its will: which status it gives, how it is put in a line, and where a rank writes it down.

No torch here: its errors are known by the names of their classes, as launch.run knows them from what ranks wrote.
"""

from __future__ import annotations

import errno
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.run_dir import Status
from launch.run_log import RunLog
from launch.screen import show

DISK_FULL = "disk full: "  # how the reason begins; launch.run does not start such a run again
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
ATTEMPTS = 4
# torch's and python's errors; what torch says on a CPU; CUDA's own words, in errors of NCCL and of what compiles
OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError", "can't allocate memory", "out of memory")


def status_of(error: BaseException) -> tuple[Status, str]:
    """The status that an exception gives a run, and the reason in one line."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    for cause in causes_of(error):
        if isinstance(cause, OSError) and cause.errno in NO_SPACE:
            named = f"{cause.filename}: " if cause.filename else ""
            return "failed", (
                f"{DISK_FULL}{named}{cause.strerror}. Make room; the same command goes on from the last checkpoint"
            )
    return status_of_text(f"{type(error).__name__}: {error}")[0], reason


def status_of_text(text: str) -> tuple[Status, str]:
    """The same of a traceback that another rank wrote, with the start of a reason, if there is one to give."""
    if any(f"[Errno {number}]" in text for number in NO_SPACE):
        return "failed", DISK_FULL
    return ("oom" if any(name in text for name in OUT_OF_MEMORY) else "failed"), ""


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone: that rank's end is the cause, not this error."""
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)


def record_fault(run_dir: Path, rank: int, log: RunLog | None, error: BaseException) -> None:
    """Write the traceback to log.txt on rank 0, to rank<N>.err elsewhere; to rank<N>.lost if another rank is gone, no
    fault of this one. What the disk does not take is on stderr.
    """
    trace = "".join(traceback.format_exception(error))
    try:
        if rank == 0 and log is not None:
            log.say(trace)
            return
        show(trace, sys.stderr)
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / f"rank{rank}.{'lost' if lost_peer(error) else 'err'}").write_text(trace)
    except OSError as fault:
        show(f"{trace}rank {rank} could not write this down: {fault}", sys.stderr)


def finish(log: RunLog, status: Status, reason: str, figures: dict[str, Any]) -> None:
    """Write the final summary. On a full disk there may soon be room: what was half saved is being removed."""
    for attempt in range(ATTEMPTS):
        try:
            log.finish(status, reason, figures)
            return
        except OSError as fault:
            show(f"{status}: {reason}; summary.json may not say so: {fault}", sys.stderr)
            time.sleep(attempt)
