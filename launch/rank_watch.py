"""A thread in every rank that hears what the main thread cannot while it compiles or waits in a collective.

    asked to stop       by a signal, by launch.run's file, because its launcher is gone, or by another rank
    a peer is gone      what launch.py then sends to the ranks that are left is no request to stop
    a rank hangs        nothing has been begun for too long

A request is agreed on by all ranks at a step boundary (model/loop.py) and the run ends in good order. Only where the
main thread stays away from one does this thread end the process, and on rank 0 the run: while the state is that of a
checkpoint, so that nothing is lost; after a peer's end; after a hang; at a second SIGINT.

What one rank hears it tells all others in requests.jsonl, since launch.py and a person's signals reach one of them.
Where nodes share the folder over NFS that may take half a minute; the step boundary waits for none of it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import psutil

from launch.ancestors import is_alive
from launch.run_dir import EXIT_CODES, EXIT_FAILED, EXIT_STOPPED, Status, read_summary
from launch.screen import show
from launch.supervise import close_summary, last_logged_step

TICK_SECONDS = 0.5
REPEAT_SECONDS = 1.0  # signals that are no further apart are one: a terminal and a launcher pass the same one on
BOUNDARY_SECONDS = 5.0  # for the main thread to reach a step boundary once a stop is asked
SAVE_SECONDS = 15.0  # for the checkpoint to be on disk; all in all less than the 30 s that launch.py gives
FINISH_SECONDS = 5.0  # for W&B, once the summary is written
PEER_SECONDS = 20.0  # for the main thread to find out by itself that a peer is gone: gloo says so, NCCL does not
NOTES_SECONDS = 5.0  # for the stacks of the other ranks
FAULTS_SECONDS = 5.0  # between looks for faults that other ranks wrote down
SAME_BIRTH_SECONDS = 2.0  # Linux counts births from the boot, whose time moves when the clock is set
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Peer(NamedTuple):
    """A rank, as the others know it."""

    rank: int
    host: str
    pid: int
    born: float

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


class Finish(Protocol):
    """Writes the final summary, on rank 0; elsewhere it does nothing."""

    def __call__(self, status: Status, reason: str, figures: dict[str, Any]) -> None: ...


class RankWatch:
    """The watch over one rank, from start() to close(), both in the main thread."""

    def __init__(
        self,
        rank: int,
        run_dir: Path,
        *,
        launchers: dict[str, psutil.Process | None] | None = None,
        stop_file: Path | None = None,
        hang_timeout_s: float | None = None,
    ) -> None:
        self.rank, self.run_dir, self.stop_file, self.hang_timeout_s = rank, run_dir, stop_file, hang_timeout_s
        self.launchers = launchers or {}
        me = psutil.Process()
        self.me = Peer(rank, socket.gethostname(), me.pid, me.create_time())
        self.main_thread = threading.get_ident()
        self.ears, self.voice = socket.socketpair()
        self.closed = threading.Event()
        # Held for good by whoever ends the run, this thread or the main one; the other then waits for the end.
        self.ending = threading.Lock()
        self.has_end = self.main_has_end = False
        self.fault: BaseException | None = None  # that this thread has ended with

        self.phase, self.phases = "start", 0  # what the main thread is doing, and how often it has said so
        self.durable: Callable[[float], bool] | None = None  # set while the state is that of a checkpoint
        self.standing_by = False

        self.asked: str | None = None
        self.asked_at, self.told_stop = 0.0, False
        self.interrupts, self.last_signal = 0, float("-inf")
        self.lost: str | None = None
        self.lost_at = 0.0
        self.idle, self.phases_seen, self.last_tick = 0.0, 0, time.monotonic()

        self.attempt: str | None = None  # None until all ranks have met
        self.peers: list[Peer] = []
        self.neighbours: dict[Peer, psutil.Process] = {}
        self.faults_before = self._faults()  # of earlier attempts
        self.last_look_for_faults = 0.0
        self.messages_read = 0

    # --- what the main thread calls -----------------------------------------------------------------------------------

    def start(self) -> Self:
        """Hear signals from now on. A signal that is ignored (SIGHUP under nohup) stays so."""
        for fd in (self.ears, self.voice):
            fd.setblocking(False)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP:
                signal.signal(number, lambda *_: None)  # python tells of signals that have a handler of its own
        signal.set_wakeup_fd(self.voice.fileno(), warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self._watch, name="rank_watch", daemon=True)
        self.thread.start()
        return self

    def meet(self, gather: Callable[[Peer], list[Peer]], finish: Finish, *, collectives_block: bool) -> None:
        """All ranks call this, once rank 0 has made the run folder; `gather` gives every rank what all of them gave.

        `collectives_block`: whether a rank that waits for others in a collective can be told from one that does not.
        """
        if self.rank == 0:
            requests_of(self.run_dir).unlink(missing_ok=True)  # of an earlier attempt; nobody writes before `gather`
        self.finish, self.collectives_block = finish, collectives_block
        self.peers = [Peer(*peer) for peer in gather(self.me)]
        for peer in self.peers:
            if peer.host == self.me.host and peer != self.me:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process = psutil.Process(peer.pid)
                    # else the rank is in another container of this host, and the process is another one
                    if abs(process.create_time() - peer.born) < SAME_BIRTH_SECONDS:
                        self.neighbours[peer] = process
        first = self.peers[0]
        self.attempt = f"{first.host}:{first.pid}:{first.born}"

    def reached(self, phase: str) -> None:
        """A listener of model.phases. Where the watch is ending the run, "update" is never reached."""
        if threading.get_ident() != self.main_thread:
            return
        if phase == "update":
            with self.ending:
                self.durable = None
        self.phase, self.phases = phase, self.phases + 1

    def state_is_saved(self, durable: Callable[[float], bool]) -> None:
        """Until the next update, what is in memory is what a checkpoint holds.

        `durable` waits, without a collective and for so many seconds at most, for that checkpoint to be on disk.
        """
        self.durable = durable

    def is_asked(self) -> bool:
        """Whether this rank knows of a request to stop. Raises RuntimeError if it would hear of none any more."""
        if self.fault is not None:
            raise RuntimeError("the watch over this rank has failed: nobody would hear a stop") from self.fault
        return self.asked is not None

    def stand_by(self) -> None:
        """All ranks have agreed to stop: the main thread ends the run."""
        self.standing_by = True

    def claim_end(self, fault: bool = False) -> None:
        """Before the main thread writes how the run ended. Does not return where the watch is about to do that.

        A fault in a state that a checkpoint holds may be what a request to stop did: launch.py and a terminal signal
        the compiler's processes too. So the watch goes first.
        """
        if fault:
            time.sleep(2 * TICK_SECONDS)
            if self.asked and self.durable is not None and not self.durable(BOUNDARY_SECONDS):
                with self.ending:
                    self.durable = None  # the fault may be that of this save
            deadline = time.monotonic() + BOUNDARY_SECONDS + 2 * TICK_SECONDS
            while self.asked and self.lost is None and self.durable is not None and time.monotonic() < deadline:
                time.sleep(TICK_SECONDS)
        if not self.main_has_end:
            self.ending.acquire()
            self.main_has_end = True

    def close(self) -> None:
        """Handlers stay, so that what launchers send to a rank that is ending does not kill it."""
        self.closed.set()
        signal.set_wakeup_fd(-1)
        self.thread.join()
        self.ears.close()
        self.voice.close()

    def speak_for_rank_0(self, why: str, status: Status = "failed") -> None:
        """Where rank 0 can write no summary any more, the first of the ranks beside it that is left does.

        Without launch.run nobody else would. Of ranks on other hosts nobody knows whether they are left.
        """
        if self.rank == 0 or not self.peers or self.peers[0] not in self.neighbours:
            return
        left = [peer.rank for peer, process in self.neighbours.items() if is_alive(process)]
        if status == "failed" and min(left, default=self.rank) < self.rank:
            return
        summary = read_summary(self.run_dir) or {}
        if summary.get("status") == "running":
            end = {"status": status, "reason": why, "step": last_logged_step(self.run_dir), "ranks_reported": False}
            with contextlib.suppress(OSError):
                close_summary(self.run_dir, summary, True, end)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        try:
            while not self.closed.is_set():
                select.select([self.ears], [], [], TICK_SECONDS)
                now = time.monotonic()
                self._hear_signals(now)
                self._look_around(now)
                self._end_if_need_be(now)
        except (
            BaseException
        ) as error:  # of any kind: nobody else would end a run of which this thread has taken the end
            if self.has_end:
                traceback.print_exc()
                leave(EXIT_FAILED)
            self.fault = error  # the main thread raises it, at the next step boundary

    def _hear_signals(self, now: float) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in self.ears.recv(4096):
                self._hear_signal(signal.Signals(number), now)
        if self.interrupts > 1:
            self._tell("kill", "killed by a second SIGINT")
            self._end_killed("killed by a second SIGINT")

    def _hear_signal(self, number: signal.Signals, now: float) -> None:
        if number == signal.SIGINT:
            self.interrupts += now - self.last_signal > REPEAT_SECONDS
        self.last_signal = now
        if number in SIGNALS:
            self._look_for_peers(now, thoroughly=True)  # before it is taken for a request
            self._ask(f"{number.name} to rank {self.rank}", now)

    def _ask(self, why: str, now: float) -> None:
        if self.asked is None and self.lost is None:
            self._tell_of_stop(why)
            self.asked_at, self.asked = now, why

    def _look_around(self, now: float) -> None:
        for name, launcher in self.launchers.items():
            if launcher is None or not is_alive(launcher):
                self._ask(f"its launcher is gone ({name})", now)
        if self.stop_file is not None and self.stop_file.exists():
            self._ask("asked by launch.run", now)
        self._look_for_peers(now)
        if self.attempt is not None:
            if self.asked is not None:
                self._tell_of_stop(self.asked)
            self._hear_messages(now)

        # Time in which this thread did not run either (SIGSTOP, a suspended machine) is nobody's hang.
        self.idle += min(now - self.last_tick, 10 * TICK_SECONDS)
        if self.phases != self.phases_seen or self.attempt is None:
            self.idle, self.phases_seen = 0.0, self.phases
        self.last_tick = now

    def _look_for_peers(self, now: float, thoroughly: bool = False) -> None:
        if self.lost is not None:
            return
        gone = [str(peer) for peer, process in self.neighbours.items() if not is_alive(process)]
        if not gone and (thoroughly or now - self.last_look_for_faults > FAULTS_SECONDS):
            self.last_look_for_faults = now
            gone = sorted({Path(name).stem for name, _ in self._faults() - self.faults_before})
        if gone:
            self.lost, self.lost_at = f"{', '.join(gone)} ended", now

    def _faults(self) -> set[tuple[str, int]]:
        """What ranks wrote of faults of their own, and when."""
        found = set()
        for path in self.run_dir.glob("rank*.err"):
            with contextlib.suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_mtime_ns))
        return found

    # --- between the ranks --------------------------------------------------------------------------------------------

    def _tell_of_stop(self, why: str) -> None:
        """Once, by the first rank that knows, as soon as there is somebody to tell."""
        if self.attempt is not None and not self.told_stop:
            self.told_stop = True
            self._tell("stop", why)

    def _tell(self, what: str, why: str) -> None:
        """Tell the watches of all ranks, this one included."""
        line = json.dumps({"attempt": self.attempt, "rank": self.rank, "what": what, "why": why}) + "\n"
        if self.attempt is None:
            return
        with contextlib.suppress(OSError), open(requests_of(self.run_dir), "ab", buffering=0) as file:
            file.write(line.encode())  # at once and at the end: lines of several ranks do not mix

    def _hear_messages(self, now: float) -> None:
        try:
            with open(requests_of(self.run_dir), "rb") as file:
                file.seek(self.messages_read)
                new = file.read()
        except OSError:
            return
        whole = new[: new.rfind(b"\n") + 1]
        self.messages_read += len(whole)
        for line in whole.splitlines():
            try:
                message = json.loads(line)
            except ValueError:  # over NFS the lines of two hosts may overwrite each other
                continue
            if not isinstance(message, dict) or message["attempt"] != self.attempt or message["rank"] == self.rank:
                continue
            if message["what"] == "stop":
                self.told_stop = True  # by that rank, to all
                self._ask(message["why"], now)
            elif message["what"] == "end":
                self._follow(message["why"])
            elif message["what"] == "hang":
                self._end_hung(message["why"])
            elif message["what"] == "kill":
                self._end_killed(message["why"])

    # --- ends ---------------------------------------------------------------------------------------------------------

    def _end_if_need_be(self, now: float) -> None:
        if self.lost is not None:
            if now - self.lost_at > PEER_SECONDS:
                self._end_bereft()
        elif self.asked is not None and now - self.asked_at > BOUNDARY_SECONDS and not self.standing_by:
            if self.attempt is None:
                if self._take_end():
                    show(f"stopped before the run began: {self.asked}", sys.stderr)
                    leave(EXIT_FAILED)
            elif self.rank == 0:
                self._end_asked()
        if self.hang_timeout_s is not None and self.idle > self.hang_timeout_s:
            self._end_hung(f"no rank got on for {self.hang_timeout_s:g} s")

    def _take_end(self) -> bool:
        """Whether the end is this thread's now; the main thread will wait for it, before an update or its own end."""
        self.has_end = self.has_end or self.ending.acquire(timeout=TICK_SECONDS)
        return self.has_end

    def _end_asked(self) -> None:
        """On rank 0: stop without a step boundary, if the state is that of a checkpoint. The other ranks follow."""
        if self.durable is None or not self._take_end():
            return
        durable = self.durable
        if durable is None:  # the main thread was faster, and will be at a step boundary soon
            self.has_end = False
            self.ending.release()
            return
        self._tell("end", str(self.asked))
        deadline = time.monotonic() + SAVE_SECONDS
        while not (saved := durable(TICK_SECONDS)) and time.monotonic() < deadline:
            self._hear_signals(time.monotonic())
            time.sleep(TICK_SECONDS / 5)  # of a save that failed it knows at once
        if saved:
            self._end_run("stopped", f"{self.asked}, in {self.phase!r}, with nothing new to save")
            leave(EXIT_STOPPED)
        reason = f"{self.asked}, and the checkpoint was not on disk {SAVE_SECONDS:g} s later"
        self._end_run("failed", reason, {"asked_to_stop": True})
        leave(EXIT_FAILED)

    def _follow(self, why: str) -> None:
        """On the other ranks: rank 0 is ending the run; it needs this rank's part of the checkpoint, nothing else."""
        if self._take_end():
            self._await_summary(SAVE_SECONDS + FINISH_SECONDS)
            leave(self._final_code())

    def _end_bereft(self) -> None:
        if not self._take_end():
            return
        reason = f"{self.lost}, and this rank did not notice in {self.phase!r}"
        if self.rank == 0:
            self._end_run("failed", reason, {"lost_peer": True})
        else:
            with contextlib.suppress(OSError):
                (self.run_dir / f"rank{self.rank}.lost").write_text(reason + "\n", encoding="utf-8")
            self.speak_for_rank_0(reason)
        leave(EXIT_FAILED)

    def _end_killed(self, why: str) -> None:
        """At once, whatever the main thread is doing; if it had written how the run ended, that stays."""
        if self._take_end() and self.rank == 0 and self.attempt is not None:
            self._end_run("failed", why, {"asked_to_stop": True})
        leave(self._final_code())

    def _end_hung(self, why: str) -> None:
        if not self._take_end():
            return
        self._tell("hang", why)
        self._write_stacks(why)
        if self.rank == 0:
            self._end_run("hang", f"{why}; {self._who_hangs()}; see rank*.stacks")
        else:
            self._await_summary(NOTES_SECONDS + 2 * FINISH_SECONDS)
            if self.rank == 1:
                self.speak_for_rank_0(f"{why}; no word from rank 0; see rank*.stacks", "hang")
        leave(EXIT_FAILED)

    def _end_run(self, status: Status, reason: str, figures: dict[str, Any] | None = None) -> None:
        """Write the summary, in a thread of its own: W&B, or a lock that the main thread holds, must not keep us."""
        thread = threading.Thread(target=self.finish, args=(status, reason, figures or {}), daemon=True)
        thread.start()
        thread.join(FINISH_SECONDS)

    def _await_summary(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (read_summary(self.run_dir) or {}).get("status") == "running" and time.monotonic() < deadline:
            self._hear_signals(time.monotonic())
            time.sleep(TICK_SECONDS)

    def _final_code(self) -> int:
        status = (read_summary(self.run_dir) or {}).get("status", "") if self.attempt is not None else ""
        return EXIT_CODES.get(status, EXIT_FAILED)

    # --- hangs --------------------------------------------------------------------------------------------------------

    def _write_stacks(self, why: str) -> None:
        """rank<N>.stacks: one line for rank 0, then what every thread of this process is doing."""
        note = {"attempt": self.attempt, "rank": self.rank, "phase": self.phase, "phases": self.phases, "why": why}
        try:
            with open(stacks_of(self.run_dir, self.rank), "w", encoding="utf-8") as file:
                file.write(json.dumps({**note, "waits": waits_in_a_collective()}) + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as fault:  # the disk is full, which may be why it hangs
            show(f"{fault}; the stacks of rank {self.rank} are here:", sys.stderr)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)

    def _notes(self) -> dict[int, dict[str, Any]]:
        """What the ranks said of themselves, as far as they did within NOTES_SECONDS."""
        notes: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + NOTES_SECONDS
        while True:
            for rank in {peer.rank for peer in self.peers} - notes.keys():
                with contextlib.suppress(OSError, json.JSONDecodeError):
                    with open(stacks_of(self.run_dir, rank), encoding="utf-8") as file:
                        note = json.loads(file.readline())
                    if note["attempt"] == self.attempt:
                        notes[rank] = note
            if len(notes) == len(self.peers) or time.monotonic() > deadline:
                return notes
            time.sleep(TICK_SECONDS / 5)

    def _who_hangs(self) -> str:
        """The ranks that the others seem to wait for."""
        notes = self._notes()
        silent = [f"rank {peer.rank}" for peer in self.peers if peer.rank not in notes]
        if silent:
            return f"no word from {', '.join(silent)}"
        waiting = [rank for rank, note in notes.items() if note["waits"]] if self.collectives_block else []
        behind = min(note["phases"] for note in notes.values())
        if 0 < len(waiting) < len(notes):
            title, ranks = "not waiting in a collective", [rank for rank in notes if rank not in waiting]
        else:
            title, ranks = "furthest behind", [rank for rank in notes if notes[rank]["phases"] == behind]
        if len(ranks) == len(notes):
            return f"all of them in {self.phase!r}"
        return f"{title}: " + ", ".join(f"rank {rank} (in {notes[rank]['phase']!r})" for rank in sorted(ranks))


def requests_of(run_dir: Path) -> Path:
    return run_dir / "requests.jsonl"


def stacks_of(run_dir: Path, rank: int) -> Path:
    return run_dir / f"rank{rank}.stacks"


def waits_in_a_collective() -> bool:
    """Whether a thread of this process is inside torch.distributed, as far as its python frames say."""
    for frame in sys._current_frames().values():
        at: Any = frame
        while at is not None:
            if "/torch/distributed/" in at.f_code.co_filename:
                return True
            at = at.f_back
    return False


def leave(code: int) -> None:
    """End this process and what it started, without waiting for anybody."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(code)
