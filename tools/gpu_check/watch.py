"""The side that never touches the GPU: starts a part's process, listens, and starts another when it dies or hangs.

Everything that a part starts is in its process group, or is its descendant, and ends with it, by id.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import psutil

from launch.environment import variables_of_interpreter
from launch.run_config import REPO_ROOT
from tools.gpu_check.parts import Part

POLL_S = 0.1
STARTING_LIMIT_S = 90.0  # to import torch, deepspeed and torchao from a cold disk

Cases = dict[str, dict[str, Any]]  # by name: status, seconds, rows, and why where it is not "measured"


class Watch:
    """How one part's processes are started and watched."""

    def __init__(self, part: Part, dry_run: bool, work: Path, logs: Path, saved: Callable[[], bool]) -> None:
        self.part, self.dry_run, self.saved = part, dry_run, saved
        self.work, self.logs = work / part.name, logs
        self.work.mkdir(parents=True, exist_ok=True)
        self.logs.mkdir(parents=True, exist_ok=True)
        self.events = self.work / "events.jsonl"
        self.errors = logs / f"{part.name}.err"
        self.private_paths = {f"{work}/": "", str(work): "", f"{REPO_ROOT}/": "", str(REPO_ROOT): "."}

    def run(self, cases: Cases, deadline: float) -> None:
        """Measure the cases, whose entries are filled in as news comes, until the deadline (time.monotonic())."""
        left = list(cases)
        while left and time.monotonic() < deadline:
            begun_before = len(left)
            why = self._one_process(cases, left, deadline)
            for name in [name for name in left if cases[name]["status"] in ("measured", "failed")]:
                left.remove(name)
            begun = next((name for name in left if cases[name]["status"] == "running"), None)
            if why is None:  # the deadline
                break
            if begun is not None:
                settle(cases[begun], "failed", why)
                left.remove(begun)
            elif len(left) == begun_before:  # it did not get to any case, and would not the next time
                for name in left:
                    settle(cases[name], "failed", why)
                left.clear()
        for name in left:
            rows = " after these rows" if cases[name]["rows"] else ""
            settle(cases[name], "not reached", f"the time of the part ended{rows}")

    def _one_process(self, cases: Cases, left: list[str], deadline: float) -> str | None:
        """Listen to one process until it ends. Why it did not finish, "" if it did, None at the deadline."""
        self.events.write_text("")
        skipped = self.errors.stat().st_size if self.errors.exists() else 0
        with self._started(left) as process, open(self.events, encoding="utf-8") as events:
            running, news, since, unread = False, False, time.monotonic(), ""
            while True:
                ended = has_ended(process)  # before reading: what it told at last is read
                *lines, unread = (unread + events.read()).split("\n")
                for line in lines:
                    event = json.loads(self.without_paths(line))
                    take(cases, event)
                    if event["event"] != "row":
                        running, since = event["event"] == "begun", time.monotonic()
                    news = True
                news = news and not self.saved()
                if ended:
                    return self._why(end(process), skipped)
                if time.monotonic() > deadline:
                    return None
                limit = self.part.case_limit_s if running else STARTING_LIMIT_S
                if time.monotonic() - since > limit:
                    return f"took longer than {limit:.0f} s and was ended"
                time.sleep(POLL_S)

    @contextlib.contextmanager
    def _started(self, left: list[str]) -> Iterator[subprocess.Popen[bytes]]:
        command = [sys.executable, "-m", "tools.gpu_check.child", "--function", self.part.function]
        command += ["--events", str(self.events), "--work", str(self.work), "--logs", str(self.logs)]
        command += [*(["--dry_run"] if self.dry_run else []), "--cases", *left]
        with self._log("out") as out, self._log("err") as err:
            process = subprocess.Popen(
                command,
                cwd=REPO_ROOT,
                env=environment_of_child(self.work, self.dry_run),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            end(process)

    def _log(self, kind: str) -> IO[bytes]:
        return open(self.logs / f"{self.part.name}.{kind}", "ab")

    def _why(self, code: int, skipped: int) -> str:
        """How a process ended, in one line."""
        if code == 0:
            return ""
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        with open(self.errors, encoding="utf-8", errors="replace") as errors:
            errors.seek(skipped)
            last = (errors.read().strip().splitlines() or ["it said nothing"])[-1]
        return self.without_paths(f"{how}: {last[:300]}")

    def without_paths(self, text: str) -> str:
        for path, name in self.private_paths.items():
            text = text.replace(path, name)
        return text


def settle(case: dict[str, Any], status: str, why: str = "") -> None:
    if case["seconds"] is None and case["begun_at"] is not None:
        case["seconds"] = time.monotonic() - case["begun_at"]
    case |= {"status": status, "why": why}


def take(cases: Cases, event: dict[str, Any]) -> None:
    """Note what a part's process told."""
    case = cases[event["case"]]
    match event["event"]:
        case "begun":
            case |= {"status": "running", "why": "", "begun_at": time.monotonic()}
        case "row":
            case["rows"].append(event["row"])
        case "done":
            failed = [row["error"] for row in case["rows"] if "error" in row]
            settle(case, "failed" if failed else "measured", f"{len(failed)} rows failed" if failed else "")
        case "failed":
            settle(case, "failed", event["why"])


def environment_of_child(work: Path, dry_run: bool) -> dict[str, str]:
    temporary = work / "tmp"
    temporary.mkdir(exist_ok=True)
    own = {
        **os.environ,
        **variables_of_interpreter(os.environ),
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(temporary),
        "TORCHINDUCTOR_CACHE_DIR": str(work.parent / "inductor"),
        "DS_ACCELERATOR": "cpu" if dry_run else "cuda",
        "WANDB_MODE": "disabled",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    return own | ({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if dry_run else {})


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Without taking its exit code: until that is done its id, which is that of its group, belongs to nobody else."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def end(process: subprocess.Popen[bytes]) -> int:
    """End a process, all of its group, and descendants that left the group. Its exit code."""
    if process.returncode is None:
        try:
            descendants = psutil.Process(process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            descendants = []
        os.killpg(process.pid, signal.SIGKILL)
        for each in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    return process.wait()
