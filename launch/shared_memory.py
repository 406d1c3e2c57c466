"""Shared memory that ranks on the CPU leave behind.

deepspeed 0.19.8 (csrc/cpu/comm/shm.cpp) makes a file of 66 MiB in /dev/shm for every rank and never removes it, however
the rank ends. It is memory: forty runs on two ranks fill 5 GiB, until ranks die of SIGBUS.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "deepspeed_allreduce_buffer_"


def remove_unused_buffers(folder: Path = SHARED_MEMORY, processes: Path = Path("/proc")) -> list[str]:
    """Remove this user's buffers that no process has mapped; returns their names. Those of living ranks are mapped."""
    own = [path for path in folder.glob(f"{PREFIX}{os.getuid()}_*") if path.is_file()] if folder.is_dir() else []
    if not own:
        return []
    mapped = set()
    for maps in processes.glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # ended, or not ours
            mapped |= {line.rpartition("/")[2] for line in maps.read_text().splitlines() if PREFIX in line}
    unused = sorted(path for path in own if path.name not in mapped)
    for path in unused:
        path.unlink(missing_ok=True)
    return [path.name for path in unused]
