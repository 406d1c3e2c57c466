"""From the statistics that forward returns to the numbers that a person reads, over micro-steps and ranks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model.gpt import Stats


class StepTotals(NamedTuple):
    """Sums over the micro-steps and ranks of one optimizer step, on the host. M = number of MoE layers."""

    micro_steps: float  # of all ranks
    cross_entropy: float
    aux_loss_M: Tensor
    z_loss_M: Tensor
    entropy_M: Tensor
    dropped_M: Tensor
    tokens_per_expert_ME: Tensor  # fp64, which holds the counts exactly

    def metrics(self, moe_layers: list[int]) -> dict[str, float]:
        """Metrics by name. moe_layers: block number of each row."""
        metrics = {"train/loss": self.cross_entropy / self.micro_steps}
        if not moe_layers:
            return metrics
        aux_M, z_M, entropy_M = (sums / self.micro_steps for sums in (self.aux_loss_M, self.z_loss_M, self.entropy_M))
        metrics |= {"train/aux_loss": float(aux_M.mean()), "train/z_loss": float(z_M.mean())}
        metrics |= load_metrics(self.tokens_per_expert_ME, self.dropped_M, moe_layers)
        metrics |= of_layers("aux_loss", aux_M, moe_layers) | of_layers("z_loss", z_M, moe_layers)
        num_experts = self.tokens_per_expert_ME.shape[1]
        if num_experts > 1:
            undecided_M = entropy_M / math.log(num_experts)
            metrics["moe/router_entropy"] = float(undecided_M.mean())
            metrics |= of_layers("router_entropy", undecided_M, moe_layers)
        return metrics


class StepStats:
    """Sums the statistics of one optimizer step on the device; nothing is copied to the host before `reduce`."""

    def __init__(self, num_moe_layers: int, num_experts: int, device: torch.device | str) -> None:
        self._shape = (num_moe_layers, num_experts)
        # float64 holds the counts exactly
        self._sum = torch.zeros(2 + num_moe_layers * (4 + num_experts), dtype=torch.float64, device=device)

    def add(self, stats: Stats) -> None:
        """Add one micro-step."""
        parts = (
            stats.cross_entropy.new_ones(1),
            stats.cross_entropy.view(1),
            stats.aux_loss_M,
            stats.z_loss_M,
            stats.entropy_M,
            stats.dropped_M,
            stats.tokens_per_expert_ME.flatten(),
        )
        self._sum = self._sum + torch.cat([part.double() for part in parts])

    @property
    def tokens_per_expert_ME(self) -> Tensor:
        """Of this rank, over the micro-steps so far; on the device, fp64."""
        M, E = self._shape
        return self._sum[2 + 4 * M :].view(M, E)

    def reduce(self) -> StepTotals:
        """Totals of the step over all ranks: one all-reduce and one copy to the host. All ranks call this."""
        M, E = self._shape
        total = self._sum.clone()
        dist.all_reduce(total)
        total = total.cpu()
        count, loss = total[:2].tolist()
        aux_M, z_M, entropy_M, dropped_M = total[2 : 2 + 4 * M].view(4, M)
        return StepTotals(count, loss, aux_M, z_M, entropy_M, dropped_M, total[2 + 4 * M :].view(M, E))


def bias_metrics(bias_ME: Tensor, moe_layers: list[int]) -> dict[str, float]:
    """How far apart the selection biases are: largest minus smallest, by layer and of the widest layer."""
    range_M = bias_ME.amax(1) - bias_ME.amin(1)
    return {"moe/bias_range": float(range_M.max()), **of_layers("bias_range", range_M, moe_layers)}


def of_layers(name: str, value_M: Tensor, moe_layers: list[int]) -> dict[str, float]:
    return {f"moe/layer_{layer}/{name}": value for layer, value in zip(moe_layers, value_M.tolist(), strict=True)}


def load_metrics(tokens_ME: Tensor, dropped_M: Tensor, moe_layers: list[int]) -> dict[str, float]:
    """How evenly the experts were loaded and how many routes were dropped, overall and by layer.

    Args:
        tokens_ME: routes that chose each expert, by layer, before any is dropped.
        dropped_M: routes without a slot, by layer.
        moe_layers: block number of each row.
    """
    mean_M = tokens_ME.mean(1)
    max_over_mean_M = tokens_ME.amax(1) / mean_M
    cv_M = tokens_ME.std(1, correction=0) / mean_M
    dropped_frac_M = dropped_M / tokens_ME.sum(1)
    dead_M = (tokens_ME == 0).sum(1)
    return {
        "moe/load_max_over_mean": float(max_over_mean_M.max()),
        "moe/load_cv": float(cv_M.mean()),
        "moe/dead_experts": float(dead_M.sum()),
        "moe/dropped_frac": float(dropped_M.sum() / tokens_ME.sum()),
        **of_layers("load_max_over_mean", max_over_mean_M, moe_layers),
        **of_layers("load_cv", cv_M, moe_layers),
        **of_layers("dead_experts", dead_M.double(), moe_layers),
        **of_layers("dropped_frac", dropped_frac_M, moe_layers),
    }
