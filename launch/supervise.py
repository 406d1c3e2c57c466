"""One run under watch: start `deepspeed`, pass requests to stop on to the ranks, leave no process behind, judge.

    launch.run -> deepspeed (runner) -> launch.py -> rank 0, rank 1, ...     one session, that of the runner
                                                        -> wandb-core        a session of its own

What deepspeed 0.19.8 does with signals makes this necessary: SIGTERM to the runner orphans everything below it, SIGTERM
to launch.py reaches rank 0 alone for 30 s, and the runner exits 0 when launch.py is killed. So a request to stop goes
to the ranks themselves, and whether the run succeeded is what summary.json says.

With several nodes the ranks are no processes of ours, be they on this machine or not: a request to stop is a file that
rank 0 looks for, and one command ends the ranks on all nodes (launch/nodes.py).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from launch.ancestors import is_alive
from launch.environment import utc_now
from launch.faults import status_of_text
from launch.nodes import Elsewhere
from launch.run_dir import (
    EXIT_CODES,
    EXIT_FAILED,
    EXIT_REFUSED,
    latest_step,
    read_json_object,
    read_summary,
    write_json,
)
from launch.screen import show
from launch.shared_memory import remove_unused_buffers
from model.config import ConfigError

POLL_SECONDS = 0.5
GRACE_SECONDS = 60.0  # for ranks that outlive `deepspeed`: time to save a checkpoint
LEFTOVER_SECONDS = 5.0  # for what outlives the run itself: data workers, a W&B upload
KILL_SECONDS = 60.0  # for ending the ranks on other nodes; more than Slurm's KillWait of 30 s
REPEAT_SECONDS = 1.0
STOPPED_EARLY, KILLED_EARLY = "stopped before it began", "killed before it began"  # from outside: no fault of the run
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # SIGUSR1: sbatch --signal=B:USR1@120


class OwnedProcesses:
    """All processes that one command started, whoever their parent is by now.

    The session finds what was orphaned; parenthood finds what left the session, if seen once while its parent lived.
    """

    def __init__(self, root: subprocess.Popen[bytes]) -> None:
        self.session = root.pid
        self.known: set[psutil.Process] = {psutil.Process(root.pid)}

    def alive(self) -> list[psutil.Process]:
        """Look again, and return the owned processes that still run (a zombie does not)."""
        self.known = {process for process in self.known if is_alive(process)}
        found = [(process, parent_and_session(process)) for process in psutil.process_iter()]
        pids = {process.pid for process in self.known}
        grown = True
        while grown:
            grown = False
            for process, (parent, session) in found:
                if process.pid not in pids and (session == self.session or parent in pids) and is_alive(process):
                    self.known.add(process)
                    pids.add(process.pid)
                    grown = True
        return sorted(self.known, key=lambda process: process.pid)

    def ranks(self, script: Path) -> list[psutil.Process]:
        """The processes that run the training script for launch.py; not the workers that they fork."""
        candidates = {process.pid: process for process in self.alive() if runs_as_rank(process, script)}
        return [process for process in candidates.values() if parent_and_session(process)[0] not in candidates]

    def kill(self) -> None:
        """SIGKILL to everything owned, until nothing is left (bounded: a process in the kernel's hands may linger)."""
        for _ in range(50):
            processes = self.alive()
            if not processes:
                return
            for process in processes:
                send(process, signal.SIGKILL)
            time.sleep(0.1)


def parent_and_session(process: psutil.Process) -> tuple[int, int]:
    try:
        return process.ppid(), os.getsid(process.pid)
    except (psutil.Error, OSError):
        return -1, -1


def runs_as_rank(process: psutil.Process, script: Path) -> bool:
    """Whether launch.py started this process: `python -u SCRIPT --local_rank=N ...`."""
    try:
        arguments = process.cmdline()
    except psutil.Error:
        return False
    return str(script) in arguments and any(argument.startswith("--local_rank=") for argument in arguments)


def send(process: psutil.Process, signum: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signum)


class StopRequests:
    """Counts STOP_SIGNALS while it is entered: the first asks, the second kills.

    Signals within a second of each other are one request: a terminal and a scheduler may both pass the same one on.
    Under nohup SIGHUP is ignored, and stays so.
    """

    def __init__(self) -> None:
        self.count = 0
        self.last = -math.inf
        self.before: dict[signal.Signals, Any] = {}

    def _heard(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self.count += now - self.last > REPEAT_SECONDS
        self.last = now

    def __enter__(self) -> StopRequests:
        for signum in STOP_SIGNALS:
            if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                continue
            self.before[signum] = signal.signal(signum, self._heard)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)


def supervise(
    command: list[str],
    stop: StopRequests,
    *,
    run_dir: Path,
    script: Path,
    refusal_file: Path,
    environment: dict[str, str],
    elsewhere: Elsewhere | None = None,
) -> int:
    """Run `command` (a `deepspeed` or srun line that starts `script`) to its end; return the exit code of launch.run.

    Of the STOP_SIGNALS that `stop` counts, the first asks every rank to save and stop, the second kills all. When this
    returns, no process that the command started on this machine is left, nor, with `elsewhere`, a rank on a node that
    can be reached.
    """
    started_before = started_of(run_dir)
    deepspeed = subprocess.Popen(command, env=environment, start_new_session=True)
    owned = OwnedProcesses(deepspeed)
    try:
        if elsewhere is None:
            watch(deepspeed, owned, stop, script)
            await_leftovers(owned, stop, run_dir, started_before, script)
        else:
            watch_elsewhere(deepspeed, stop, run_dir, started_before, elsewhere)
    finally:
        if elsewhere is not None:
            kill_elsewhere(deepspeed, elsewhere)
        owned.kill()
        remove_unused_buffers()
    return settle(run_dir, started_before, deepspeed.wait(), refusal_file, stop.count)


def watch(deepspeed: subprocess.Popen[bytes], owned: OwnedProcesses, stop: StopRequests, script: Path) -> None:
    """Until `deepspeed` ends: keep track of what it started, and pass requests to stop on."""
    heard = 0
    while deepspeed.poll() is None:
        owned.alive()
        if stop.count > heard:
            if stop.count > 1:
                say("killing the run: a second signal came")
                owned.kill()
            elif ranks := owned.ranks(script):
                ask_to_stop(ranks)
            else:
                say("stopped before any rank had started")
                owned.kill()
            heard = stop.count
        time.sleep(POLL_SECONDS)


def ask_to_stop(ranks: list[psutil.Process]) -> None:
    """SIGTERM to the ranks alone. launch.py hears nothing, so it ends after them and cuts no save short."""
    say(f"asked {len(ranks)} rank{'s' * (len(ranks) > 1)} to save and stop; a second signal kills them")
    for rank in ranks:
        send(rank, signal.SIGTERM)


def await_leftovers(
    owned: OwnedProcesses, stop: StopRequests, run_dir: Path, started_before: str | None, script: Path
) -> None:
    """After `deepspeed` has ended: give the ranks that it left time to save. What then still runs, the caller kills."""
    asked, ended = stop.count > 0, time.monotonic()
    while True:
        ranks, running = owned.ranks(script), is_running(run_dir, started_before)
        if ranks and running and not asked:
            say("deepspeed has ended without its ranks")
            ask_to_stop(ranks)
            asked = True
        if not owned.alive():
            return
        if stop.count > 1 or time.monotonic() - ended > (GRACE_SECONDS if ranks and running else LEFTOVER_SECONDS):
            return
        time.sleep(POLL_SECONDS)


# --- several nodes --------------------------------------------------------------------------------------------------


def watch_elsewhere(
    deepspeed: subprocess.Popen[bytes],
    stop: StopRequests,
    run_dir: Path,
    started_before: str | None,
    elsewhere: Elsewhere,
) -> None:
    """Until no rank should be left on any node, or until those that are must be killed: pass requests to stop on.

    pdsh waits for all nodes, so ranks outlive `deepspeed` only if somebody kills it or pdsh (it then exits 0): they are
    asked to stop. And ranks that outlive a failed one, waiting for it in a collective, are given GRACE_SECONDS. A rank
    over pdsh that dies without a word (SIGKILL) is noticed only when the collectives of the others fail or time out.
    """
    faults_before, deadline = faults_of(run_dir), math.inf
    while deepspeed.poll() is None or (deepspeed.returncode <= 0 and is_running(run_dir, started_before)):
        if deepspeed.returncode is not None and not elsewhere.stop_file.exists():
            say("deepspeed has ended without its ranks; asked those on all nodes to save and stop")
            elsewhere.stop_file.touch()
            deadline = time.monotonic() + GRACE_SECONDS
        if stop.count > 0 and not elsewhere.stop_file.exists():
            say("asked the ranks on all nodes to save and stop; a second signal kills them")
            elsewhere.stop_file.touch()
        if stop.count > 1:
            say("killing the run: a second signal came")
            return
        if deadline == math.inf and (faults_of(run_dir) - faults_before or has_failed(run_dir, started_before)):
            say(f"a rank has failed; what is left on any node in {GRACE_SECONDS:.0f} s is killed")
            deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            return
        time.sleep(POLL_SECONDS)


def kill_elsewhere(deepspeed: subprocess.Popen[bytes], elsewhere: Elsewhere) -> None:
    """End the ranks on all nodes, as far as they can be reached within KILL_SECONDS."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        if elsewhere.kill is not None:
            subprocess.run(elsewhere.kill, timeout=KILL_SECONDS, check=False, input=b"", capture_output=True)
        elif deepspeed.poll() is None:
            deepspeed.terminate()  # srun: "forcing job termination"
            deepspeed.wait(timeout=KILL_SECONDS)


def faults_of(run_dir: Path) -> set[tuple[str, int]]:
    """What ranks other than 0 wrote about their end, and when."""
    return {(path.name, path.stat().st_mtime_ns) for path in run_dir.glob("rank*.err")}


def faults_since(run_dir: Path, started: str | None, names: str = "rank*.err") -> list[Path]:
    """What ranks other than 0 wrote of faults of their own since then; None: ever."""
    began = datetime.fromisoformat(started).timestamp() if started is not None else 0.0
    return sorted(path for path in run_dir.glob(names) if path.stat().st_mtime >= began)


# --- judging --------------------------------------------------------------------------------------------------------


def started_of(run_dir: Path) -> str | None:
    """When the last attempt in this folder started: what tells its summary from that of a new one."""
    return (read_summary(run_dir) or {}).get("started")


def is_running(run_dir: Path, started_before: str | None) -> bool:
    """Whether the attempt that began after `started_before` has a summary without a final status."""
    return status_of(run_dir, started_before) == "running"


def has_failed(run_dir: Path, started_before: str | None) -> bool:
    """Whether that attempt has ended, other than by completing or stopping."""
    return status_of(run_dir, started_before) not in (None, "running", *EXIT_CODES)


def status_of(run_dir: Path, started_before: str | None) -> str | None:
    """The status that the attempt after `started_before` has written; None before it wrote any."""
    summary = read_summary(run_dir)
    return None if summary is None or summary.get("started") == started_before else summary.get("status")


def settle(
    run_dir: Path, started_before: str | None, deepspeed_code: int, refusal_file: Path, stop_requests: int
) -> int:
    """The exit code, from what the ranks left; an attempt without a final status gets one here.

    A refusal was printed by rank 0 already. A stop that comes before the ranks listen kills them, and an earlier
    checkpoint is as good as it was: that is a stop. Without a checkpoint, or with steps lost, it is a failure.
    """
    if refusal_file.is_file() and refusal_file.read_text(encoding="utf-8").strip():
        return EXIT_REFUSED
    summary = read_summary(run_dir) or {}
    of_this_attempt = "started" in summary and summary["started"] != started_before
    if of_this_attempt and summary["status"] != "running":
        if summary.get("lost_peer"):
            summary |= cause_of_loss(run_dir, summary)
            write_summary(run_dir, summary)
        return report(run_dir, summary)

    if read_json_object(run_dir / "env.json") is None:
        say(f"failed: {why_nothing_began(deepspeed_code, stop_requests)}; nothing was written to {run_dir}")
        return EXIT_FAILED
    status, step, reason = (
        "failed",
        last_logged_step(run_dir),
        f"ranks ended without a final status; launcher exit code {deepspeed_code}",
    )
    saved = latest_step(run_dir)
    if stop_requests and saved is not None and (step <= saved or not of_this_attempt):
        status, step, reason = "stopped", saved, "stopped on request, before a step was logged after the checkpoint"
    elif stop_requests:
        reason = "ended by a request to stop, before a checkpoint was saved"
    began = summary["started"] if of_this_attempt else summary.get("ended")
    faults = [] if stop_requests else faults_since(run_dir, began)
    if faults:
        status, start = status_of_faults(faults)
        reason = f"{start}{reason}; see {names_of(faults)}"
    elif not stop_requests and (stacks := faults_since(run_dir, began, "rank*.stacks")):
        status, reason = "hang", f"{reason}; see {names_of(stacks)}"
    end = {"status": status, "reason": reason, "step": step, "ranks_reported": bool(faults)}
    return report(run_dir, close_summary(run_dir, summary, of_this_attempt, end))


def cause_of_loss(run_dir: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """What the summary of rank 0, which lost another, is to say: from what the others wrote, and who wrote nothing.

    If all wrote that they lost another, nobody was killed: the network failed, or the collectives did.
    """
    reason, faults = summary["reason"], faults_since(run_dir, summary["started"])
    if faults:
        status, start = status_of_faults(faults)
        return {"status": status, "reason": f"{start}{reason}; see {names_of(faults)}"}
    environment = read_json_object(run_dir / "env.json") or {}
    ranks = [environment, *environment.get("attempts", [])][-1].get("world_size", math.inf)
    if 1 + len(faults_since(run_dir, summary["started"], "rank*.lost")) >= ranks:
        return {"reason": f"every rank lost another: {reason}"}
    return {"reason": f"a rank ended without a word; another then lost it ({reason})", "ranks_reported": False}


def status_of_faults(faults: list[Path]) -> tuple[str, str]:
    """The status that ranks other than 0 give the run by what they wrote, and how its reason begins."""
    return status_of_text("\n".join(path.read_text(encoding="utf-8") for path in faults))


def names_of(faults: list[Path]) -> str:
    return ", ".join(path.name for path in faults)


def why_nothing_began(deepspeed_code: int, stop_requests: int) -> str:
    """deepspeed 0.19.8 passes on what a rank exited with, 256 - N for signal N, and 0 where launch.py was killed."""
    if stop_requests:
        return STOPPED_EARLY
    if deepspeed_code <= 0 or deepspeed_code > 256 - signal.NSIG:
        return f"{KILLED_EARLY}; launcher exit code {deepspeed_code}"
    return f"no rank began to train; launcher exit code {deepspeed_code}"


def close_summary(run_dir: Path, summary: dict[str, Any], of_this_attempt: bool, end: dict[str, Any]) -> dict[str, Any]:
    """Write the final status that the ranks could not write, and the time that they spent. Returns the new summary.

    ranks_reported in it: whether a rank wrote of a fault. Without a word they were killed: that is no failed run.
    """
    ended = utc_now()
    kept = {name: value for name, value in summary.items() if name not in ("pid", "hostname")}
    closed = {**kept, **end, "ended": ended}
    if of_this_attempt:
        spent = datetime.fromisoformat(ended) - datetime.fromisoformat(summary["started"])
        closed["total_time_min"] = summary.get("total_time_min", 0.0) + spent.total_seconds() / 60
    closed.setdefault("config_hash", (read_json_object(run_dir / "env.json") or {}).get("config_hash"))
    write_summary(run_dir, closed)
    return closed


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Where the disk is full, what is printed has to do."""
    try:
        write_json(run_dir / "summary.json", summary)
    except OSError as fault:
        say(f"{run_dir / 'summary.json'} could not be written: {fault}")


def last_logged_step(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]  # a rank that was killed may leave half a line
    return json.loads(whole[-1])["step"] if whole else 0


def report(run_dir: Path, summary: dict[str, Any]) -> int:
    """Say how the run ended, on one line, and return its exit code."""
    reason = f" ({summary['reason']})" if summary.get("reason") else ""
    say(f"{summary['status']} at step {summary.get('step', 0)}{reason}; {run_dir}")
    return EXIT_CODES.get(summary["status"], EXIT_FAILED)


def refuse_if_in_use(run_dir: Path) -> None:
    """Raise ConfigError if a run on this machine still writes to the folder: two runs never share one."""
    summary = read_summary(run_dir) or {}
    if summary.get("status") != "running" or summary.get("hostname") != socket.gethostname():
        return
    try:
        process = psutil.Process(summary["pid"])
        born, alive = process.create_time(), is_alive(process)
    except (KeyError, psutil.NoSuchProcess):
        return
    if alive and born <= datetime.fromisoformat(summary["started"]).timestamp() + 1:  # else the pid has a new owner
        raise ConfigError(
            f"--run_dir {run_dir}: a run is writing to it (process {process.pid}, started {summary['started']}). "
            "Wait for it, stop it, or use another --run_dir."
        )


def say(text: str) -> None:
    show(f"launch.run: {text}", sys.stderr)
