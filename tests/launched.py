"""launch.run under test, with ranks of integration/fake_train.py: what tests of the launchers share."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from launch.run_config import REPO_ROOT

TINY = REPO_ROOT / "ds_configs" / "moe_tiny.json"
FAKE_TRAIN = Path(__file__).parent / "integration" / "fake_train.py"
LAUNCH_FAKE = (
    "import sys, pathlib, launch.run; sys.exit(launch.run.main(sys.argv[2:], script=pathlib.Path(sys.argv[1])))"
)
PATIENCE = 120  # seconds until a hanging test is given up


def environment(**changed: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPO_ROOT), "CUDA_VISIBLE_DEVICES": "", **changed}


class Launched:
    """launch.run with two CPU ranks of fake_train.py."""

    def __init__(self, folder: Path, end: str, *arguments: str, **variables: str) -> None:
        self.run_dir, self.notes = folder / "run", folder / "notes"
        self.notes.mkdir()
        self.output = open(folder / "output", "w+", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH_FAKE, str(FAKE_TRAIN), str(TINY), "--run_dir", str(self.run_dir), *arguments],
            env=environment(FAKE_END=end, FAKE_NOTES=str(self.notes), **variables),
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    def await_training(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not ((self.run_dir / "metrics.jsonl").is_file() and len(list(self.notes.iterdir())) == 2):
            assert time.monotonic() < deadline, self.printed()
            assert self.process.poll() is None, self.printed()
            time.sleep(0.1)

    def pids(self) -> set[int]:
        """Ranks, launch.py, the runner, and what the ranks started."""
        return {int(pid) for note in self.notes.iterdir() for pid in note.read_text().split()}

    def end(self) -> int:
        """Wait for launch.run; nothing that it started may be left."""
        try:
            code = self.process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGTERM)
            time.sleep(2)
            self.process.send_signal(signal.SIGTERM)  # the second kills all that launch.run started
            self.process.wait(timeout=PATIENCE)
            raise
        left = [pid for pid in self.pids() if is_running(pid)]
        assert left == [], self.printed()
        return code

    def printed(self) -> str:
        self.output.seek(0)
        return self.output.read()

    def summary(self) -> dict:
        return json.loads((self.run_dir / "summary.json").read_text())


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
