"""Other programs of the project, run by a part's process, in its group, and ended with it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from launch.run_config import REPO_ROOT
from tools.gpu_check.child import end_with_parent


def run_program(command: list[str], printed: Path, variables: Mapping[str, str] | None = None) -> int:
    """Run to the end; what it prints goes to a file. The time is limited by who watches this process."""
    with open(printed, "w", encoding="utf-8") as output:
        return subprocess.run(
            command,
            cwd=REPO_ROOT,
            env={**os.environ, **(variables or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
            preexec_fn=end_with_parent,  # this process has one thread
        ).returncode


def last_line(path: Path) -> str:
    return (path.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it printed nothing"])[-1]
