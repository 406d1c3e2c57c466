"""The folder of an experiment, and what it proves about every run: evidence decides, not what the queue remembers.

    suite.json        the suite, resolved, and its hash: written before the first run, never changed
    queue.jsonl       every transition, with its time
    legs/NAME/        repeat1.json (run file), repeat1_attempt1/ (run folder), repeat1_attempt1.txt (what was printed)
    summary.csv  steps.csv  verdicts.csv  figures/  report.md  report.html      launch/report.py

A run continues in the folder of its last attempt if that holds a checkpoint, else it starts again in a fresh one; what
an attempt left is never deleted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from launch.environment import utc_now
from launch.results import read_lines
from launch.run_dir import latest_step, read_json_object, read_summary, write_json
from launch.suite import PlannedRun, Suite
from launch.supervise import is_alive
from model.config import ConfigError

TOKEN = "MOELAB_RUN"  # environment variable that all processes of an attempt inherit: its folder
UNFINISHED = ("pending", "stopped", "killed", "interrupted")  # the queue goes on with these
FAILED = ("failed", "oom", "nan", "hang", "refused")  # and with these only when asked to retry


@dataclass(frozen=True)
class RunState:
    """Where a run of the suite stands.

    pending, running, completed; stopped (asked to, with a checkpoint), failed, oom, nan, hang (it said so itself),
    killed (its ranks ended without a word), interrupted (whoever watched it ended first), refused (never started).
    """

    run: PlannedRun
    status: str
    attempts: int
    folder: Path | None = None  # of the last attempt, if there was one; it exists if a rank began
    step: int = 0
    reason: str = ""


class Experiment:
    """An experiment's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()  # one name: by it the processes of its runs are found again
        self.suite: dict[str, Any] = read_json_object(self.folder / "suite.json") or {}

    @property
    def runs(self) -> list[PlannedRun]:
        return [PlannedRun(**run) for run in self.suite["runs"]]

    def leg_folder(self, run: PlannedRun) -> Path:
        return self.folder / "legs" / run.leg

    def run_file(self, run: PlannedRun) -> Path:
        """The run file, written on first use."""
        path = self.leg_folder(run) / f"repeat{run.repeat}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, run.tree)
        return path

    def last_attempt(self, run: PlannedRun) -> Path | None:
        """The run folder of the newest attempt, which may not exist: what every attempt leaves is what it printed."""
        printed = self.leg_folder(run).glob(f"repeat{run.repeat}_attempt*.txt")
        numbers = [attempt_number(path) for path in printed]
        return self.attempt_folder(run, max(numbers)) if numbers else None

    def attempt_folder(self, run: PlannedRun, number: int) -> Path:
        return self.leg_folder(run) / f"repeat{run.repeat}_attempt{number}"

    # --- evidence -----------------------------------------------------------------------------------------------------

    def states(self, alive: set[str] | None = None) -> list[RunState]:
        """Every run of the suite, in its order. `alive`: folders of the attempts that run, if the caller knows."""
        alive = folders_in_use() if alive is None else alive
        ends = {(event["run"], event["attempt"]): event for event in self.events() if event["event"] == "run_ended"}
        return [self.state(run, alive, ends) for run in self.runs]

    def state(self, run: PlannedRun, alive: set[str], ends: dict[tuple[str, int], dict[str, Any]]) -> RunState:
        """From what still runs and what the last attempt wrote; where no rank began, from how launch.run ended."""
        folder = self.last_attempt(run)
        if folder is None:
            return RunState(run, "pending", 0)
        number, summary = attempt_number(folder), whole_summary(folder)
        if str(folder) in alive:
            return RunState(run, "running", number, folder, last_step(folder))
        if summary is None:
            end = ends.get((run.name, number), {"status": "interrupted", "reason": "nobody saw it begin"})
            if "step" in end:  # a rank began, so there was a run folder
                end = {"status": "interrupted", "reason": "its run folder is gone"}
            return RunState(run, end["status"], number, folder, 0, end["reason"])
        if summary["status"] == "running":
            return RunState(run, "interrupted", number, folder, last_step(folder), "nobody saw it end")
        status = str(summary["status"])
        if status == "failed" and summary.get("ranks_reported") is False:
            status = "killed"
        return RunState(run, status, number, folder, int(summary.get("step", 0)), str(summary.get("reason", "")))

    # --- the record -------------------------------------------------------------------------------------------------

    def events(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "queue.jsonl")

    def note(self, event: str, **facts: Any) -> None:
        """Append a transition to queue.jsonl, durably. Half a line that a power cut left is cut off first."""
        path = self.folder / "queue.jsonl"
        with open(path, "a+b") as file:
            file.seek(0)
            content = file.read()
            if content and not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)
            file.write(json.dumps({"time": utc_now(), "event": event, **facts}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the folder: one queue at a time. The kernel lets go of it when the queue ends, however it ends."""
        with open(self.folder / ".queue.lock", "a+", encoding="utf-8") as file:
            if not try_lock(file):
                file.seek(0)
                raise ConfigError(
                    f"--exp_dir {self.folder}: another queue works on it ({file.read().strip() or 'just started'}). "
                    "Wait for it, stop it, or use another --exp_dir."
                )
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {utc_now()}")
            file.flush()
            yield

    def queue_is_alive(self) -> bool:
        path = self.folder / ".queue.lock"
        if not path.exists():
            return False
        with open(path, "a+", encoding="utf-8") as file:
            return not try_lock(file)


def try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def open_experiment(folder: Path, suite: Suite) -> Iterator[Experiment]:
    """The experiment of a suite in a folder, held: a new one, or the one that was begun there with this very suite.

    Raises ConfigError if the folder holds anything else, if legs, gates or a run file have changed since, or if another
    queue holds it. It is held before suite.json is written: of two queues that begin at once, one writes it.
    """
    refuse_another(Experiment(folder), suite)  # before anything is created
    folder.mkdir(parents=True, exist_ok=True)
    with Experiment(folder).owned():
        experiment = Experiment(folder)
        refuse_another(experiment, suite)
        if not experiment.suite:
            header = {"hash": suite.hash, "begun": utc_now(), "reference": suite.reference}
            write_json(experiment.folder / "suite.json", {**header, **suite.content})
        yield Experiment(folder)


def refuse_another(experiment: Experiment, suite: Suite) -> None:
    """Raise ConfigError if a folder holds another experiment than this suite's, or something that is none."""
    folder, content = experiment.folder, suite.content
    if not experiment.suite:
        found = folder.iterdir() if folder.is_dir() else [folder] if folder.exists() else []
        if not all(is_trace_of_a_beginning(path) for path in found):
            raise ConfigError(f"--exp_dir {folder}: is not empty and holds no experiment. Use another --exp_dir.")
    elif experiment.suite["hash"] != suite.hash:
        kept = json.loads(json.dumps(content))
        changed = [key for key in kept if experiment.suite.get(key) != kept[key]]
        raise ConfigError(
            f"--exp_dir {folder}: was begun with another suite ({', '.join(changed)} changed; hash "
            f"{experiment.suite['hash']}, now {suite.hash}). What decides is fixed before the first run: use another "
            "--exp_dir."
        )


def is_trace_of_a_beginning(path: Path) -> bool:
    """Whether a queue that was killed before it had written suite.json left this file."""
    return path.name == ".queue.lock" or path.name.startswith(".suite.json.")


def existing_experiment(folder: Path, name: str) -> Experiment:
    """The experiment of the suite of that name in a folder. Raises ConfigError if there is none."""
    experiment = Experiment(folder)
    if not experiment.suite:
        raise ConfigError(f"--exp_dir {experiment.folder}: holds no experiment (no suite.json). Start one with `run`.")
    if experiment.suite["name"] != name:
        raise ConfigError(
            f"--exp_dir {experiment.folder}: holds the experiment of {experiment.suite['name']}, not of {name}. Name "
            "its suite file, or another --exp_dir."
        )
    return experiment


def attempt_number(path: Path) -> int:
    return int(path.stem.rpartition("attempt")[2])


def last_step(folder: Path) -> int:
    lines = read_lines(folder / "metrics.jsonl")
    return int(lines[-1]["step"]) if lines else 0


def last_metrics(folder: Path | None) -> dict[str, Any]:
    """The newest value of every metric of a run, and the figures of its summary."""
    figures: dict[str, Any] = {}
    for line in read_lines(folder / "metrics.jsonl") if folder is not None else []:
        figures |= line
    return figures | ((whole_summary(folder) if folder is not None else None) or {})


def has_checkpoint(folder: Path | None) -> bool:
    """Whether a run can continue there; a `latest` that says nothing useful is as good as none."""
    try:
        return folder is not None and whole_summary(folder) is not None and latest_step(folder) is not None
    except ConfigError:
        return False


def whole_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of an attempt; one that is damaged is as good as none, and the run begins again elsewhere."""
    try:
        summary = read_summary(folder)
    except ConfigError:
        return None
    return summary if isinstance(summary, dict) and "status" in summary else None


# --- processes ------------------------------------------------------------------------------------------------------


def processes_with_token() -> Iterator[tuple[str, psutil.Process]]:
    """All processes of this machine that belong to an attempt of a suite, with its folder. Orphans are found too."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            folder = process.environ().get(TOKEN)
            if folder is not None and is_alive(process):
                yield folder, process


def processes_of(folder: Path) -> list[psutil.Process]:
    return sorted((process for token, process in processes_with_token() if token == str(folder)), key=lambda p: p.pid)


def supervisor_of(folder: Path, run_file: Path) -> psutil.Process | None:
    """The launch.run of an attempt, if it lives: its command line ends as the queue wrote it."""
    for process in processes_of(folder):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[-3:] == [str(run_file), "--run_dir", str(folder)]:
                return process
    return None


def folders_in_use() -> set[str]:
    return {folder for folder, _ in processes_with_token()}
