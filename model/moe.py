"""The MoE layer: DeepSpeed's MoE with our gate and our experts between dispatch and combine.

    x_TD -> router -> dispatch [N, D] -> all-to-all -> experts -> all-to-all -> combine -> y_TD

Process groups, parameter flags and checkpoint layout are those of deepspeed.moe.layer.MoE, which the DeepSpeed engine,
ZeRO-1/2 and the gradient reduction understand. T tokens of this rank, N rows (model/dispatch.py), E experts, L local
experts, C capacity, K top_k.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import comm
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn

from model.config import MoEConfig
from model.dispatch import GatherRows, Plan, combine, dispatch
from model.experts import LoopedExperts, StackedExperts
from model.profile import part
from model.router import Router, Routing, RoutingStats


@torch.library.custom_op("moelab::all_to_all", mutates_args=())
def all_to_all(
    rows: Tensor, group_name: str, sent: list[int] | None = None, received: list[int] | None = None
) -> Tensor:
    """Send parts of rows [N, ...] to the ranks of an expert-parallel group, in rank order; what they sent to this one.

    Without sizes the ep_size parts are equal, and [N, ...] comes back; with them sent[i] rows go to rank i and
    received[i] come from it.

    An operator that returns its result, where deepspeed's _AllToAll writes into a buffer: activation checkpointing can
    keep the former (model/recompute.py) and would take the empty buffer of the latter for its content.
    """
    result = rows.new_empty(rows.shape[0] if received is None else sum(received), *rows.shape[1:])
    comm.all_to_all_single(
        result,
        rows.contiguous(),
        output_split_sizes=received,
        input_split_sizes=sent,
        group=groups._get_expert_parallel_group(group_name),
    )
    return result


@all_to_all.register_fake
def _(rows: Tensor, group_name: str, sent: list[int] | None = None, received: list[int] | None = None) -> Tensor:
    return rows.new_empty(rows.shape[0] if received is None else sum(received), *rows.shape[1:])


def _remember_sizes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.group_name, ctx.sent, ctx.received = inputs


def _send_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return all_to_all(grad, ctx.group_name, ctx.received, ctx.sent), None, None, None


all_to_all.register_autograd(_send_back, setup_context=_remember_sizes)


class MoELayer(MoE):
    """x_BSD -> ([B, S, D], RoutingStats). A token that loses all its routes gets zeros. earlier_E: see Router."""

    def __init__(self, hidden_size: int, config: MoEConfig, activation: str, ep_size: int = 1) -> None:
        super().__init__(hidden_size, nn.Identity(), num_experts=config.num_experts, ep_size=ep_size, k=config.top_k)
        L, F = self.num_local_experts, config.ffn_hidden_size
        self.deepspeed_moe.gate = Router(hidden_size, config)
        Experts = LoopedExperts if config.expert_backend == "loop" else StackedExperts
        self.deepspeed_moe.experts = Experts(L, hidden_size, F, activation, self.expert_group_name)

    def forward(  # type: ignore[override]
        self, x_BSD: Tensor, earlier_E: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats]:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        with part("router"):
            routing: Routing = self.deepspeed_moe.gate(x_TD, x_BSD.shape[0], earlier_E)
        plan = routing.plan
        with part("dispatch"):
            rows_ND = dispatch(x_TD, plan)
        if plan.capacity is not None:
            with part("experts"):  # all-to-all is told apart by its name
                outputs_ND = self._equal_shares(rows_ND, plan.capacity)
        elif self.ep_size == 1:
            with part("experts"):
                outputs_ND = self.deepspeed_moe.experts(rows_ND, plan.ends_E)
        else:
            outputs_ND = self._unequal_shares(rows_ND, plan)
        with part("combine"):
            y_TD = combine(outputs_ND, routing.gates_TK, plan)
            return y_TD.view_as(x_BSD), routing.stats

    def _equal_shares(self, rows_ND: Tensor, capacity: int) -> Tensor:
        """Every rank sends C rows for every expert: all sizes are known, nothing waits for the host."""
        ep, L, D = self.ep_size, self.num_local_experts, rows_ND.shape[-1]
        if ep == 1:
            return self.deepspeed_moe.experts(rows_ND.view(L, capacity, D)).view(-1, D)
        rows_ND = all_to_all(rows_ND, self.expert_group_name)
        rows_LMD = rows_ND.view(ep, L, capacity, D).transpose(0, 1).reshape(L, ep * capacity, D)
        outputs_LMD = self.deepspeed_moe.experts(rows_LMD)
        outputs_ND = outputs_LMD.view(L, ep, capacity, D).transpose(0, 1).reshape(-1, D)
        return all_to_all(outputs_ND, self.expert_group_name)

    @torch.compiler.disable
    def _unequal_shares(self, rows_ND: Tensor, plan: Plan) -> Tensor:
        """Dropless: ranks tell each other how many rows they send, and the host waits once, to learn the sizes."""
        ep, L, group = self.ep_size, self.num_local_experts, self.expert_group_name
        with part("dispatch"):
            sent_EP_L = plan.tokens_per_expert_E.view(ep, L)
            received_EP_L = all_to_all(sent_EP_L, group)
            sent, received = torch.stack([sent_EP_L.sum(1), received_EP_L.sum(1)]).tolist()  # the one wait of the host

            # Rows arrive ordered by rank, then expert; the experts want them ordered by expert.
            expert = torch.arange(L, device=rows_ND.device).repeat(ep)
            expert_N = expert.repeat_interleave(received_EP_L.flatten(), output_size=sum(received))
            arrived_N = expert_N.sort(stable=True).indices
            places_N = torch.arange(len(arrived_N), device=rows_ND.device)
            place_N = torch.empty_like(arrived_N).scatter(0, arrived_N, places_N)
            ends_L = received_EP_L.sum(0).cumsum(0).to(torch.int32)

            rows = all_to_all(rows_ND, group, sent, received)
            rows = GatherRows.apply(rows, arrived_N, place_N.unsqueeze(1))
        with part("experts"):
            outputs = self.deepspeed_moe.experts(rows, ends_L)
        with part("combine"):
            outputs = GatherRows.apply(outputs, place_N, arrived_N.unsqueeze(1))
            return all_to_all(outputs, group, received, sent)
