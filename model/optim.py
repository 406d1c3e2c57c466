"""Which parameter is updated by which optimizer, at what learning rate and decay: AdamW for all, or Muon with AdamW.

    matrices and experts    muon    (each expert is a matrix of its own, and is orthogonalised on its own)
    the router's gate       run.train.router_optimizer
    embeddings, value embeddings, lm_head, norms    adamw

Muon is DeepSpeed's (Jordan et al., kellerjordan.github.io/posts/muon), AdamW is torch's. Decay is for what multiplies:
not for embeddings, and not for norms. Muon's momentum has the type of the gradients that DeepSpeed hands it: bf16 in a
bf16 run, fp32 where the update is offloaded to the host (deepspeed 0.19.8).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer
from torch import nn

BETAS, EPS, WEIGHT_DECAY, MOMENTUM = (0.9, 0.999), 1e-8, 0.01, 0.95  # where the file states none


@dataclass(frozen=True)
class Assignment:
    """How one parameter is updated."""

    name: str
    shape: tuple[int, ...]
    optimizer: str  # "muon" or "adamw"
    lr: float  # at the peak of the schedule
    weight_decay: float
    is_expert: bool


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices that multiply: not for embeddings, and not for vectors."""
    return parameter.ndim >= 2 and "embedding" not in name


def optimizer_of(name: str, parameter: nn.Parameter, section: dict[str, Any], router_optimizer: str | None) -> str:
    """ "muon" or "adamw". `section` is the `optimizer` section of the run file."""
    if section["type"] == "AdamW" or parameter.ndim < 2 or "embedding" in name or name == "lm_head.weight":
        return "adamw"
    if name.endswith(".gate.wg.weight"):
        assert router_optimizer in ("muon", "adamw"), router_optimizer
        return router_optimizer
    return "muon"


def assign(model: nn.Module, section: dict[str, Any], router_optimizer: str | None = None) -> list[Assignment]:
    """The assignment of every parameter that is trained, in the model's order."""
    params = section["params"]
    peak = {
        "muon": params.get("muon_lr", params.get("lr")),
        "adamw": params.get("adam_lr", params.get("lr")),
    }
    rows = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            optimizer = optimizer_of(name, parameter, section, router_optimizer)
            decay = params.get("weight_decay", WEIGHT_DECAY) if decays(name, parameter) else 0.0
            shape = tuple(parameter.shape)
            rows.append(Assignment(name, shape, optimizer, peak[optimizer], decay, is_moe_param(parameter)))
    return rows


def parameter_groups(model: nn.Module, assignments: list[Assignment]) -> list[dict[str, Any]]:
    """Groups by optimizer and decay, experts split off as DeepSpeed's ZeRO and gradient reduction want them.

    `initial_lr` is what set_lr scales, under the name that torch's schedulers use.
    """
    parameters = dict(model.named_parameters())
    groups: dict[str, dict[str, Any]] = {}
    for row in assignments:
        name = f"{row.optimizer}_{'decay' if row.weight_decay else 'no_decay'}"
        settings = {
            "name": name,
            "lr": row.lr,
            "initial_lr": row.lr,
            "weight_decay": row.weight_decay,
            "use_muon": row.optimizer == "muon",
        }
        groups.setdefault(name, {**settings, "params": []})["params"].append(parameters[row.name])
    split = split_params_into_different_moe_groups_for_optimizer(list(groups.values()))
    return [group for group in split if group["params"]]


def build_optimizer(
    model: nn.Module, section: dict[str, Any], router_optimizer: str | None = None, fused: bool = False
) -> torch.optim.Optimizer:
    """The optimizer that the `optimizer` section of a DeepSpeed file names, for `deepspeed.initialize`.

    Args:
        router_optimizer: "muon" or "adamw" under Muon, None under AdamW.
        fused: AdamW's update in one kernel: for a GPU, and for an update that is offloaded to the host.

    ZeRO-1/2 run Muon on whole matrices while they fill their partition of the gradients; they know the matrices by the
    attribute `use_muon`, which is set here.
    """
    assignments = assign(model, section, router_optimizer)
    groups = parameter_groups(model, assignments)
    params = section["params"]
    adamw = {
        "betas": tuple(params.get("betas", BETAS)),
        "eps": params.get("eps", EPS),
        "fused": True if fused else None,
    }
    if section["type"] == "AdamW":
        return torch.optim.AdamW(groups, **adamw)

    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam  # loads torch's compiler: seconds

    for group in groups:
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
        if group["use_muon"]:
            group["momentum"] = params.get("momentum", MOMENTUM)
            group["ns_method"] = params.get("ns_method", "gram")
        else:
            group |= adamw
    return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs=adamw)


def set_lr(optimizer: Any, factor: float) -> None:
    """Scale the peak learning rate of every group of an optimizer, DeepSpeed's wrappers included."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["initial_lr"]


# --- telling --------------------------------------------------------------------------------------------------------

NUMBER_IN_NAME = re.compile(r"\.\d+\.")


def assignment_table(assignments: list[Assignment], ep_size: int) -> str:
    """For people: one line for all parameters that differ only in the number of their block or expert.

    Counts are over all expert-parallel ranks.
    """
    counts: dict[tuple[Any, ...], int] = {}
    for row in assignments:
        name = NUMBER_IN_NAME.sub(".*.", row.name)
        key = (name, row.shape[-2:], row.optimizer, row.lr, row.weight_decay)
        stacked = row.shape[0] if len(row.shape) == 3 else 1  # experts, one matrix each
        counts[key] = counts.get(key, 0) + stacked * (ep_size if row.is_expert else 1)
    cells = [("parameter", "count", "shape", "optimizer", "lr", "decay")]
    for (name, shape, optimizer, lr, decay), count in counts.items():
        cells.append((name, str(count), " x ".join(map(str, shape)), optimizer, f"{lr:g}", f"{decay:g}"))
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)
    return "\n".join(lines)
