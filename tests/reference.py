"""The slow and obvious: what the MoE layer computes, token by token and route by route, in plain Python."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import MoEConfig


class Routed(NamedTuple):
    """What the layer did; losses with gradient."""

    y_TD: Tensor
    aux_loss: Tensor
    z_loss: Tensor
    entropy: Tensor
    kept: list[tuple[int, int]]  # routes as (token, expert)


def choose(scores_E: Tensor, token: int, config: MoEConfig) -> list[int]:
    """The top_k experts with the largest scores, of those in the top_k_groups groups whose best ones sum to the most.

    Among equal groups, the first met when counting up from token * top_k_groups. Among equal experts, the one nearest
    to where the earlier turns of its group have left off, counting up within the group; then that of the earlier group.
    """
    E, G = config.num_experts, config.num_groups
    size, from_group = E // G, config.top_k // config.top_k_groups
    first = token * config.top_k_groups

    def group_score(group: int) -> float:
        members = scores_E[group * size : (group + 1) * size].tolist()
        return sum(sorted(members, reverse=True)[:from_group])

    def group_place(group: int) -> int:
        return (group - first) % G

    def place(expert: int) -> tuple[int, int]:
        group = expert // size
        earlier_turns = (first + group_place(group)) // G
        return (expert % size - earlier_turns * from_group) % size, group_place(group)

    groups = sorted(range(G), key=lambda group: (-group_score(group), group_place(group)))[: config.top_k_groups]
    allowed = [expert for expert in range(E) if expert // size in groups]
    return sorted(allowed, key=lambda expert: (-scores_E[expert].item(), place(expert)))[: config.top_k]


def keep(gates: list[dict[int, Tensor]], config: MoEConfig) -> list[tuple[int, int]]:
    """The routes (token, expert) that find a slot. gates: by token, of the chosen experts, in order of choice."""
    T, K, E = len(gates), config.top_k, config.num_experts
    routes = [(token, expert) for token in range(T) for expert in gates[token]]
    if config.capacity_factor == 0:
        return routes
    capacity = max(config.min_capacity, math.ceil(Fraction(str(config.capacity_factor)) * T * K / E))
    if config.drop_policy == "probability":
        routes.sort(key=lambda route: -gates[route[0]][route[1]].item())  # stable: earlier tokens first among equals
    kept, used = [], [0] * E
    for token, expert in routes:
        if used[expert] < capacity:
            used[expert] += 1
            kept.append((token, expert))
    return kept


def moe_layer(
    x_TD: Tensor,
    wg_ED: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    config: MoEConfig,
    activation: str = "relu2",
    bias_E: Tensor | None = None,
) -> Routed:
    """One rank's tokens, of one sequence, in training mode."""
    T, E, K = x_TD.shape[0], config.num_experts, config.top_k
    logits_TE = x_TD @ wg_ED.t()
    scores_TE = torch.softmax(logits_TE, dim=-1) if config.score_func == "softmax" else 1 / (1 + torch.exp(-logits_TE))
    probs_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)

    gates: list[dict[int, Tensor]] = []
    for token in range(T):
        wanted_E = scores_TE[token] if bias_E is None else scores_TE[token] + bias_E
        experts = choose(torch.zeros(E) if config.force_balanced else wanted_E, token, config)
        chosen = {expert: scores_TE[token, expert] for expert in experts}
        total = sum(chosen.values()) if config.norm_topk_prob else 1.0
        gates.append({expert: config.routed_scaling_factor * score / total for expert, score in chosen.items()})

    kept = keep(gates, config)
    rows = [torch.zeros_like(x_D) for x_D in x_TD]
    for token, expert in kept:
        rows[token] = rows[token] + gates[token][expert] * mlp(x_TD[token], w1_EFD[expert], w2_EDF[expert], activation)
    share = [sum(expert in chosen for chosen in gates) / T for expert in range(E)]
    aux_loss = E / K * sum(share[expert] * probs_TE[:, expert].mean() for expert in range(E))
    z_loss = (logits_TE.exp().sum(-1).log() ** 2).mean()
    entropy = -(probs_TE * probs_TE.log()).sum(-1).mean()
    return Routed(torch.stack(rows), torch.as_tensor(aux_loss), z_loss, entropy, kept)


def mlp(x_D: Tensor, w1_FD: Tensor, w2_DF: Tensor, activation: str) -> Tensor:
    h = w1_FD @ x_D
    if activation == "swiglu":
        gate, up = h.chunk(2)
        return w2_DF @ (F.silu(gate) * up)
    return w2_DF @ F.relu(h) ** 2


def muon_step(
    weight: Tensor, grad: Tensor, momentum: Tensor, *, lr: float, weight_decay: float, beta: float
) -> tuple[Tensor, Tensor]:
    """(weight, momentum) after one step of Muon on one matrix (kellerjordan.github.io/posts/muon).

    Nesterov momentum as a running mean, five Newton-Schulz steps towards the nearest semi-orthogonal matrix, and a
    scale for tall matrices.
    """
    momentum = beta * momentum + (1 - beta) * grad
    update = orthogonalized(beta * momentum + (1 - beta) * grad)
    rows, columns = weight.shape
    update = math.sqrt(max(1, rows / columns)) * update
    return (1 - lr * weight_decay) * weight - lr * update, momentum


def orthogonalized(matrix: Tensor) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.t() if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.t()
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.t() if tall else x


def adamw_step(
    weight: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, Tensor],
    step: int,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(weight, moments) after step `step` (from 1) of AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2)."""
    first = betas[0] * moments[0] + (1 - betas[0]) * grad
    second = betas[1] * moments[1] + (1 - betas[1]) * grad**2
    update = first / (1 - betas[0] ** step) / ((second / (1 - betas[1] ** step)).sqrt() + eps)
    return (1 - lr * weight_decay) * weight - lr * update, (first, second)
