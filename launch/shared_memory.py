"""Shared memory that ranks on the CPU leave behind.

deepspeed 0.19.8 (csrc/cpu/comm/shm.cpp) makes a file of 66 MiB in /dev/shm for every rank and never removes it, however
the rank ends. It is memory: forty runs on two ranks fill 5 GiB, until ranks die of SIGBUS.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "deepspeed_allreduce_buffer_"
YOUNG_SECONDS = 2.0  # a rank fills its buffer, then maps it: without it, its peers would wait for it for ever


def remove_unused_buffers(
    folder: Path = SHARED_MEMORY, processes: Path = Path("/proc"), *, wait_for_young: bool = True
) -> list[str]:
    """Remove this user's buffers that no process has mapped; returns their names. Those of living ranks are mapped.

    One that is younger than YOUNG_SECONDS may be about to be, by a rank of another run: it is looked at again, or left.
    """
    own = [path for path in folder.glob(f"{PREFIX}{os.getuid()}_*") if path.is_file()] if folder.is_dir() else []
    unused = not_mapped(own, processes)
    if wait_for_young and (wait := max(map(seconds_young, unused), default=0.0)) > 0:
        time.sleep(wait)
        unused = not_mapped(unused, processes)
    removed = [path for path in unused if seconds_young(path) <= 0]
    for path in removed:
        path.unlink(missing_ok=True)
    return sorted(path.name for path in removed)


def seconds_young(buffer: Path) -> float:
    """How long it is still young; 0 if it is gone."""
    with contextlib.suppress(FileNotFoundError):  # another launch.run was faster
        return buffer.stat().st_mtime + YOUNG_SECONDS - time.time()
    return 0.0


def not_mapped(buffers: list[Path], processes: Path) -> list[Path]:
    if not buffers:
        return []
    mapped = set()
    for maps in processes.glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # ended, or not ours
            mapped |= {line.rpartition("/")[2] for line in maps.read_text().splitlines() if PREFIX in line}
    return [path for path in buffers if path.name not in mapped]
