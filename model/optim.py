"""Parameter groups, the optimizer, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices that multiply: not for embeddings, and not for vectors."""
    return parameter.ndim >= 2 and "embedding" not in name


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Named groups with and without decay, experts split off as DeepSpeed's ZeRO and gradient reduction want them."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"name": "decay", "weight_decay": weight_decay, "params": [p for name, p in named if decays(name, p)]},
        {"name": "no_decay", "weight_decay": 0.0, "params": [p for name, p in named if not decays(name, p)]},
    ]
    return [group for group in split_params_into_different_moe_groups_for_optimizer(groups) if group["params"]]


def build_optimizer(model: nn.Module, params: dict[str, Any], fused: bool = False) -> torch.optim.AdamW:
    """torch's AdamW from the `optimizer.params` of a DeepSpeed file; fused on CUDA, nothing compiled at start-up."""
    groups = parameter_groups(model, params.get("weight_decay", 0.01))
    return torch.optim.AdamW(
        groups,
        lr=params["lr"],
        betas=tuple(params.get("betas", (0.9, 0.999))),
        eps=params.get("eps", 1e-8),
        fused=True if fused else None,
    )


def lr_factor(step: int, *, num_steps: int, schedule: str, warmup_steps: int, decay_frac: float) -> float:
    """Factor on the base learning rate for the update of `step` (from 0): a linear warm-up times the schedule.

    wsd stays at 1 and falls linearly over the last decay_frac of the run; cosine falls over all steps after the
    warm-up. Both would reach 0 at step num_steps, so the last update still moves.
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if schedule == "wsd":
        decay_steps = max(1, math.ceil(decay_frac * num_steps))
        return warmup * min(1.0, (num_steps - step) / decay_steps)
    if schedule == "cosine":
        progress = max(0, step - warmup_steps) / max(1, num_steps - warmup_steps)
        return warmup * 0.5 * (1 + math.cos(math.pi * progress))
    assert schedule == "constant", schedule
    return warmup


def set_lr(optimizer: Any, lr: float) -> None:
    """Set the learning rate of every group of an optimizer, DeepSpeed's wrappers included."""
    for group in optimizer.param_groups:
        group["lr"] = lr
