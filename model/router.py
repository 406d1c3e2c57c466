"""The gate: which experts a token goes to, and with what weight.

    logits_TE = x_TD @ wg^T            in fp32
    probs_TE  = softmax(logits_TE)
    chosen    = the top_k largest; equal ones are taken in an order that rotates with the token's index
    gates_TK  = probs of the chosen, divided by their sum (top_k 1: the plain probability, as in Switch; divided by
                itself it would be a constant 1 and the loss would not reach the router)
    plan      = a row for every route (model/dispatch.py); with a capacity, routes past it are dropped in token order
    aux       = E/K * sum_e f_e * P_e   (Fedus et al., arXiv 2101.03961, eq. 4, scaled so that uniform load reads 1.0)

T tokens of this rank's micro-batch, D hidden_size, E experts, K top_k, C capacity.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor

from model.config import MoEConfig
from model.dispatch import Plan, make_plan


class RoutingStats(NamedTuple):
    """What one MoE layer did with one micro-batch of one rank."""

    aux_loss: Tensor  # scalar, unweighted, with gradient; 1.0 when the load is uniform
    tokens_per_expert_E: Tensor  # int64, counted before any route is dropped
    dropped: Tensor  # int64 scalar, routes without a row


class Routing(NamedTuple):
    """Where every route of a micro-batch goes, and how much it counts."""

    plan: Plan
    gates_TK: Tensor  # fp32 (fp64 in an fp64 model)
    stats: RoutingStats


def choose_top_k(scores_TE: Tensor, top_k: int) -> Tensor:
    """Indices [T, K] of the largest scores (fp32; fp64 is rounded), the largest first.

    Among equal scores token t prefers the first expert met when counting up from t * top_k. So equal scores (a zero
    gate, or identical experts) spread evenly over the experts, where topk would send all tokens to the same ones. It is
    the same on every device: topk sees integers that differ, an fp32 number's bits (in an order-preserving form, above)
    and the place in the rotation (below).
    """
    T, E = scores_TE.shape
    bits_TE = scores_TE.float().view(torch.int32)
    ordered_TE = bits_TE ^ ((bits_TE >> 31) & 0x7FFFFFFF)  # of negative numbers the larger bits are the smaller number
    expert_E = torch.arange(E, device=scores_TE.device)
    place_TE = (expert_E - (torch.arange(T, device=scores_TE.device) * top_k).unsqueeze(1)) % E
    return ((ordered_TE.long() << 31) - place_TE).topk(top_k, dim=1).indices


class TakeColumns(torch.autograd.Function):
    """scores.gather(1, index) for indices that differ within a row: so the gradient needs no atomic addition."""

    @staticmethod
    def forward(ctx: Any, scores_TE: Tensor, index_TK: Tensor) -> Tensor:
        ctx.save_for_backward(index_TK)
        ctx.num_columns = scores_TE.shape[1]
        return scores_TE.gather(1, index_TK)

    @staticmethod
    def backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (index_TK,) = ctx.saved_tensors
        return grad_TK.new_zeros(grad_TK.shape[0], ctx.num_columns).scatter(1, index_TK, grad_TK), None


def rows_per_expert(num_tokens: int, share: Fraction, min_capacity: int) -> int:
    """C = max(min_capacity, ceil(share * num_tokens)), share being capacity_factor * top_k / num_experts.

    More rows than tokens can never be filled: a token chooses an expert once.
    """
    return min(num_tokens, max(min_capacity, -(-num_tokens * share.numerator // share.denominator)))


class Router(TopKGate):
    """A gate for DeepSpeed's MoE layer. The base class gives its name, its weight `wg` and its process group."""

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__(hidden_size, config.num_experts, k=config.top_k)
        self.num_experts, self.top_k, self.min_rows = config.num_experts, config.top_k, config.min_capacity
        # As a fraction it is exact: 1.1 times 10 is 11 and not a little more, which would round up to 12.
        self.share = Fraction(str(config.capacity_factor)) * self.top_k / self.num_experts
        self.eval_share = Fraction(str(config.eval_capacity_factor)) * self.top_k / self.num_experts

    def forward(self, x_TD: Tensor) -> Routing:  # type: ignore[override]
        E, K, T = self.num_experts, self.top_k, x_TD.shape[0]
        precise = torch.promote_types(x_TD.dtype, torch.float32)  # fp32, or fp64 in tests
        probs_TE = F.softmax(F.linear(x_TD.to(precise), self.wg.weight.to(precise)), dim=-1)
        expert_TK = choose_top_k(probs_TE.detach(), K)
        gates_TK = TakeColumns.apply(probs_TE, expert_TK)
        if K > 1:
            gates_TK = gates_TK / gates_TK.sum(dim=1, keepdim=True)

        share = self.share if self.training else self.eval_share
        capacity = rows_per_expert(T, share, self.min_rows) if share else None  # dropless
        plan = make_plan(expert_TK, E, capacity)
        count_E = plan.tokens_per_expert_E
        dropped = (count_E - (T if capacity is None else capacity)).clamp(min=0).sum()
        load_E = count_E.to(precise) / T  # f: sums to K
        aux_loss = E / K * (load_E * probs_TE.mean(0)).sum()
        return Routing(plan, gates_TK, RoutingStats(aux_loss, count_E, dropped))
