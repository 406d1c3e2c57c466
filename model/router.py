"""The gate: which experts a token goes to, and with what weight.

    logits_TE = x_TD @ wg^T            in fp32
    scores_TE = softmax(logits_TE), or each logit's sigmoid
    probs_TE  = scores_TE, of sigmoids divided by their sum over the experts
    chosen    = the top_k largest of scores + selection bias; equal ones in an order that rotates with the token's
                index. With num_groups experts come from top_k_groups groups only, those with the largest sum of their
                top_k / top_k_groups best (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)
    gates_TK  = scores of the chosen, without the bias; divided by their sum if norm_topk_prob; times
                routed_scaling_factor
    plan      = a row for every route (model/dispatch.py); with a capacity, routes past it are dropped: the last ones in
                token order (position), or those with the smallest gates (probability; not causal)

Balance, by any of these; in all E/K sum_e f_e P_e reads 1.0 under uniform load (Fedus et al., arXiv 2101.03961, eq. 4):

    micro_batch    P_e the mean of probs and f_e the share of tokens that chose e, both over this rank's micro-batch
    sequence       the mean over sequences of the same of each (arXiv 2412.19437, eq. 17; its eq. 18 counts the top_k of
                   the scores, we the experts chosen, by bias and groups)
    global_batch   f_e over all ranks, and over the micro-steps of the optimizer step up to this one (arXiv 2501.11873)
    bias           no loss: after every optimizer step the bias of an expert with less than the mean load of that step,
                   over all ranks and micro-steps, grows by bias_update_rate, with more it shrinks (arXiv 2408.15664)

    z-loss = mean over tokens of logsumexp(logits)^2   (Zoph et al., arXiv 2202.08906, eq. 5)

T tokens of this rank's micro-batch, D hidden_size, E experts, K top_k, C capacity, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor, nn

from model.config import MoEConfig
from model.dispatch import Plan, make_plan, ordered_bits


class RoutingStats(NamedTuple):
    """What one MoE layer did with one micro-batch of one rank. A loss that has a weight has a gradient too."""

    aux_loss: Tensor  # scalar, unweighted; 1.0 when the load is uniform
    z_loss: Tensor  # scalar, unweighted
    entropy: Tensor  # scalar, nats: of probs, mean over tokens; log(E) when the router is undecided
    tokens_per_expert_E: Tensor  # int64, counted before any route is dropped
    dropped: Tensor  # int64 scalar, routes without a row


class Routing(NamedTuple):
    """Where every route of a micro-batch goes, and how much it counts."""

    plan: Plan
    gates_TK: Tensor  # fp32 (fp64 in an fp64 model)
    stats: RoutingStats


def choose_top_k(scores_TE: Tensor, top_k: int, num_groups: int = 1, top_k_groups: int = 1) -> Tensor:
    """Indices [T, K] of the largest scores (fp32; fp64 is rounded), the largest first.

    Among equal scores token t prefers the first expert met when counting up from t * top_k. So equal scores (a zero
    gate, or identical experts) spread evenly over the experts, where topk would send all tokens to the same ones. It is
    the same on every device: topk sees integers that differ, an fp32 number's bits (in an order-preserving form, above)
    and the place in the rotation (below).

    With groups the same holds of groups, counted up from t * top_k_groups, and of the experts of a group, counted up
    from the number of earlier turns of this group times top_k / top_k_groups.
    """
    T, E = scores_TE.shape
    G, size = num_groups, E // num_groups
    first_T1 = torch.arange(T, device=scores_TE.device).unsqueeze(1) * top_k_groups
    group_place_TG = counted_from(first_T1 % G, G)
    turn_TG = (first_T1 + group_place_TG) // G  # earlier turns of the group
    place_TGs = counted_from((turn_TG * (top_k // top_k_groups) % size).unsqueeze(-1), size)
    place_TE = (place_TGs * G + group_place_TG.unsqueeze(-1)).view(T, E)
    if top_k_groups < G:
        best_TGk = scores_TE.float().view(T, G, size).topk(top_k // top_k_groups, dim=-1).values
        group_TG = choose_top_k(best_TGk.sum(-1), top_k_groups)
        is_open_TG = torch.zeros(T, G, dtype=torch.bool, device=scores_TE.device).scatter(1, group_TG, True)
        scores_TE = scores_TE.masked_fill(~is_open_TG.repeat_interleave(size, 1), -torch.inf)
    return ((ordered_bits(scores_TE) << 31) - place_TE).topk(top_k, dim=1).indices


def counted_from(start: Tensor, number: int) -> Tensor:
    """Places [..., number] of 0, 1 ... number - 1 in a circle that is counted up from `start` [..., 1] < number."""
    place = torch.arange(number, device=start.device) - start
    return torch.where(place < 0, place + number, place)


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


@torch.library.custom_op("moelab::sum_over_ranks", mutates_args=())
def sum_over_ranks(counts: Tensor) -> Tensor:
    """The sum of a tensor over all ranks; without ranks the tensor. It has no gradient."""
    total = counts.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


@sum_over_ranks.register_fake
def _(counts: Tensor) -> Tensor:
    return torch.empty_like(counts)


class Router(TopKGate):
    """A gate for DeepSpeed's MoE layer. The base class gives its name, its weight `wg` and its process group.

    `selection_bias` [E] is a buffer in fp32, whatever the type of the model, where balance is "bias"; else None.
    """

    selection_bias: Tensor | None

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__(hidden_size, config.num_experts, k=config.top_k)
        self.config = config
        self.num_experts, self.top_k = config.num_experts, config.top_k
        # As a fraction it is exact: 1.1 times 10 is 11 and not a little more, which would round up to 12.
        self.share = Fraction(str(config.capacity_factor)) * self.top_k / self.num_experts
        self.eval_share = Fraction(str(config.eval_capacity_factor)) * self.top_k / self.num_experts
        # Not called after experts: deepspeed 0.19.8 would take it for one of their weights when it saves.
        self.register_buffer("selection_bias", torch.zeros(config.num_experts) if config.balance == "bias" else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """As nn.Module; but the bias keeps its type: a bias around 1 would not feel steps of 0.001 in bf16."""
        bias = self.selection_bias
        super()._apply(fn, recurse)
        if bias is not None and self.selection_bias is not None:
            self.selection_bias = bias.to(self.selection_bias.device)
        return self

    def forward(  # type: ignore[override]
        self, x_TD: Tensor, num_sequences: int = 1, earlier_E: Tensor | None = None
    ) -> Routing:
        """Route a micro-batch of num_sequences sequences of equal length.

        earlier_E: tokens per expert in the earlier micro-steps of this optimizer step, for the scope global_batch.
        """
        config, T = self.config, x_TD.shape[0]
        precise = torch.promote_types(x_TD.dtype, torch.float32)  # fp32, or fp64 in tests
        logits_TE = F.linear(x_TD.to(precise), self.wg.weight.to(precise))
        if config.score_func == "softmax":
            log_weights_TE = logits_TE
            scores_TE = probs_TE = F.softmax(logits_TE, dim=-1)
            expert_TK = self.choose(scores_TE.detach())
            gates_TK = TakeColumns.apply(scores_TE, expert_TK)
            if config.norm_topk_prob:
                # A bias, or force_balanced, may choose experts whose scores all underflow: gates of 0, not 0 / 0
                gates_TK = gates_TK / gates_TK.sum(dim=1, keepdim=True).clamp(min=1e-20)
        else:  # a sigmoid over a sum of sigmoids is the softmax of their logarithms, and none of it underflows
            log_weights_TE = F.logsigmoid(logits_TE)
            probs_TE = F.softmax(log_weights_TE, dim=-1)
            expert_TK = self.choose(log_weights_TE.detach().exp())
            log_gates_TK = TakeColumns.apply(log_weights_TE, expert_TK)
            gates_TK = F.softmax(log_gates_TK, dim=-1) if config.norm_topk_prob else log_gates_TK.exp()
        if config.routed_scaling_factor != 1:
            gates_TK = gates_TK * config.routed_scaling_factor

        share = self.share if self.training else self.eval_share
        capacity = rows_per_expert(T, share, config.min_capacity) if share else None  # dropless
        priority_TK = gates_TK.detach() if config.drop_policy == "probability" else None
        plan = make_plan(expert_TK, self.num_experts, capacity, priority_TK)
        dropped = (plan.tokens_per_expert_E - (T if capacity is None else capacity)).clamp(min=0).sum()
        stats = RoutingStats(
            self.aux_loss(
                probs_TE if config.has_aux_loss else probs_TE.detach(),
                expert_TK,
                plan.tokens_per_expert_E,
                num_sequences,
                earlier_E,
            ),
            (logits_TE if config.z_loss_coeff else logits_TE.detach()).logsumexp(-1).square().mean(),
            mean_entropy(probs_TE.detach(), log_weights_TE.detach()),
            plan.tokens_per_expert_E,
            dropped,
        )
        return Routing(plan, gates_TK, stats)

    def choose(self, scores_TE: Tensor) -> Tensor:
        """The experts [T, K] of every token, the most wanted first."""
        config = self.config
        if config.force_balanced:
            scores_TE = torch.zeros_like(scores_TE)  # equal scores are spread evenly
        elif self.selection_bias is not None:
            scores_TE = scores_TE + self.selection_bias
        return choose_top_k(scores_TE, self.top_k, config.num_groups, config.top_k_groups)

    def aux_loss(
        self, probs_TE: Tensor, expert_TK: Tensor, count_E: Tensor, num_sequences: int, earlier_E: Tensor | None
    ) -> Tensor:
        """E/K sum_e f_e P_e over what aux_loss_scope says; a scalar. f sums to K."""
        E, K, T = self.num_experts, self.top_k, probs_TE.shape[0]
        scope = self.config.aux_loss_scope if self.config.has_aux_loss else "micro_batch"
        if scope == "sequence":
            chosen_TE = torch.zeros_like(probs_TE).scatter(1, expert_TK, 1.0)
            load_BE = chosen_TE.view(num_sequences, -1, E).mean(1)
            probs_BE = probs_TE.view(num_sequences, -1, E).mean(1)
            return E / K * (load_BE * probs_BE).sum(1).mean()
        if scope == "global_batch" and self.training:
            total_E = sum_over_ranks(count_E if earlier_E is None else count_E + earlier_E.to(count_E.dtype))
            load_E = K * total_E.to(probs_TE.dtype) / total_E.sum()
        else:
            load_E = count_E.to(probs_TE.dtype) / T
        return E / K * (load_E * probs_TE.mean(0)).sum()


def mean_entropy(probs_TE: Tensor, log_weights_TE: Tensor) -> Tensor:
    """Of probs = softmax(log_weights), in nats: -sum p log p, where a p of zero adds nothing."""
    log_weights_TE = log_weights_TE - log_weights_TE.amax(-1, keepdim=True)  # or a large common part would swallow it
    return (log_weights_TE.logsumexp(-1) - (probs_TE * log_weights_TE).sum(-1)).mean()


def routers_of(model: nn.Module) -> list[Router]:
    """In the order of the layers."""
    return [module for module in model.modules() if isinstance(module, Router)]


def selection_bias_ME(model: nn.Module) -> Tensor | None:
    """The selection biases by MoE layer, fp32; None where nothing is balanced by them."""
    biases = [router.selection_bias for router in routers_of(model) if router.selection_bias is not None]
    return torch.stack(biases) if biases else None


@torch.no_grad()
def update_selection_bias(model: nn.Module, tokens_per_expert_ME: Tensor) -> None:
    """Once per optimizer step: move the bias of every expert against its load, by bias_update_rate.

    Args:
        tokens_per_expert_ME: of this rank over the step's micro-steps, by MoE layer. All ranks call this; their sum
            decides, so the biases stay equal everywhere. Nothing waits for the device.
    """
    balanced = [(router.selection_bias, router.config) for router in routers_of(model)]
    if not balanced or balanced[0][0] is None:
        return
    for (bias_E, config), load_E in zip(balanced, sum_over_ranks(tokens_per_expert_ME), strict=True):
        assert bias_E is not None
        below_E = load_E.sum() - config.num_experts * load_E  # whole numbers: equal loads are equal on every device
        bias_E += config.bias_update_rate * torch.sign(below_E).to(bias_E.dtype)
