"""What goes wrong in a rank, and when: faults that faulty_train.py makes happen in the real train.py.

A plan is a list of faults in the variable MOELAB_TEST_FAULTS, which nothing outside tests/ reads:

    SIGKILL, SIGTERM, SIGINT, SIGUSR1   to the rank itself, or to what stands above it (target)
    power     as after a power cut: all ranks end at once, and what was not flushed (fsync) of the checkpoints is gone
    nan       the loss of this rank is NaN in the optimizer step `step`
    hang      the thread that reaches the phase never returns
    slow      ... only after `seconds`
    full      from the phase on, files under `file` take `bytes` more, then none: "No space left on device"
    truncate  the newest file that `file` (a glob) names in the run folder loses all but its first `bytes`
    flip      ... has one bit flipped in byte `bytes`, counted around its end

All but nan happen when the rank reaches `phase` (model/phases.py) for the `times`-th time, counted from step `step` on.
What has happened is noted in the folder MOELAB_TEST_NOTES, with what the rank was doing: faults in faults.jsonl.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PLAN, NOTES, RUN_DIR = "MOELAB_TEST_FAULTS", "MOELAB_TEST_NOTES", "MOELAB_TEST_RUN_DIR"
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1")
ABOVE = ("rank", "launch.py", "deepspeed", "launch.run")  # a rank and what stands above it: parents, one by one
MAIN_PHASES = ("build", "load", "forward", "backward", "update", "validation", "sample", "save: copy")
WRITER_PHASES = ("save: write", "save: manifest", "save: rename", "save: latest", "save: retention")
SLOT = 64  # bytes of a phase in the notes


@dataclass(frozen=True)
class Fault:
    """One fault of one rank."""

    kind: str
    rank: int
    phase: str = ""
    times: int = 1
    step: int = 0
    target: str = "rank"
    seconds: float = 0.0
    bytes: int = 0
    file: str = ""

    def __str__(self) -> str:
        told = {name: value for name, value in asdict(self).items() if value and name not in ("kind", "rank")}
        return " ".join([self.kind, f"rank={self.rank}", *(f"{name}={value!r}" for name, value in told.items())])


def plan_as_text(faults: list[Fault]) -> str:
    return json.dumps([asdict(fault) for fault in faults])


def install(rank: int) -> None:
    """Make this process, which is about to run train.py, meet the faults that the plan has for it."""
    from model import phases

    plan = [Fault(**fault) for fault in json.loads(os.environ.get(PLAN, "[]"))]
    injector = Injector([fault for fault in plan if fault.rank == rank], rank)
    if any(fault.kind == "power" for fault in plan):  # of any rank
        injector.note_what_is_flushed()
    phases.listeners.append(injector)


class Injector:
    """The listener of one rank."""

    def __init__(self, faults: list[Fault], rank: int) -> None:
        self.pending = {fault: fault.times for fault in faults}
        self.rank, self.step, self.lock = rank, 0, threading.Lock()
        self.run_dir = Path(os.environ.get(RUN_DIR, "."))
        self.notes = Path(os.environ[NOTES]) if NOTES in os.environ else None
        self.phase_file, self.began = -1, time.time()
        if self.notes is not None:
            self.phase_file = os.open(self.notes / f"phase{rank}", os.O_RDWR | os.O_CREAT)
            (self.notes / f"port{rank}").write_text(os.environ.get("MASTER_PORT", ""))

    def __call__(self, phase: str) -> None:
        if self.phase_file >= 0:
            os.pwrite(self.phase_file, phase.ljust(SLOT).encode(), SLOT * phase.startswith("save: "))
        if phase == "build":
            self.follow_steps()
        for fault in self.due(phase):
            self.note(fault, phase)
            HAPPENS[fault.kind](self, fault)

    def due(self, phase: str) -> list[Fault]:
        """The faults whose moment this is; each comes once."""
        with self.lock:  # the writer's thread reaches phases too
            here = [fault for fault in self.pending if fault.phase == phase and self.step >= fault.step]
            for fault in here:
                self.pending[fault] -= 1
            now = [fault for fault in here if self.pending[fault] == 0]
            for fault in now:
                del self.pending[fault]
        return now

    def note(self, fault: Fault, phase: str) -> None:
        """Before it happens: a process that kills itself says nothing afterwards."""
        if self.notes is None:
            return
        line = {"time": time.time(), "fault": str(fault), "phase": phase, "step": self.step}
        with open(self.notes / "faults.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def follow_steps(self) -> None:
        """Know from now on which optimizer step is under way, and spoil the loss of the one that the plan names."""
        from model.gpt import GPT

        trainer = sys.modules["__main__"].Trainer
        train_step, forward = trainer.train_step, GPT.forward

        def followed(train: Any) -> Any:
            self.step = train.step + 1
            return train_step(train)

        def spoiled(model: Any, *batch: Any, **options: Any) -> Any:
            loss, stats = forward(model, *batch, **options)
            for fault in [fault for fault in self.pending if fault.kind == "nan" and fault.step == self.step]:
                if model.training:
                    self.note(fault, "forward")
                    del self.pending[fault]
                    loss = loss * float("nan")
            return loss, stats

        trainer.train_step, GPT.forward = followed, spoiled

    def send(self, fault: Fault) -> None:
        import psutil

        me = psutil.Process()
        process = [me, *me.parents()][ABOVE.index(fault.target)]
        process.send_signal(signal.Signals[fault.kind])

    def cut_power(self, fault: Fault) -> None:
        """A file that was not flushed keeps its name and loses its content (what ext4 shows after a crash)."""
        import psutil

        me = psutil.Process()
        others = [process for process in me.parent().children() if process.pid != me.pid]
        for process in others:
            process.kill()
        psutil.wait_procs(others, timeout=10)
        assert self.notes is not None
        flushed = set((self.notes / "flushed").read_text().split())
        for path in (self.run_dir / "checkpoints").rglob("*"):
            if path.is_file() and path.stat().st_mtime > self.began and state_of(path.stat()) not in flushed:
                truncate(path, 0)
        me.kill()

    def note_what_is_flushed(self) -> None:
        assert self.notes is not None
        fsync, states = os.fsync, os.open(self.notes / "flushed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def noted(file: Any) -> None:
            fsync(file)
            os.write(states, f"{state_of(os.fstat(file))}\n".encode())

        os.fsync = noted

    def hang(self, fault: Fault) -> None:
        while True:
            time.sleep(60)

    def slow(self, fault: Fault) -> None:
        time.sleep(fault.seconds)

    def damage(self, fault: Fault) -> None:
        files = sorted(self.run_dir.glob(fault.file), key=lambda path: path.stat().st_mtime_ns)
        if files:
            (truncate if fault.kind == "truncate" else flip_bit)(files[-1], fault.bytes)

    def fill(self, fault: Fault) -> None:
        fill_disk(str(self.run_dir / fault.file), fault.bytes)


HAPPENS: dict[str, Callable[[Injector, Fault], None]] = {
    **dict.fromkeys(SIGNALS, Injector.send),
    "power": Injector.cut_power,
    "hang": Injector.hang,
    "slow": Injector.slow,
    "full": Injector.fill,
    "truncate": Injector.damage,
    "flip": Injector.damage,
}


def state_of(stat: os.stat_result) -> str:
    """A file with the content that it had at some time: an inode alone may be another file's by now."""
    return f"{stat.st_ino}:{stat.st_mtime_ns}"


def truncate(path: Path, size: int) -> None:
    os.truncate(path, min(size, path.stat().st_size))


def flip_bit(path: Path, byte: int, bit: int = 0) -> None:
    """Flip a bit of one byte, counted around the file's end, as a bad disk does: the file's size and times stay."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[byte % len(content)] ^= 1 << bit
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


class FullDisk:
    """The room that is left for all files together that are opened for writing from now on."""

    def __init__(self, left: int) -> None:
        self.left, self.lock = left, threading.Lock()

    def take(self, wanted: int) -> int:
        with self.lock:
            taken = min(wanted, self.left)
            self.left -= taken
        return taken


class FileOnFullDisk(io.FileIO):
    """A file that takes what there is room for, as the kernel does: less than asked, then "No space left on device"."""

    room: FullDisk

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        taken = self.room.take(size)
        if size and not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
        return super().write(memoryview(data).cast("B")[:taken])


def fill_disk(folder: str, size: int) -> None:
    """From now on, files under `folder` that this process opens for writing take `size` bytes in all."""
    room, really_open = FullDisk(size), io.open

    def open_on_full_disk(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **options: Any) -> Any:
        is_path = isinstance(file, str | os.PathLike)
        if not is_path or not str(file).startswith(folder) or not set(mode) & set("wax+"):
            return really_open(file, mode, buffering, *rest, **options)
        raw = FileOnFullDisk(file, mode.replace("b", "").replace("t", ""))
        raw.room = room
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return raw if buffering == 0 else buffered
        encoding = rest[0] if rest else options.get("encoding")
        return io.TextIOWrapper(buffered, encoding=encoding or "utf-8", newline=options.get("newline"))

    builtins.open = io.open = open_on_full_disk  # pathlib takes io.open
