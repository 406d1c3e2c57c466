"""What becomes of a run when one of its processes is signalled: `python -m tests.launcher_table` measures every case.

Two CPU ranks of the real train.py, in the middle of training, under launch.run and under plain `deepspeed`. The table
goes to benchmarks/launcher_table.md; tests/integration/test_stopping.py measures some of its cases every time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from launch.ancestors import is_alive, launcher_name
from launch.environment import describe_checkout, package_versions, utc_now
from launch.run_config import REPO_ROOT
from launch.run_dir import checkpoint_name
from launch.supervise import runs_as_rank

TINY = REPO_ROOT / "ds_configs" / "moe_tiny.json"
TRAIN = REPO_ROOT / "train.py"
HELD_TRAIN = REPO_ROOT / "tests" / "held_train.py"
LAUNCH = "import sys, pathlib, launch.run; sys.exit(launch.run.main(sys.argv[2:], script=pathlib.Path(sys.argv[1])))"
ENDLESS = ("run.train.num_steps=1000000",)
PATIENCE = 120.0  # seconds until a run is expected to train
END_PATIENCE = 60.0  # and until all of its processes are expected to be gone, after the signal
TABLE = REPO_ROOT / "benchmarks" / "launcher_table.md"
NAMES = {"deepspeed.launcher.launch": "launch.py", "deepspeed.launcher.runner": "deepspeed", "deepspeed": "deepspeed"}


class Case(NamedTuple):
    launcher: str
    signal: signal.Signals
    target: str

    def __str__(self) -> str:
        return f"{self.signal.name} to {self.target} under {self.launcher}"


class Outcome(NamedTuple):
    status: str  # of summary.json
    reason: str
    code: int  # of what a person or a scheduler had started
    seconds: float  # from the signal until no process was left
    orphans: int  # killed after END_PATIENCE
    saved: bool  # whether the last checkpoint is that of the last step


class Started:
    """A run in a session of its own, with what it consists of; leave nothing behind: `with Started(...) as run`."""

    def __init__(
        self,
        launcher: str,
        folder: Path,
        *settings: str,
        script: Path = TRAIN,
        options: tuple[str, ...] = (),
        **env: str,
    ) -> None:
        self.run_dir, self.script = folder / "run", script
        self.output = open(folder / "output", "a+", encoding="utf-8")
        arguments = ["--run_dir", str(self.run_dir), *options, "--set", *settings]
        command = {
            "launch.run": [sys.executable, "-c", LAUNCH, str(script), str(TINY), *arguments],
            "deepspeed": [
                *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", free_port()),
                *(str(script), "--config", str(TINY), *arguments),
            ],
        }[launcher]
        plain = {
            "PYTHONPATH": str(REPO_ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **plain, **env},
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=REPO_ROOT,
        )
        self.family: dict[str, psutil.Process] = {launcher: psutil.Process(self.process.pid)}
        self.others: set[psutil.Process] = set()

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.left():
            process.kill()
        self.process.wait()
        self.output.close()

    def look(self) -> None:
        """Who is there by now."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                line = process.cmdline()
            except psutil.Error:
                continue
            self.others.add(process)
            if runs_as_rank(process, self.script) and not runs_as_rank(process.parent() or process, self.script):
                rank = next(part.removeprefix("--local_rank=") for part in line if part.startswith("--local_rank="))
                self.family[f"rank {rank}"] = process
            elif name := launcher_name(line):
                self.family[NAMES.get(name, name)] = process

    def await_file(self, path: Path, lines: int = 0) -> None:
        deadline = time.monotonic() + PATIENCE
        while not path.is_file() or len(path.read_text().splitlines()) < lines:
            assert self.process.poll() is None, self.printed()
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.1)
        self.look()

    def await_training(self) -> None:
        self.await_file(self.run_dir / "metrics.jsonl", lines=4)
        assert self.family.keys() >= {"rank 0", "rank 1", "launch.py", "deepspeed"}, self.family

    def send(self, number: signal.Signals, target: str) -> None:
        self.family[target].send_signal(number)

    def left(self) -> list[psutil.Process]:
        return [process for process in {*self.family.values(), *self.others} if is_alive(process)]

    def end(self, patience: float = END_PATIENCE) -> Outcome:
        """Wait until nothing is left of it, and say how it ended."""
        began = time.monotonic()
        while self.left() and time.monotonic() - began < patience:
            time.sleep(0.1)
        seconds, orphans = time.monotonic() - began, self.left()
        for process in orphans:
            process.kill()
        summary = self.summary()
        latest = self.run_dir / "checkpoints" / "latest"
        saved = latest.is_file() and latest.read_text().strip() == checkpoint_name(summary.get("step", -1))
        return Outcome(
            summary.get("status", "none"), summary.get("reason", ""), self.process.wait(), seconds, len(orphans), saved
        )

    def summary(self) -> dict[str, Any]:
        path = self.run_dir / "summary.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def printed(self) -> str:
        self.output.seek(0)
        return self.output.read()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def outcome_of(case: Case, folder: Path) -> Outcome:
    with Started(case.launcher, folder, *ENDLESS) as run:
        run.await_training()
        run.send(case.signal, case.target)
        return run.end()


def all_cases() -> list[Case]:
    asked = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    cases = []
    for launcher in ("launch.run", "deepspeed"):
        targets = ["rank 0", "rank 1", "launch.py", "deepspeed", *(["launch.run"] if launcher == "launch.run" else [])]
        cases += [Case(launcher, number, target) for target in targets for number in asked]
        cases += [Case(launcher, signal.SIGKILL, target) for target in targets]
    return cases


def row(case: Case, outcome: Outcome) -> str:
    reason = outcome.reason if len(outcome.reason) < 100 else f"{outcome.reason[:100]} ..."
    cells = [
        case.launcher,
        case.target,
        case.signal.name,
        outcome.status,
        outcome.code,
        "yes" if outcome.saved else "no",
    ]
    return "| " + " | ".join(map(str, [*cells, f"{outcome.seconds:.0f}", outcome.orphans, reason])) + " |"


HEAD = """# What becomes of a run when one of its processes is signalled

Measured by `python -m tests.launcher_table`: two CPU ranks of `ds_configs/moe_tiny.json` in the middle of training, one
signal to one process. *saved*: the last checkpoint is that of the last step. *exit*: of what was started, launch.run or
`deepspeed` (whose codes are its own; negative: it was killed by that signal). *left*: processes that still ran a minute
later.

| started | signalled | signal | status | exit | saved | seconds | left | reason |
|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else a job in the background and its children ignore it
    only = sys.argv[1:]  # some words that a case must contain
    rows = []
    for case in all_cases():
        if not all(word in str(case) for word in only):
            continue
        folder = Path(tempfile.mkdtemp(prefix="launcher_table_"))
        rows.append(row(case, outcome_of(case, folder)))
        print(rows[-1], flush=True)
        shutil.rmtree(folder)
    if not only:
        packages, checkout = package_versions(), describe_checkout(REPO_ROOT)
        versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "deepspeed"))
        commit, cores = checkout.get("commit", "unknown")[:7], len(os.sched_getaffinity(0))
        made = f"{utc_now()[:10]}, commit {commit}, {versions}, {cores} cores"
        TABLE.write_text("\n".join([HEAD.rstrip(), *rows, "", made]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
