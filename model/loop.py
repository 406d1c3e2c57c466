"""Instruments of the training loop: the time of a step, the peak of memory, and a stop that all ranks agree on."""

from __future__ import annotations

import resource
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WARM_UP_STEPS = 3  # first steps of every start: allocator, caches and kernels warm up; kept out of throughput


class StepTimer:
    """Seconds of every step: CUDA events on a GPU, so that nothing waits for the device, the clock elsewhere."""

    def __init__(self, device: torch.device | str, profiled_steps: int = 0) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.left_out = WARM_UP_STEPS + profiled_steps  # profiled steps come first after the warm-up, and are slower
        self.marks: list[tuple[Any, Any]] = []
        self.seconds: list[float] = []
        self.read = 0

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self.begun = self._now()

    def stop(self) -> None:
        self.marks.append((self.begun, self._now()))

    def measured(self) -> list[float]:
        """Seconds of all steps after the warm-up and the profile; waits for the device."""
        if self.cuda and self.marks:
            torch.cuda.synchronize()
        for begun, ended in self.marks:
            self.seconds.append(begun.elapsed_time(ended) / 1000 if self.cuda else ended - begun)
        self.marks.clear()
        return self.seconds[self.left_out :]

    def since_last_call(self) -> list[float]:
        """Seconds of the steps since the last call, without those left out."""
        measured = self.measured()
        new, self.read = measured[self.read :], len(measured)
        return new


class StopRequest:
    """SIGTERM, SIGINT and SIGUSR1 ask for a stop, and so does a file, where launch.run can send no signal to the ranks.

    All ranks agree on a step, save and end. A second SIGINT kills.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.asked = False
        self.file = file
        self.interrupts = 0
        self.pending: torch.Tensor | None = None
        self.copied: torch.cuda.Event | None = None
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(name, self._ask)

    def _ask(self, number: int, _: object) -> None:
        self.asked = True
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            raise KeyboardInterrupt

    def agreed_by_all_ranks(self, device: torch.device | str) -> bool:
        """Whether any rank had been asked one step ago. A step late, so that the host need not wait for the device."""
        asked = self.asked or (self.file is not None and self.file.exists())
        flag = torch.full((1,), float(asked), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        previous, self.pending = self.pending, flag
        if torch.device(device).type == "cuda":
            host = torch.empty(1, pin_memory=True)
            host.copy_(flag, non_blocking=True)
            self.copied, copied = torch.cuda.Event(), self.copied
            self.copied.record()
            self.pending = host
            if copied is not None:
                copied.synchronize()
        return previous is not None and bool(previous.item())


def peak_memory_mib(device: torch.device | str) -> float:
    """Peak memory of this process: allocated on its GPU, or resident on a machine without."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def max_over_ranks(value: float, device: torch.device | str) -> float:
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()
