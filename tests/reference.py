"""The slow and obvious: what the MoE layer computes, token by token and route by route, in plain Python."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import MoEConfig


def choose(probs_E: Tensor, token: int, top_k: int) -> list[int]:
    """The top_k most probable experts; among equals, the first met when counting up from token * top_k."""
    E = len(probs_E)
    order = sorted(range(E), key=lambda expert: (-probs_E[expert].item(), (expert - token * top_k) % E))
    return order[:top_k]


def moe_layer(
    x_TD: Tensor, wg_ED: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, config: MoEConfig, activation: str = "relu2"
) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """(y_TD, aux_loss, kept routes as (token, expert)) of one rank's tokens in training mode."""
    T, E, K = x_TD.shape[0], config.num_experts, config.top_k
    capacity = (
        T
        if config.capacity_factor == 0
        else max(config.min_capacity, math.ceil(Fraction(str(config.capacity_factor)) * T * K / E))
    )
    probs_TE = torch.softmax(x_TD @ wg_ED.t(), dim=-1)
    used, chosen_count, kept, rows = [0] * E, [0] * E, [], []
    for token in range(T):
        experts = choose(probs_TE[token], token, K)
        gates = [probs_TE[token, expert] for expert in experts]
        if K > 1:
            total = sum(gates)
            gates = [gate / total for gate in gates]
        row = torch.zeros_like(x_TD[token])
        for expert, gate in zip(experts, gates, strict=True):
            chosen_count[expert] += 1
            if used[expert] < capacity:
                used[expert] += 1
                kept.append((token, expert))
                row = row + gate * mlp(x_TD[token], w1_EFD[expert], w2_EDF[expert], activation)
        rows.append(row)
    aux_loss = E / K * sum(chosen_count[expert] / T * probs_TE[:, expert].mean() for expert in range(E))
    return torch.stack(rows), aux_loss, kept


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
