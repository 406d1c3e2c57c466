"""Instruments of the training loop: the time of a step, the peak of memory, and a stop that all ranks agree on."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

SLOW_SECONDS = 1.0
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
    """The agreement of all ranks to stop. Each knows of a request by itself (launch/rank_watch.py), or does not yet.

    All ranks ask at the same places: after every step, between the batches of a validation, before a sample.
    """

    def __init__(self, asked: Callable[[], bool], stand_by: Callable[[], None]) -> None:
        self.asked, self.stand_by = asked, stand_by
        self.agreed = False
        self.slow = False
        self.last_call = math.inf
        self.pending: tuple[torch.Tensor, torch.cuda.Event | None] | None = None

    def agreed_by_all_ranks(self, device: torch.device | str, wait: bool = False) -> bool:
        """Whether any rank knew of a request; once it is so, it stays so.

        On a GPU the answer is that of the call before, so that the host need not wait for the device; unless `wait`, or
        more than SLOW_SECONDS passed between calls, when waiting costs little and a step later would be late.
        """
        if self.agreed:
            return True
        now = time.monotonic()
        slow, self.last_call = now - self.last_call > SLOW_SECONDS, now
        previous, self.pending = self.pending, self._told(2.0 if self.asked() else float(slow), device)
        newest = self.pending if wait or self.slow or self.pending[1] is None else previous
        answer = max(self._read(flag) for flag in (previous, newest))
        self.slow = answer == 1.0
        self.agreed = answer > 1.0
        if self.agreed:
            self.stand_by()
        return self.agreed

    def _told(self, value: float, device: torch.device | str) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """The largest value of all ranks, on its way to the host."""
        flag = torch.full((1,), value, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if torch.device(device).type != "cuda":
            return flag, None
        host = torch.empty(1, pin_memory=True)
        host.copy_(flag, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return host, copied

    def _read(self, flag: tuple[torch.Tensor, torch.cuda.Event | None] | None) -> float:
        if flag is None:
            return 0.0
        if flag[1] is not None:
            flag[1].synchronize()
        return flag[0].item()


def peak_memory_mib(device: torch.device | str) -> float:
    """Peak memory of this process: allocated on its GPU, or resident on a machine without."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def max_over_ranks(value: float, device: torch.device | str) -> float:
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


def told_by_all_ranks(own: Any) -> list[Any]:
    """What every rank passed, in rank order, on every rank."""
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, own)
    return told
