"""How kernels are timed: CUDA events, a warm-up, rounds in which all that is compared takes its turn.

A sample is the mean over some iterations in a row; a figure is the median of the samples, a ratio the median of the
ratios within a round, so that a clock that moves moves both sides.

Launching takes the host longer than some of these kernels take the GPU. Where launches are hidden, the GPU is made to
wait until the host has queued the iterations; in a training step the queue is as full.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from tools.gpu_check.child import Row, device_answers, faults, in_one_line

WARM_UP, ITERATIONS, ROUNDS = 20, 20, 3
WARM_UP_S = 1.0  # of what is slow fewer iterations warm up
SAMPLE_MS = 400.0  # and a sample takes fewer
FEWEST = 3
CYCLES_PER_MS = 2e6  # of the GPU, at the most: 1.98 GHz on H100 and H200
MOST_HIDDEN_MS = 60.0

Step = Callable[[], Any]


@dataclass
class Series:
    """What was measured of one step."""

    ms: list[float] = field(default_factory=list)  # one per round
    iterations: int = 1
    warm_up: int = 1
    first_call_s: float = 0.0  # compiling included
    host_ms: float = 0.0  # to queue one iteration
    error: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.ms)


def measure(steps: dict[str, Step], device: torch.device, hide_launches: bool) -> dict[str, Series]:
    """Time all steps. One that raises says why, and is left out from there on."""
    measured = {name: Series() for name in steps}
    for name, step in steps.items():
        attempt(measured[name], partial(warm_up, step, measured[name], device))
    for _ in range(ROUNDS):
        for name, step in steps.items():
            series = measured[name]
            if series.error is None:
                attempt(series, partial(sample, step, series, device, hide_launches))
    return measured


def attempt(series: Series, action: Callable[[], None]) -> None:
    """A fault is the series'; one that takes the GPU away is the process's."""
    try:
        action()
    except faults() as fault:
        if not device_answers():
            raise
        series.error = in_one_line(fault)


def warm_up(step: Step, series: Series, device: torch.device) -> None:
    begun = time.perf_counter()
    step()
    wait(device)
    series.first_call_s = time.perf_counter() - begun
    if device.type == "cpu":
        return
    begun, series.warm_up = time.perf_counter(), 1
    while series.warm_up < WARM_UP and time.perf_counter() - begun < WARM_UP_S:
        step()
        wait(device)
        series.warm_up += 1
    ms = 1000 * (time.perf_counter() - begun) / max(1, series.warm_up - 1)
    series.iterations = max(FEWEST, min(ITERATIONS, int(SAMPLE_MS / ms)))
    begun = time.perf_counter()
    step()
    series.host_ms = 1000 * (time.perf_counter() - begun)
    wait(device)


def sample(step: Step, series: Series, device: torch.device, hide_launches: bool) -> None:
    if device.type == "cpu":
        begun = time.perf_counter()
        step()
        series.ms.append(1000 * (time.perf_counter() - begun))
        return
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    wait(device)
    if hide_launches:
        hidden_ms = min(MOST_HIDDEN_MS, 1.5 * series.host_ms * series.iterations)
        torch.cuda._sleep(int(hidden_ms * CYCLES_PER_MS))  # type: ignore[no-untyped-call]
    first.record()
    for _ in range(series.iterations):
        step()
    last.record()
    wait(device)
    series.ms.append(first.elapsed_time(last) / series.iterations)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def figures(series: Series, hide_launches: bool, flops: int | None = None, moved_bytes: int | None = None) -> Row:
    """The numbers of one step, and how they were measured; or why there are none."""
    if series.error is not None:
        return {"error": series.error}
    row: Row = {
        "ms": series.median,
        "ms_rounds": [round(ms, 5) for ms in series.ms],
        "rounds": len(series.ms),
        "iterations": series.iterations,
        "warm_up": series.warm_up,
        "launches": "hidden" if hide_launches else "as they come",
    }
    if flops is not None:
        row |= {"tflops": flops / series.median / 1e9, "gflop": flops / 1e9}
    if moved_bytes is not None:
        row |= {"gb_per_s": moved_bytes / series.median / 1e6, "mib_moved": moved_bytes / 2**20}
    return row


def speed_over(series: Series, base: Series | None) -> float | None:
    """How many times as fast as `base`, within rounds; None unless both were measured."""
    if base is None or series.error is not None or base.error is not None:
        return None
    return statistics.median(theirs / ours for theirs, ours in zip(base.ms, series.ms, strict=True))
