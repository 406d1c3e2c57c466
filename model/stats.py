"""From the statistics that forward returns to the numbers that a person reads, over micro-steps and ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from model.gpt import Stats


class StepStats:
    """Sums the statistics of one optimizer step on the device; nothing is copied to the host before `reduce`."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._shape = (0, 0)

    def add(self, stats: Stats) -> None:
        """Add one micro-step."""
        self._shape = (stats.tokens_per_expert_ME.shape[0], stats.tokens_per_expert_ME.shape[1])
        # float64 holds the counts exactly
        one = stats.cross_entropy.new_ones(1)
        parts = (
            stats.cross_entropy.view(1),
            one,
            stats.aux_loss_M,
            stats.dropped_M,
            stats.tokens_per_expert_ME.flatten(),
        )
        flat = torch.cat([part.double() for part in parts])
        self._sum = flat if self._sum is None else self._sum + flat

    def reduce(self, moe_layers: list[int]) -> dict[str, float]:
        """Metrics of the step over all ranks: one all-reduce and one copy to the host. All ranks call this."""
        assert self._sum is not None, "no micro-step was added"
        dist.all_reduce(self._sum)
        (loss, count), rest = self._sum[:2].tolist(), self._sum[2:].cpu()
        M, E = self._shape
        metrics = {"train/loss": loss / count}
        if M:
            aux_M, dropped_M, tokens_ME = rest[:M] / count, rest[M : 2 * M], rest[2 * M :].view(M, E)
            metrics |= {"train/aux_loss": float(aux_M.mean())}
            metrics |= load_metrics(tokens_ME, dropped_M, moe_layers)
            for layer, aux in zip(moe_layers, aux_M.tolist(), strict=True):
                metrics[f"moe/layer_{layer}/aux_loss"] = aux
        return metrics


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
    metrics = {
        "moe/load_max_over_mean": float(max_over_mean_M.max()),
        "moe/load_cv": float(cv_M.mean()),
        "moe/dead_experts": float(dead_M.sum()),
        "moe/dropped_frac": float(dropped_M.sum() / tokens_ME.sum()),
    }
    for row, layer in enumerate(moe_layers):
        metrics[f"moe/layer_{layer}/load_max_over_mean"] = float(max_over_mean_M[row])
        metrics[f"moe/layer_{layer}/load_cv"] = float(cv_M[row])
        metrics[f"moe/layer_{layer}/dead_experts"] = float(dead_M[row])
        metrics[f"moe/layer_{layer}/dropped_frac"] = float(dropped_frac_M[row])
    return metrics
