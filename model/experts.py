"""The experts of one layer on this rank: stacked matrices, or the plain list of modules.

    bmm       rows [L, M, D], M rows for every expert           torch.bmm
    grouped   rows [N, D], expert l's rows end at ends_L[l]     torch's grouped GEMM
    loop      either, one nn.Linear after the other: the plainest form

    h = act(rows @ w1^T), out = h @ w2^T, without biases; w1 [L, F, D] (SwiGLU: [L, 2F, D], gate rows then up rows),
    w2 [L, D, F], each expert's matrix as in nn.Linear

L local experts, D hidden_size, F ffn_hidden_size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def activate(h: Tensor, activation: str) -> Tensor:
    """[..., F] -> [..., F] by relu^2 (arXiv 2109.08668); [..., 2F], gate and up, -> [..., F] by SwiGLU (2002.05202)."""
    if activation == "swiglu":
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up
    return F.relu(h).square()


class MLP(nn.Module):
    """w2(act(w1(x))), without biases."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.w1 = nn.Linear(hidden_size, (2 if activation == "swiglu" else 1) * ffn_hidden_size, bias=False)
        self.w2 = nn.Linear(ffn_hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(activate(self.w1(x), self.activation))


class StackedExperts(nn.Module):
    """All local experts in two parameters, which carry DeepSpeed's marks: `allreduce` and `group_name` for its gradient
    reduction and ZeRO, `is_expert_group` for Muon, which then orthogonalises every expert's matrix on its own.

    In a state dict each expert has keys of its own, `deepspeed_experts.{l}.w1.weight`: deepspeed 0.19.8 writes one
    checkpoint file per expert by these names, and the files are those of a list of modules.
    """

    def __init__(
        self, num_local_experts: int, hidden_size: int, ffn_hidden_size: int, activation: str, group_name: str
    ) -> None:
        super().__init__()
        self.num_local_experts, self.activation = num_local_experts, activation
        rows = (2 if activation == "swiglu" else 1) * ffn_hidden_size
        self.w1 = nn.Parameter(torch.empty(num_local_experts, rows, hidden_size))
        self.w2 = nn.Parameter(torch.empty(num_local_experts, hidden_size, ffn_hidden_size))
        for parameter in (self.w1, self.w2):
            vars(parameter).update(allreduce=False, group_name=group_name, is_expert_group=True)
        self.register_state_dict_post_hook(split_experts)
        self.register_load_state_dict_pre_hook(stack_experts)

    def forward(self, rows: Tensor, ends_L: Tensor | None = None) -> Tensor:
        """Outputs in the shape of `rows`: [L, M, D], or with ends_L (int32, the last one N) [N, D]."""
        if ends_L is None:
            return BatchedLinear.apply(activate(BatchedLinear.apply(rows, self.w1), self.activation), self.w2)
        return grouped_linear(activate(grouped_linear(rows, self.w1, ends_L), self.activation), self.w2, ends_L)

    def names(self, prefix: str, kind: str) -> list[str]:
        """Names in a state dict of the experts' parts of the parameter `kind` ("w1" or "w2")."""
        return [f"{prefix}deepspeed_experts.{i}.{kind}.weight" for i in range(self.num_local_experts)]


def split_experts(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """State-dict hook: a stacked parameter becomes one entry per expert, a view of it."""
    for name in ("w1", "w2"):
        weights = state.pop(prefix + name)
        state.update(zip(module.names(prefix, name), weights.unbind(), strict=True))


def stack_experts(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook before loading: the entries of all experts become the stacked parameter; if one is missing torch says so."""
    for name in ("w1", "w2"):
        keys = module.names(prefix, name)
        if all(key in state for key in keys):
            state[prefix + name] = torch.stack([state.pop(key) for key in keys])


class BatchedLinear(torch.autograd.Function):
    """rows [L, M, D] @ weight [L, F, D]^T. The gradient of the weight comes out in the weight's own layout: that of
    torch.bmm with a transposed operand is transposed too, and would be copied once more."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return torch.bmm(rows, weight.mT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        rows, weight = ctx.saved_tensors
        return torch.bmm(grad, weight), torch.bmm(grad.mT, rows)


@torch.library.custom_op("moelab::grouped_linear", mutates_args=())
def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [N, D], weight [L, F, D], ends int32 [L] with ends[-1] == N -> [N, F]; rows of expert l meet weight[l].

    An operator of ours around torch's, whose shape rule refuses fp32 when it is traced (torch 2.13), though it computes
    fp32. Rows past the last end would stay uninitialised: there are none. One kernel for bf16 on Hopper and data-centre
    Blackwell; elsewhere on a GPU torch loops over the experts, and the host waits for `ends`.
    """
    if rows.shape[0] == 0:  # a rank whose experts nobody chose
        return rows.new_empty(0, weight.shape[1])
    return torch._grouped_mm(rows, weight.mT, offs=ends)


@grouped_linear.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@torch.library.custom_op("moelab::grouped_linear_backward", mutates_args=())
def grouped_linear_backward(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows and weight; those of an expert without rows are zeros."""
    if rows.shape[0] == 0:
        return torch.empty_like(rows), torch.zeros_like(weight)
    grad = grad.contiguous()
    return torch._grouped_mm(grad, weight, offs=ends), torch._grouped_mm(grad.mT, rows, offs=ends)


@grouped_linear_backward.register_fake
def _(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(weight)


@torch.library.custom_op("moelab::grouped_weight_gradient", mutates_args=())
def grouped_weight_gradient(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """grad [N, F], rows [N, D] -> [L, F, D]: for expert l the sum over its rows of grad^T row."""
    if rows.shape[0] == 0:
        return rows.new_zeros(ends.shape[0], grad.shape[1], rows.shape[1])
    return torch._grouped_mm(grad.contiguous().mT, rows, offs=ends)


@grouped_weight_gradient.register_fake
def _(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(ends.shape[0], grad.shape[1], rows.shape[1])


def _save_operands(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *grouped_linear_backward(grad, *ctx.saved_tensors), None


grouped_linear.register_autograd(_backward, setup_context=_save_operands)


class LoopedExperts(nn.Module):
    """The same experts as a list of modules. Rows without a common number per expert cost a host sync: their counts."""

    def __init__(
        self, num_local_experts: int, hidden_size: int, ffn_hidden_size: int, activation: str, group_name: str
    ) -> None:
        super().__init__()
        self.deepspeed_experts = nn.ModuleList(
            MLP(hidden_size, ffn_hidden_size, activation) for _ in range(num_local_experts)
        )
        for parameter in self.parameters():
            vars(parameter).update(allreduce=False, group_name=group_name, num_local_experts=num_local_experts)

    def forward(self, rows: Tensor, ends_L: Tensor | None = None) -> Tensor:
        """As StackedExperts.forward."""
        if ends_L is not None:
            return self._of_any_sizes(rows, ends_L)
        return torch.stack([expert(part) for expert, part in zip(self.deepspeed_experts, rows.unbind(), strict=True)])

    @torch.compiler.disable  # every step has other sizes, and each would be compiled anew
    def _of_any_sizes(self, rows: Tensor, ends_L: Tensor) -> Tensor:
        parts = rows.split(ends_L.diff(prepend=ends_L.new_zeros(1)).tolist())
        return torch.cat([expert(part) for expert, part in zip(self.deepspeed_experts, parts, strict=True)])
