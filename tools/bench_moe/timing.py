"""How blocks are timed: one clock per device, samples that are not a moment, memory that stays in the process.

A block's sample in a round is its mean time over a number of steps in a row: as many as fill 100 ms on a CPU, 20 on a
GPU.
"""

from __future__ import annotations

import ctypes
import gc
import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.config import ConfigError
from tools.bench_moe.rounds import order_of_round

SAMPLE_MS = 100.0
CPU_WARM_UP, MOST_STEPS = 3, 50
CUDA_STEPS = 20  # of the warm-up, and of a sample
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names and numbers of malloc.h

# What third parties' code raises when a block cannot be built or run. An interrupt, say, ends the benchmark.
FAULTS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError,
          TypeError, ValueError)  # fmt: skip

Step = Callable[[], None]


@dataclass
class Series:
    """What was measured of one block. Times in ms per step, one per round."""

    ms: list[float] = field(default_factory=list)
    minor_faults: list[float] = field(default_factory=list)  # per step; on a CPU
    steps_per_sample: int = 1
    first_step_s: float = 0.0  # compiling included
    peak_memory_mib: float | None = None  # on a GPU: of one step, over what was allocated before it
    error: str | None = None


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed instead of returning it to the kernel; False if this C library has no such switch.

    glibc maps every large block anew and unmaps it when it is freed, so that on each step the kernel zeroes the pages
    of all activations again. A training step of a real model is that wasteful at most in part; a block alone is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, -1) == 1


def find_device(kind: str) -> torch.device:
    """Raises ConfigError if this machine has no such device."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine shows no GPU to torch. Use --device cpu, or another machine.")
    return torch.device(kind)


def describe_device(device: torch.device) -> dict[str, Any]:
    """Of `env`: the device, and how torch uses it and the CPU."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        **({"cuda": torch.version.cuda} if on_gpu else {}),
        "threads": torch.get_num_threads(),
        "cpu_vectors": torch.backends.cpu.get_cpu_capability(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def ms_per_step(step: Step, steps: int, device: torch.device) -> float:
    """Mean time of some steps in a row: CUDA events on a GPU, the clock elsewhere."""
    if device.type == "cuda":
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begun.record()
        for _ in range(steps):
            step()
        ended.record()
        torch.cuda.synchronize()
        return begun.elapsed_time(ended) / steps
    begun_at = time.perf_counter()
    for _ in range(steps):
        step()
    return 1000 * (time.perf_counter() - begun_at) / steps


def measure(steps: dict[str, Callable[..., None]], inputs: tuple[Tensor, ...], rounds: int) -> dict[str, Series]:
    """Time all steps in turn, each called with the inputs. One that raises is left out from there on, and says why."""
    device = inputs[0].device
    ready = {name: partial(step, *inputs) for name, step in steps.items()}
    measured = {name: Series() for name in ready}
    for prepare in (first_step, warm_up):  # one after the other: the first step of one block may disturb another
        for name, step in ready.items():
            if measured[name].error is None:
                attempt(measured[name], partial(prepare, step, measured[name], device))
    gc.collect()
    gc.freeze()  # no later collection goes through all that was imported and built so far
    names = list(ready)
    for number in range(rounds):
        for place in order_of_round(number, len(names)):
            series, step = measured[names[place]], ready[names[place]]
            if series.error is None:
                attempt(series, partial(sample, step, series, device))
    gc.unfreeze()
    return measured


def attempt(series: Series, action: Callable[[], None]) -> None:
    try:
        action()
    except FAULTS as fault:
        series.error = in_one_line(fault)


def in_one_line(fault: BaseException) -> str:
    return f"{type(fault).__name__}: {' '.join(str(fault).split())[:300]}"


def first_step(step: Step, series: Series, device: torch.device) -> None:
    series.first_step_s = ms_per_step(step, 1, device) / 1000


def warm_up(step: Step, series: Series, device: torch.device) -> None:
    """Run some more steps, and decide from their time how many make a sample."""
    if device.type == "cuda":
        ms_per_step(step, CUDA_STEPS - 1, device)
        series.steps_per_sample = CUDA_STEPS
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ms_per_step(step, 1, device)
        series.peak_memory_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    else:
        fastest = min(ms_per_step(step, 1, device) for _ in range(CPU_WARM_UP - 1))
        series.steps_per_sample = min(MOST_STEPS, math.ceil(SAMPLE_MS / fastest))


def sample(step: Step, series: Series, device: torch.device) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    series.ms.append(ms_per_step(step, series.steps_per_sample, device))
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    if device.type == "cpu":
        series.minor_faults.append(faults / series.steps_per_sample)
