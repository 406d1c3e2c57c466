"""The MoE layer: DeepSpeed's MoE with our gate, and dispatch and combine by gathering rows.

    x_TD -> router -> dispatch [E, C, D] -> all-to-all -> [ep, L, C, D] -> experts -> all-to-all -> combine -> y_TD

Process groups, parameter flags and checkpoint layout are those of deepspeed.moe.layer.MoE, which the DeepSpeed engine,
ZeRO-1/2 and the gradient reduction understand. T tokens of this rank, E experts, L local experts, C capacity, K top_k.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from deepspeed import comm
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn

from model.config import MoEConfig
from model.profile import part
from model.router import Router, Routing, RoutingStats


class MLP(nn.Module):
    """w2(act(w1(x))), without biases; relu^2 (arXiv 2109.08668) or SwiGLU (arXiv 2002.05202, gate and up in one w1)."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int, activation: str) -> None:
        super().__init__()
        self.gated = activation == "swiglu"
        self.w1 = nn.Linear(hidden_size, (2 if self.gated else 1) * ffn_hidden_size, bias=False)
        self.w2 = nn.Linear(ffn_hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.w1(x)
        if self.gated:
            gate, up = h.chunk(2, dim=-1)
            return self.w2(F.silu(gate) * up)
        return self.w2(F.relu(h).square())


class GatherRows(torch.autograd.Function):
    """rows[index], where index N means a row of zeros; the backward pass gathers too, through the inverse index.

    rows [N, D]; index [...] with values in [0, N]; inverse [N, J] with values in [0, index.numel()]: inverse[n] lists
    the places of the output that row n went to (index.numel() for none). No atomics: the gradient is deterministic.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return with_zero_row(rows)[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return with_zero_row(grad.reshape(-1, grad.shape[-1]))[inverse].sum(1), None, None


def with_zero_row(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


@torch.library.custom_op("moelab::all_to_all", mutates_args=())
def all_to_all(rows: Tensor, group_name: str) -> Tensor:
    """Send the i-th of ep_size equal parts of rows [N, D] to rank i of an expert-parallel group; [N, D] in rank order.

    An operator that returns its result, where deepspeed's _AllToAll writes into a buffer: activation checkpointing can
    keep the former (model/recompute.py) and would take the empty buffer of the latter for its content.
    """
    received = torch.empty_like(rows, memory_format=torch.contiguous_format)
    comm.all_to_all_single(received, rows.contiguous(), group=groups._get_expert_parallel_group(group_name))
    return received


@all_to_all.register_fake
def _(rows: Tensor, group_name: str) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


def _remember_group(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group_name = inputs[1]


def _send_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return all_to_all(grad, ctx.group_name), None


all_to_all.register_autograd(_send_back, setup_context=_remember_group)


def route_in_slot(routing: Routing, num_slots: int) -> Tensor:
    """The route (t * K + k) that fills each slot [E*C]; T*K for an empty slot."""
    routes = routing.slot_TK.numel()
    table = routing.slot_TK.new_full((num_slots + 1,), routes)
    table.scatter_(0, routing.slot_TK.reshape(-1), torch.arange(routes, device=table.device))
    return table[:num_slots]  # the last entry gathered the dropped routes


class MoELayer(MoE):
    """x_BSD -> ([B, S, D], RoutingStats). A token that loses all its routes gets zeros."""

    def __init__(self, hidden_size: int, config: MoEConfig, activation: str, ep_size: int = 1) -> None:
        expert = MLP(hidden_size, config.ffn_hidden_size, activation)
        super().__init__(hidden_size, expert, num_experts=config.num_experts, ep_size=ep_size, k=config.top_k)
        self.deepspeed_moe.gate = Router(hidden_size, config)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, RoutingStats]:  # type: ignore[override]
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        with part("router"):
            routing: Routing = self.deepspeed_moe.gate(x_TD)
        with part("dispatch"):
            K = routing.slot_TK.shape[1]
            route_of_slot = route_in_slot(routing, self.num_experts * routing.capacity)
            token_of_slot = route_of_slot // K  # an empty slot's T*K becomes T, the row of zeros
            tokens = GatherRows.apply(x_TD, token_of_slot, routing.slot_TK)
        with part("experts"):  # all-to-all is told apart by its name
            outputs = self._through_experts(tokens, routing.capacity)
        with part("combine"):
            routes_TKD = GatherRows.apply(outputs, routing.slot_TK, route_of_slot.unsqueeze(1))
            y_TD = (routing.gates_TK.unsqueeze(-1) * routes_TKD).sum(1).to(x_BSD.dtype)
            return y_TD.view_as(x_BSD), routing.stats

    def _through_experts(self, tokens: Tensor, capacity: int) -> Tensor:
        """Rows [E*C, D] in expert order -> the experts' outputs in the same order, across the expert-parallel ranks."""
        D = tokens.shape[-1]
        if self.ep_size > 1:
            tokens = all_to_all(tokens, self.expert_group_name)
        outputs = self.deepspeed_moe.experts(tokens.view(self.ep_size, self.num_local_experts, capacity, D))
        outputs = outputs.reshape(-1, D)
        return all_to_all(outputs, self.expert_group_name) if self.ep_size > 1 else outputs
