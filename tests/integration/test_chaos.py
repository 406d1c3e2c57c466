"""A dozen faults at random, as `python -m tests.chaos` makes them by the hundred: nothing is lost (tests/chaos.py)."""

import subprocess
import sys
from pathlib import Path

from launch.run_config import REPO_ROOT

PATIENCE_S = 1500  # against hanging only


def test_twelve_faults_lose_nothing_and_the_losses_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.chaos",
        "--faults",
        "12",
        "--minutes",
        "20",
        "--seed",
        "8",
        "--variants",
        "1",
    ]
    done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    faults, *found = done.stdout.splitlines()[-1].split(", ")
    assert int(faults.removesuffix(" faults")) >= 12
    assert found == ["0 lost", "0 silent loads", "0 orphans", "0 leaked folders", "0 mismatches", "0 false ends"]
