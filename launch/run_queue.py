"""The runs of a suite, one after another or side by side, each a launch.run in a session of its own.

    queue -> launch.run -> deepspeed -> ranks          an environment variable names the attempt in all of them

Kill any of these at any moment and start the queue again: what has completed stays, an attempt that still runs is
watched on, one that has lost its launch.run is ended, and what was interrupted continues from its checkpoint, or begins
again in a fresh folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from launch.experiment import (
    FAILED,
    TOKEN,
    UNFINISHED,
    Experiment,
    RunState,
    attempt_number,
    has_checkpoint,
    processes_of,
    processes_with_token,
    supervisor_of,
    whole_summary,
)
from launch.run import TRAIN_SCRIPT, usable_cores
from launch.run_dir import EXIT_COMPLETED, EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED
from launch.shared_memory import remove_unused_buffers
from launch.suite import PlannedRun
from launch.supervise import GRACE_SECONDS, KILLED_EARLY, STOPPED_EARLY, StopRequests, is_alive, runs_as_rank, send
from launch.topology import visible_gpus
from model.config import CheckpointError, ConfigError

POLL_SECONDS = 0.5
BUSY_SECONDS = 0.5  # to look, before a run that is to have the machine to itself, at what else runs there
BUSY_PERCENT = 10.0  # of all cores: from here on it is told
SHOW_SECONDS = 5.0  # between looks at the run folders
SLOT = "MOELAB_SLOT"  # environment variable: which GPU, or share of the cores, an attempt has


@dataclass
class Attempt:
    """An attempt that runs."""

    run: PlannedRun
    folder: Path
    slot: int
    resumed: bool
    process: psutil.Process  # launch.run
    child: subprocess.Popen[bytes] | None  # the same, if this queue started it

    @property
    def number(self) -> int:
        return attempt_number(self.folder)

    def has_ended(self) -> bool:
        return self.child.poll() is not None if self.child is not None else not is_alive(self.process)


class RunQueue:
    """Runs what is unfinished in an experiment. `launcher` is the command of launch.run, `reporter` writes the report,
    `show` is told the states of all runs now and then, and `say` each transition, in one line."""

    def __init__(
        self,
        experiment: Experiment,
        *,
        legs: Iterable[str] | None,
        slots: int,
        retry_failed: bool,
        launcher: list[str],
        reporter: list[str],
        show: Callable[[list[RunState]], None],
        say: Callable[[str], None],
    ) -> None:
        self.experiment, self.launcher, self.reporter, self.show, self.say = experiment, launcher, reporter, show, say
        self.legs = set(legs) if legs is not None else set(experiment.suite["legs"])
        self.wanted = (*UNFINISHED, *FAILED) if retry_failed else UNFINISHED
        self.alone = experiment.suite["measure"] == "throughput"
        self.slots = slots
        self.active: list[Attempt] = []
        self.tried: set[str] = set()  # once in a queue's life, lest a run that always dies runs forever
        self.start_afresh: set[str] = set()
        self.report: subprocess.Popen[bytes] | None = None
        self.report_wanted = not (experiment.folder / "report.md").exists()
        self.shown_at = 0.0
        self.asked = False  # to stop

    def run(self) -> int:
        """Until nothing is left to do, or a signal asks to stop; the exit code."""
        heard = 0
        with StopRequests() as stop:
            self.experiment.note("queue_started", pid=os.getpid(), legs=sorted(self.legs))
            try:
                self.take_over()
                self.drop_checkpoints()
                while True:
                    self.see_what_ended()
                    if stop.count > heard:
                        heard = stop.count
                        self.ask_to_stop(again=heard > 1)
                    todo = [] if heard else self.todo()
                    while todo and self.may_start():
                        self.start(todo.pop(0))
                    if not self.active and not todo and self.report_is_done():
                        break
                    self.show_now_and_then()
                    time.sleep(POLL_SECONDS)
            finally:
                self.end_all()
            code = self.exit_code(stopped=heard > 0)
            self.experiment.note("queue_ended", exit_code=code)
            self.show(self.states())
        return code

    # --- what to run ------------------------------------------------------------------------------------------------

    def states(self) -> list[RunState]:
        return self.experiment.states({str(attempt.folder) for attempt in self.active})

    def todo(self) -> list[RunState]:
        """Runs of the chosen legs that want another attempt, in the suite's order."""
        return [
            state
            for state in self.states()
            if state.run.leg in self.legs and state.status in self.wanted and state.run.name not in self.tried
        ]

    def may_start(self) -> bool:
        if self.alone:  # nothing else runs: not even the report
            return not self.active and self.report_is_done()
        return len(self.active) < self.slots

    def exit_code(self, stopped: bool) -> int:
        statuses = {state.status for state in self.states() if state.run.leg in self.legs}
        if statuses == {"completed"}:
            return EXIT_COMPLETED
        return EXIT_STOPPED if stopped else EXIT_FAILED

    # --- starting and ending ----------------------------------------------------------------------------------------

    def take_over(self) -> None:
        """Watch on what an earlier queue left running; end what has lost its launch.run."""
        runs = {run.name: run for run in self.experiment.runs}
        by_folder = {Path(folder) for folder, _ in processes_with_token()}
        for folder in sorted(path for path in by_folder if path.is_relative_to(self.experiment.folder)):
            run = runs[f"{folder.parent.name}/{folder.name.partition('_')[0]}"]
            process = supervisor_of(folder, self.experiment.run_file(run))
            try:
                slot = int(process.environ().get(SLOT, "0")) if process is not None else 0
            except psutil.NoSuchProcess:  # it has just ended
                process = None
            if process is None:
                self.say(f"{run.name}: ending what is left of {folder.name}, whose launch.run is gone")
                end_processes(folder)
                continue
            self.active.append(Attempt(run, folder, slot, has_checkpoint(folder), process, None))
            self.tried.add(run.name)
            self.note("run_adopted", self.active[-1])
            self.say(f"{run.name}: still running in {folder.name}; watched from here")

    def start(self, state: RunState) -> None:
        run, experiment = state.run, self.experiment
        self.tried.add(run.name)
        folder = state.folder
        resumed = has_checkpoint(folder) and state.status != "nan" and run.name not in self.start_afresh
        if folder is None or not resumed:
            folder = experiment.attempt_folder(run, state.attempts + 1)
        run_file = experiment.run_file(run)
        slot = min(set(range(self.slots)) - {attempt.slot for attempt in self.active})
        share = {} if self.alone else variables_of_slot(slot, self.slots)
        variables = {**os.environ, TOKEN: str(folder), SLOT: str(slot), **share}
        # by other programs, since nothing of ours runs now
        busy = {"busy_percent": psutil.cpu_percent(BUSY_SECONDS)} if self.alone else {}
        with open(folder.with_suffix(".txt"), "ab") as console:
            child = subprocess.Popen(
                [*self.launcher, str(run_file), "--run_dir", str(folder)],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.active.append(Attempt(run, folder, slot, resumed, psutil.Process(child.pid), child))
        self.note("run_started", self.active[-1], pid=child.pid, resumed=resumed, **busy)
        self.say(f"{run.name}: {f'continues from step {state.step}' if resumed else 'started'} ({folder.name})")
        if busy.get("busy_percent", 0) > BUSY_PERCENT:
            self.say(
                f"{run.name}: other programs keep {busy['busy_percent']:.0f}% of the cores busy: its speed will tell"
            )

    def see_what_ended(self) -> None:
        for attempt in [each for each in self.active if each.has_ended()]:
            self.active.remove(attempt)
            end_processes(attempt.folder)
            self.settle(attempt)
            self.drop_checkpoints()
            self.report_wanted = True

    def settle(self, attempt: Attempt) -> None:
        """Note how an attempt ended. A checkpoint that is refused is left alone, and the run starts afresh; what is
        refused for another reason, such as data that are not there, can continue once that is mended."""
        run, code = attempt.run, attempt.child.returncode if attempt.child is not None else None
        if code == EXIT_REFUSED:
            reason = last_line(attempt.folder.with_suffix(".txt"))
            self.note("run_ended", attempt, status="refused", exit_code=code, reason=reason)
            self.say(f"{run.name}: refused: {reason}")
            if attempt.resumed and reason.startswith(CheckpointError.__name__):
                self.start_afresh.add(run.name)
                self.tried.discard(run.name)
            return
        if whole_summary(attempt.folder) is None:
            reason = last_line(attempt.folder.with_suffix(".txt"))
            outside = any(why in reason for why in (STOPPED_EARLY, KILLED_EARLY))
            status = "failed" if code == EXIT_FAILED and not outside else "interrupted"
            self.note("run_ended", attempt, status=status, exit_code=code, reason=reason)
            self.say(f"{run.name}: {status}: {reason}")
            return
        state = self.experiment.state(run, set(), {})
        self.note("run_ended", attempt, status=state.status, exit_code=code, reason=state.reason, step=state.step)
        self.say(f"{run.name}: {state.status} at step {state.step}{f' ({state.reason})' if state.reason else ''}")

    def drop_checkpoints(self) -> None:
        """Remove those of completed runs, if the suite says so. What is unfinished needs its own."""
        if not self.experiment.suite["keep_checkpoints"]:
            for state in self.states():
                if state.status == "completed" and state.folder is not None:
                    shutil.rmtree(state.folder / "checkpoints", ignore_errors=True)

    def ask_to_stop(self, again: bool) -> None:
        """launch.run passes the first request on to the ranks, which save; the second kills them."""
        self.asked = True
        for attempt in self.active:
            send(attempt.process, signal.SIGTERM)
        if self.active:
            names = ", ".join(attempt.run.name for attempt in self.active)
            self.say(f"killing {names}" if again else f"asked {names} to save and stop; a second signal kills")
            self.experiment.note("queue_stopping", runs=[attempt.run.name for attempt in self.active])

    def end_all(self) -> None:
        """On the way out, whatever the reason: runs are asked to save, and given GRACE_SECONDS."""
        if not self.asked:  # a second request would kill them
            self.ask_to_stop(again=False)
        deadline = time.monotonic() + GRACE_SECONDS
        while any(not attempt.has_ended() for attempt in self.active) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        self.see_what_ended()
        while not self.report_is_done() and time.monotonic() < deadline + GRACE_SECONDS:
            time.sleep(POLL_SECONDS)

    # --- telling ----------------------------------------------------------------------------------------------------

    def note(self, event: str, attempt: Attempt, **facts: object) -> None:
        self.experiment.note(event, run=attempt.run.name, attempt=attempt.number, folder=str(attempt.folder), **facts)

    def report_is_done(self) -> bool:
        """Start the report that is wanted; whether none is being written. One that fails does not stop the queue."""
        if self.report is not None:
            if (code := self.report.poll()) is None:
                return False
            self.report = None
            if code:
                self.say(f"the report failed, see {self.experiment.folder / 'report.log'}; the runs go on")
        if self.report_wanted:
            self.report_wanted = False
            with open(self.experiment.folder / "report.log", "wb") as log:
                self.report = subprocess.Popen(  # in its own session: Ctrl-C is for the queue, and the runs
                    self.reporter, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            return False
        return True

    def show_now_and_then(self) -> None:
        if time.monotonic() - self.shown_at > SHOW_SECONDS:
            self.shown_at = time.monotonic()
            self.show(self.states())


def number_of_slots(measure: str, asked: int | str) -> int:
    """Runs at a time. Raises ConfigError where a quality suite states more than this machine has room for."""
    if measure == "throughput":
        return 1
    room = visible_gpus() or usable_cores()
    if not isinstance(asked, int):  # "auto"
        return room
    if asked > room:
        what = "GPUs" if visible_gpus() else "cores"
        raise ConfigError(f"slots={asked}, but this machine has {room} {what}. Use at most {room}, or 'auto'.")
    return asked


def variables_of_slot(slot: int, slots: int) -> dict[str, str]:
    """What keeps runs that are side by side out of each other's way: a GPU each, or a share of the cores."""
    if visible_gpus():
        listed = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
        return {"CUDA_VISIBLE_DEVICES": listed[slot] if listed else str(slot)}
    return {"OMP_NUM_THREADS": str(max(1, usable_cores() // slots))}


def end_processes(folder: Path) -> None:
    """End all that an attempt left on this machine: ranks are asked to save first, and given time for it."""
    ranks = [process for process in processes_of(folder) if runs_as_rank(process, TRAIN_SCRIPT)]
    for process in ranks:
        send(process, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while any(is_alive(process) for process in ranks) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    for _ in range(50):  # bounded: a process in the kernel's hands may linger
        if not (left := processes_of(folder)):
            break
        for process in left:
            send(process, signal.SIGKILL)
        time.sleep(0.1)
    remove_unused_buffers(wait_for_young=False)


def last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def launch_command() -> list[str]:
    return [sys.executable, "-m", "launch.run"]
