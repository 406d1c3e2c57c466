"""Experts whose matrix products are in FP8: forward and for the gradient of the rows; weight gradients stay in bf16.

    forward    a = x8 w1^T      h = act(a)       y = h8 w2^T                  x8, h8, w8: rows scaled on their own
    backward   dh = dy8 w2      dw2 = dy^T h     da = act'(a) dh     dx = da8 w1     dw1 = da^T x
               (there the weights have one scale per expert)

which is torchao's recipe rowwise_with_gw_hp for a stack of matrices. Shapes and the order of rows are those of
model/experts.py; a fixed capacity multiplies [L, M, K] with [L, N, K], dropless routing [N, K] in groups that end at
ends_L. Every product is one kernel for all experts, and none of them needs groups of a particular size.

The weights are cast once per optimizer step and not in every micro-step (model/fp8_weights.py).
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor

from model import fp8_casts
from model.config import FP8Casts
from model.experts import StackedExperts, grouped_weight_gradient
from model.fp8_matmul import scaled_matmul
from model.fp8_weights import FP8Weights

CASTS: dict[FP8Casts, ModuleType] = {"torch": fp8_casts}  # and, once it is asked for, model/fp8_kernels.py


def casts_named(name: FP8Casts) -> ModuleType:
    """The module with the casts, loaded if need be: Triton comes with CUDA builds of torch only."""
    if name == "triton":
        CASTS["triton"] = importlib.import_module("model.fp8_kernels")
    return CASTS[name]


class FP8MLP(torch.autograd.Function):
    """act(rows @ w1^T) @ w2^T by the picture above. Of w1 and w2 only the FP8 copies are read."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        w1: Tensor,
        w2: Tensor,
        ends: Tensor | None,
        activation: str,
        casts_name: FP8Casts,
        *copies: Tensor,
    ) -> Tensor:
        casts = CASTS[casts_name]
        w1_values, w1_scale, w1t_values, w1t_scale, w2_values, w2_scale, w2t_values, w2t_scale = copies
        a = scaled_matmul(*casts.quantize_rows(rows), w1_values, w1_scale, ends, rows.dtype)
        h, h8 = casts.activate_quantize(a, activation)
        kept = a if activation == "swiglu" else h  # relu(a) is the root of h
        ctx.activation, ctx.casts_name = activation, casts_name
        ctx.save_for_backward(rows, kept, ends, w1t_values, w1t_scale, w2t_values, w2t_scale)
        return scaled_matmul(*h8, w2_values, w2_scale, ends, rows.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, kept, ends, w1t_values, w1t_scale, w2t_values, w2t_scale = ctx.saved_tensors
        casts, dy = CASTS[ctx.casts_name], dy.contiguous()
        dh = scaled_matmul(*casts.quantize_rows(dy), w2t_values, w2t_scale, ends, dy.dtype)
        if ctx.activation == "swiglu":
            h, da, da8 = casts.swiglu_backward_quantize(dh, kept)
        else:
            h = kept
            da, da8 = casts.relu2_backward_quantize(dh, h)
        dx = scaled_matmul(*da8, w1t_values, w1t_scale, ends, dy.dtype)
        return dx, weight_gradient(da, rows, ends), weight_gradient(dy, h, ends), *(None,) * 11


def weight_gradient(grad: Tensor, rows: Tensor, ends: Tensor | None) -> Tensor:
    """Per expert grad^T @ rows, in the type of the rows."""
    return torch.bmm(grad.mT, rows) if ends is None else grouped_weight_gradient(grad, rows, ends)


class FP8Experts(StackedExperts):
    """The experts of a StackedExperts, whose parameters it takes over. In eval mode they compute in bf16, as before."""

    @classmethod
    def of(cls, experts: StackedExperts, casts: FP8Casts, compiled: bool) -> Self:
        taken = take_over(cls, experts)
        taken.casts = casts
        quantize = casts_named(casts).quantize_weights
        taken.fp8_weights = {name: FP8Weights(quantize, compiled) for name in ("w1", "w2")}
        taken.register_load_state_dict_post_hook(lambda module, _: module.refresh())
        return taken

    casts: FP8Casts
    fp8_weights: dict[str, FP8Weights]

    def forward(self, rows: Tensor, ends_L: Tensor | None = None) -> Tensor:
        if not self.training:
            return super().forward(rows, ends_L)
        copies = (*self.fp8_weights["w1"].get(), *self.fp8_weights["w2"].get())
        return FP8MLP.apply(rows, self.w1, self.w2, ends_L, self.activation, self.casts, *copies)

    def refresh(self) -> None:
        """Cast the weights again. To be called after every write to them."""
        for name, weights in self.fp8_weights.items():
            weights.refresh(getattr(self, name))


def take_over(kind: type[Any], experts: StackedExperts) -> Any:
    """A StackedExperts of another class with the same parameters, marks and names."""
    with torch.device("meta"):
        taken = kind(
            experts.num_local_experts,
            experts.w2.shape[1],
            experts.w2.shape[2],
            experts.activation,
            vars(experts.w1)["group_name"],
        )
    taken.w1, taken.w2 = experts.w1, experts.w2
    return taken.train(experts.training)
