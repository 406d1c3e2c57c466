"""Which rank does what. Pure arithmetic; nothing here touches torch or the network.

With 8 GPUs and ep_size=4:
    expert-parallel groups  (exchange tokens, all-to-all)   [0 1 2 3] [4 5 6 7]
    expert-data groups      (average expert gradients)      [0 4] [1 5] [2 6] [3 7]
    data-parallel group     (average all other gradients)   [0 1 2 3 4 5 6 7]
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from launch.memory import ASSUMED_GPU_BYTES, GIB, USABLE_FRAC, estimate_memory, query_gpus
from launch.run_config import Run
from model.config import ConfigError

CPU_RANKS = 2  # what num_gpus="auto" means on a machine without GPUs: enough to exercise every collective


@dataclass(frozen=True)
class Topology:
    """Ranks and their groups, and what follows from their number."""

    num_nodes: int
    gpus_per_node: int
    ep_size: int
    ep_size_reason: str
    accumulation_steps: int

    @property
    def ranks(self) -> int:
        return self.num_nodes * self.gpus_per_node

    @property
    def expert_parallel_groups(self) -> list[list[int]]:
        """Ranks that together hold all experts, `ep_size` neighbours each."""
        return [list(range(first, first + self.ep_size)) for first in range(0, self.ranks, self.ep_size)]

    @property
    def expert_data_groups(self) -> list[list[int]]:
        """Ranks that hold the same experts."""
        return [list(range(first, self.ranks, self.ep_size)) for first in range(self.ep_size)]

    def picture(self) -> str:
        """The groups as brackets, for people."""

        def brackets(groups: list[list[int]]) -> str:
            shown = [f"[{' '.join(map(str, group))}]" for group in groups]
            return " ".join(shown) if len(shown) <= 8 else f"{' '.join(shown[:7])} ... {shown[-1]}"

        return "\n".join(
            [
                f"{counted(self.num_nodes, 'node')} x {self.gpus_per_node} = {counted(self.ranks, 'rank')}, "
                f"ep_size {self.ep_size} ({self.ep_size_reason})",
                f"  expert-parallel groups  (exchange tokens, all-to-all)   {brackets(self.expert_parallel_groups)}",
                f"  expert-data groups      (average expert gradients)      {brackets(self.expert_data_groups)}",
                f"  data-parallel group     (average all other gradients)   {brackets([list(range(self.ranks))])}",
            ]
        )


def resolve_topology(run: Run, num_nodes: int, gpus_per_node: int) -> Topology:
    """Fit a run to its ranks: accumulation steps and ep_size, or a ConfigError that names the way out."""
    ranks = num_nodes * gpus_per_node
    where = f"the {counted(ranks, 'rank')} ({counted(num_nodes, 'node')} x {counted(gpus_per_node, 'GPU')})"
    per_micro_step = run.micro_batch_size * ranks
    if run.train_batch_size % per_micro_step:
        usable = [n for n in divisors(run.train_batch_size // run.micro_batch_size) if n < ranks]
        ranks_listed = f"{listed(usable)} rank{'s' * (usable[-1] > 1)}"
        raise ConfigError(
            f"train_batch_size={run.train_batch_size} is not a multiple of train_micro_batch_size_per_gpu="
            f"{run.micro_batch_size} times {where}. Use {ranks_listed}, or other batch sizes."
        )
    accumulation = run.train_batch_size // per_micro_step
    stated = run.deepspeed.get("gradient_accumulation_steps", accumulation)
    if stated != accumulation:
        raise ConfigError(
            f"gradient_accumulation_steps={stated} contradicts train_batch_size={run.train_batch_size} = "
            f"{run.micro_batch_size} per GPU x {accumulation} steps x {ranks} ranks. Remove it: it is derived."
        )
    ep_size, reason = resolve_ep_size(run, ranks, where)
    refuse_static_shapes_that_change(run, ep_size)
    return Topology(num_nodes, gpus_per_node, ep_size, reason, accumulation)


def refuse_static_shapes_that_change(run: Run, ep_size: int) -> None:
    """Dropless experts on several ranks receive as many rows as the others send, another number in every step."""
    moe = run.model.moe
    if run.compile.mode == "static" and moe is not None and moe.capacity_factor == 0 and ep_size > 1:
        raise ConfigError(
            f"run.compile.mode='static' with run.model.moe.capacity_factor=0.0 (dropless) at ep_size={ep_size}: the "
            "number of rows that a rank receives changes in every step. Use 'dynamic' or 'none', ep_size 1, or a "
            "capacity_factor."
        )


def resolve_ep_size(run: Run, ranks: int, where: str) -> tuple[int, str]:
    """The ep_size of this run and why. A number in the file is checked, never changed."""
    asked = run.launch.ep_size
    if run.model.moe is None:
        if asked not in ("auto", "max", 1):
            raise ConfigError(
                f"run.launch.ep_size={asked} has no effect in a dense model. Remove it, or add run.model.moe."
            )
        return 1, "the model is dense"
    experts = run.model.moe.num_experts
    usable = divisors(math.gcd(ranks, experts))
    if asked == "max":
        return usable[-1], f"max: the largest that divides {ranks} ranks and {experts} experts"
    if asked == "auto":
        return smallest_that_fits(run, ranks, usable)
    if ranks % asked:
        raise ConfigError(f"run.launch.ep_size={asked} does not divide {where}. Use {listed(usable)}.")
    if experts % asked:
        raise ConfigError(
            f"run.launch.ep_size={asked} does not divide run.model.moe.num_experts={experts}. Use {listed(usable)}."
        )
    return asked, "as the file says"


def smallest_that_fits(run: Run, ranks: int, usable: list[int]) -> tuple[int, str]:
    """ep_size "auto": all-to-all costs time, so the fewest ranks that must share the experts."""
    gpus = query_gpus()
    capacity = min(gpus) if gpus else ASSUMED_GPU_BYTES
    source = "GPU" if gpus else "GPU assumed, none found here"
    for ep_size in usable:
        needed = estimate_memory(run, ranks, ep_size).total
        fits = needed <= USABLE_FRAC * capacity
        if fits or ep_size == usable[-1]:
            verdict = "the smallest that fits" if fits else "the largest there is, and it may not fit"
            return ep_size, (
                f"auto: {verdict}; about {needed / GIB:.1f} GiB a rank, and {USABLE_FRAC:.0%} of "
                f"{capacity / GIB:.0f} GiB can be used ({source})"
            )
    raise AssertionError("1 divides everything")


def resolve_num_gpus(run: Run) -> tuple[int, bool, str]:
    """GPUs (or CPU ranks) per node that launch.run starts, whether they are GPUs, and why so many.

    A number is never changed. "auto" takes the most visible GPUs that the batch divides among; without any, CPU_RANKS.
    """
    visible = visible_gpus()
    asked = run.launch.num_gpus
    if isinstance(asked, int):
        return asked, visible > 0, "as the file says"
    limit = visible or CPU_RANKS
    chosen = max(n for n in divisors(run.train_batch_size // run.micro_batch_size) if n <= limit)
    if not visible:
        return chosen, False, "auto: no GPU here, ranks on the CPU"
    why = "every visible GPU" if chosen == visible else f"of {visible} visible GPUs, the most that divide the batch"
    return chosen, True, f"auto: {why}"


def visible_gpus() -> int:
    """GPUs that a process started here would see."""
    listed_devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = len(query_gpus())
    if listed_devices is None:
        return found
    return min(found, len([device for device in listed_devices.split(",") if device.strip() not in ("", "-1")]))


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number > 1)}"


def listed(numbers: list[int]) -> str:
    return f"one of {', '.join(map(str, numbers))}" if len(numbers) > 1 else str(numbers[0])
