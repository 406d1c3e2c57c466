"""Rows of tokens to the experts and back: who goes where, and the gathers that carry them.

    plan       routes in expert order, within an expert by descending priority if there is one, then in the tokens' own
               order; from this two tables that invert each other: row_of_route (where route t*K+k went) and
               route_of_row (who sits in row n)
    dispatch   x [T, D] -> rows [N, D]      rows[n] = x[route_of_row[n] // K]
    combine    rows [N, D] -> y [T, D]      y[t] = sum_k gates[t, k] * rows[row_of_route[t, k]]

Both directions gather, in the backward pass too, through the other table: no atomics, so gradients are deterministic.
Fixed capacity: N = E*C rows, expert e owns rows [e*C, (e+1)*C); what has no row is dropped, what has no route is zeros.
Dropless: N = T*K rows, all in use, and `ends` says where each expert's rows end.

T tokens of this rank, D hidden_size, E experts, L local experts, C capacity, K top_k, R = T*K routes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Plan(NamedTuple):
    """Where every route of a micro-batch goes; all shapes are known on the host."""

    capacity: int | None  # C: rows of an expert; None when dropless
    row_of_route_TK: Tensor  # int64, in [0, N]; N marks a dropped route
    route_of_row_N: Tensor  # int64, in [0, T*K]; T*K marks a row that stays empty
    tokens_per_expert_E: Tensor  # int64, counted before any route is dropped
    ends_E: Tensor  # int32, one past an expert's last route in expert order (its rows, when dropless)


def ordered_bits(numbers: Tensor) -> Tensor:
    """int64 in the order of the numbers (rounded to fp32), within 32 bits: of negative ones the larger bits are the
    smaller number."""
    bits = numbers.float().view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def make_plan(expert_TK: Tensor, num_experts: int, capacity: int | None, priority_TK: Tensor | None = None) -> Plan:
    """Give every route of expert_TK (int64 [T, K]) a row. Where an expert has too few, those with the larger priority
    (>= 0) come first, and among equal ones, or without any, earlier tokens."""
    routes = expert_TK.numel()
    ascending_R = torch.arange(routes, device=expert_TK.device)
    if priority_TK is None or capacity is None:
        expert_R, route_R = expert_TK.flatten().sort(stable=True)
    else:
        route_R = ((expert_TK << 32) - ordered_bits(priority_TK)).flatten().sort(stable=True).indices
        expert_R = expert_TK.flatten().index_select(0, route_R)
    starts_E1 = torch.searchsorted(expert_R, torch.arange(num_experts + 1, device=expert_TK.device))
    count_E = starts_E1.diff()
    if capacity is None:
        row_R, route_of_row_N = ascending_R, route_R
    else:
        position_R = ascending_R - starts_E1.index_select(0, expert_R)
        row_R = torch.where(position_R < capacity, expert_R * capacity + position_R, num_experts * capacity)
        slot_C = torch.arange(capacity, device=expert_TK.device)
        sorted_N = (starts_E1[:-1, None] + slot_C).flatten().clamp(max=routes - 1)  # an empty slot reads any route,
        there_N = (slot_C < count_E[:, None]).flatten()  # and drops it
        route_of_row_N = torch.where(there_N, route_R.index_select(0, sorted_N), routes)
    row_of_route_TK = torch.empty_like(row_R).scatter(0, route_R, row_R).view_as(expert_TK)  # inverts a permutation
    return Plan(capacity, row_of_route_TK, route_of_row_N, count_E, starts_E1[1:].to(torch.int32))


def dispatch(x_TD: Tensor, plan: Plan) -> Tensor:
    """Rows [N, D] of the tokens in expert order; empty rows are zeros."""
    return GatherRows.apply(x_TD, plan.route_of_row_N // plan.row_of_route_TK.shape[1], plan.row_of_route_TK)


def combine(rows_ND: Tensor, gates_TK: Tensor, plan: Plan) -> Tensor:
    """Every token's sum of its rows, weighted by its gates: [T, D]. A token that lost all its routes gets zeros.

    A gate is rounded to the type of the rows, as in DeepSpeed's layer; the sum is in fp32 (in fp64 for fp64 rows).
    """
    return WeightedSum.apply(rows_ND, gates_TK, plan.row_of_route_TK, plan.route_of_row_N)


class GatherRows(torch.autograd.Function):
    """rows[index], where index N means a row of zeros; the backward pass gathers too, through the inverse index.

    rows [N, D]; index [M] in [0, N]; inverse [N, J] in [0, M]: the places that row n went to (M for none).
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return sum_of_rows(rows, index.unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return sum_of_rows(grad, inverse), None, None


class WeightedSum(torch.autograd.Function):
    """sum_k gates[t, k] * rows[row_of_route[t, k]], and its gradients by gathering."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gates: Tensor, row_of_route: Tensor, route_of_row: Tensor) -> Tensor:
        ctx.save_for_backward(rows, gates, row_of_route, route_of_row)
        return sum_of_rows(rows, row_of_route, gates)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        rows, gates, row_of_route, route_of_row = ctx.saved_tensors
        token_of_row = route_of_row // gates.shape[1]  # T for an empty row
        gate_of_row = F.pad(gates.flatten(), (0, 1)).index_select(0, route_of_row)
        grad_of_rows = sum_of_rows(grad, token_of_row.unsqueeze(1), gate_of_row.unsqueeze(1))
        return grad_of_rows, in_type(dots_with_rows(grad, rows, row_of_route), gates.dtype), None, None


# On the CPU torch has a kernel for each of the two that follow, under another name; the formulas take several times as
# long there (LOG.md). Inductor makes one kernel of a formula, a GPU without it several, with [T, K, D] between them.


def by_formula(tensor: Tensor) -> bool:
    return tensor.is_cuda or torch.compiler.is_compiling()


def in_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype) where that does something. torch 2.11 compiles an autograd.Function whose forward pass ends with
    an operator that hands back its own input (a .to, .float or .contiguous with nothing to do; a view is none) so that
    all its gradients are zero; 2.13 does not."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def sum_of_rows(rows_ND: Tensor, index_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """sum_k weights[t, k] * rows[index[t, k]] as [T, D], without weights the plain sum; index N adds nothing.

    Weights are rounded to the type of the rows, products and sum are in fp32. Rows must be finite: nothing is 0 * row.
    """
    N = rows_ND.shape[0]
    there_TK = index_TK < N
    weights_TK = there_TK if weights_TK is None else torch.where(there_TK, weights_TK, 0)
    weights_TK, index_TK = weights_TK.to(rows_ND.dtype), index_TK.clamp(max=N - 1)
    if by_formula(rows_ND):
        precise = torch.promote_types(rows_ND.dtype, torch.float32)
        return in_type((rows_ND[index_TK].to(precise) * weights_TK.unsqueeze(-1)).sum(1), rows_ND.dtype)
    return F.embedding_bag(index_TK, rows_ND, mode="sum", per_sample_weights=weights_TK)


def dots_with_rows(x_TD: Tensor, rows_ND: Tensor, index_TK: Tensor) -> Tensor:
    """x[t] . rows[index[t, k]] as [T, K], 0 for index N."""
    N, (T, K) = rows_ND.shape[0], index_TK.shape
    there_TK, index_TK = index_TK < N, index_TK.clamp(max=N - 1)
    if by_formula(rows_ND):
        precise = torch.promote_types(rows_ND.dtype, torch.float32)
        dots_TK = (rows_ND[index_TK].to(precise) * x_TD.unsqueeze(1).to(precise)).sum(-1)
    else:
        ascending = torch.arange(T * K)
        dots_TK = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x_TD, rows_ND, index_TK.flatten(), ascending[::K].contiguous(), ascending // K, 0
        ).view(T, K)
    return torch.where(there_TK, dots_TK, 0)
