"""The gate: which experts a token goes to, with what weight, and which slot of the expert's buffer it gets.

    logits_TE = x_TD @ wg^T            in fp32
    probs_TE  = softmax(logits_TE)
    chosen    = the top_k largest; equal ones are taken in an order that rotates with the token's index
    gates_TK  = probs of the chosen, divided by their sum (top_k 1: the plain probability, as in Switch; divided by
                itself it would be a constant 1 and the loss would not reach the router)
    slot_TK   = expert * C + position; routes ask in token order, and those at positions >= C are dropped (slot = E*C)
    aux       = E/K * sum_e f_e * P_e   (Fedus et al., arXiv 2101.03961, eq. 4, scaled so that uniform load reads 1.0)

T tokens of this rank's micro-batch, D hidden_size, E experts, K top_k, C capacity.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor

from model.config import MoEConfig


class RoutingStats(NamedTuple):
    """What one MoE layer did with one micro-batch of one rank."""

    aux_loss: Tensor  # scalar, unweighted, with gradient; 1.0 when the load is uniform
    tokens_per_expert_E: Tensor  # int64, counted before any route is dropped
    dropped: Tensor  # int64 scalar, routes without a slot


class Routing(NamedTuple):
    """Where every route of a micro-batch goes."""

    capacity: int  # C: slots per expert that this rank may fill
    slot_TK: Tensor  # int64, in [0, E*C); E*C marks a dropped route
    gates_TK: Tensor  # fp32 (fp64 in an fp64 model)
    stats: RoutingStats


def choose_top_k(scores_TE: Tensor, top_k: int) -> Tensor:
    """Indices [T, K] of the largest scores; token t looks through the experts from (t * top_k) mod E on.

    So equal scores (a zero gate, or identical experts) spread evenly over the experts, and the same way on every
    device, where topk would send all tokens to the same ones. Different scores are not affected.
    """
    T, E = scores_TE.shape
    start_T1 = (torch.arange(T, device=scores_TE.device) * top_k).unsqueeze(1)
    rotated_TE = (start_T1 + torch.arange(E, device=scores_TE.device)) % E
    order_TE = scores_TE.gather(1, rotated_TE).sort(dim=1, descending=True, stable=True).indices
    return rotated_TE.gather(1, order_TE[:, :top_k])


def expert_capacity(num_tokens: int, config: MoEConfig, training: bool) -> int | None:
    """Slots per expert for `num_tokens` tokens of one rank; None when dropless."""
    factor = config.capacity_factor if training else config.eval_capacity_factor
    if factor == 0:
        return None
    # More slots than tokens can never be filled: a token chooses an expert once.
    return min(num_tokens, max(config.min_capacity, math.ceil(factor * num_tokens * config.top_k / config.num_experts)))


class Router(TopKGate):
    """A gate for DeepSpeed's MoE layer. The base class gives its name, its weight `wg` and its process group."""

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__(hidden_size, config.num_experts, k=config.top_k)
        self.config = config

    def forward(self, x_TD: Tensor) -> Routing:  # type: ignore[override]
        E, K = self.config.num_experts, self.config.top_k
        T = x_TD.shape[0]
        precise = torch.promote_types(x_TD.dtype, torch.float32)  # fp32, or fp64 in tests
        probs_TE = F.softmax(F.linear(x_TD.to(precise), self.wg.weight.to(precise)), dim=-1)
        expert_TK = choose_top_k(probs_TE.detach(), K)
        gates_TK = probs_TE.gather(1, expert_TK)
        if K > 1:
            gates_TK = gates_TK / gates_TK.sum(dim=1, keepdim=True)

        routes_RE = F.one_hot(expert_TK.reshape(-1), E)  # R = T*K routes, in token order
        tokens_per_expert_E = routes_RE.sum(0)
        position_R = (routes_RE.cumsum(0) * routes_RE).sum(1) - 1
        capacity = expert_capacity(T, self.config, self.training)
        if capacity is None:
            capacity = self._largest_load(tokens_per_expert_E)
        kept_TK = (position_R < capacity).view(T, K)
        slot_TK = torch.where(kept_TK, expert_TK * capacity + position_R.view(T, K), E * capacity)

        load_E = tokens_per_expert_E.to(precise) / T  # f: sums to K
        aux_loss = E / K * (load_E * probs_TE.mean(0)).sum()
        return Routing(capacity, slot_TK, gates_TK, RoutingStats(aux_loss, tokens_per_expert_E, (~kept_TK).sum()))

    @torch.no_grad()
    def _largest_load(self, tokens_per_expert_E: Tensor) -> int:
        """Dropless: as many slots as the fullest expert needs on any rank of the group. One host sync."""
        largest = tokens_per_expert_E.max()
        if self.ep_group is not None and torch.distributed.get_world_size(self.ep_group) > 1:
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=self.ep_group)
        return int(largest)
