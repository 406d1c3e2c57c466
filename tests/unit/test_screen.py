"""Lines for whoever looks on, when nobody does."""

import os
import subprocess
import sys

import pytest

from launch.run_config import REPO_ROOT

LINES = "import sys; from launch.screen import show; [show('x', getattr(sys, sys.argv[1])) for _ in 'ab']; exit(3)"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_is_gone_ends_nobody(stream: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command, streams = [sys.executable, "-c", LINES, stream], {stream: writer}
    assert subprocess.run(command, **streams, cwd=REPO_ROOT, check=False).returncode == 3  # type: ignore[call-overload]
    os.close(writer)


def test_a_full_disk_behind_the_screen_is_told() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", LINES, "stdout"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=REPO_ROOT, check=False)
    assert "No space left on device" in done.stderr
