"""From bf16 (or fp32) to FP8: what the experts' matrix products take, in plain torch, with torchao's own functions.

    s = 2^floor(log2(448 / max(amax, 1e-12)))        one for every row: torchao's rowwise recipes
    values = e4m3(clamp(s * x, -448, 448))           scale = 1 / s, so x is about values * scale

A power of two moves no bit of x, so the only error is that of e4m3: at most 2^-4 of a value, or 2^-10 / s where that is
more. A row that holds a NaN or an infinity becomes NaN as a whole: it is passed on, not hidden.

Compiled, each function here is one or two kernels. model/fp8_kernels.py has the same in Triton.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

for name in ("torchao", "torch.utils._pytree"):  # torchao 0.18.0 tells of kernels for GPUs that it cannot load here
    logging.getLogger(name).setLevel(logging.ERROR)

from torchao.float8.config import ScalingGranularity  # noqa: E402
from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated  # noqa: E402

E4M3 = torch.float8_e4m3fn


class Quantized(NamedTuple):
    """x [..., K] as values * scale."""

    values: Tensor  # float8_e4m3fn [..., K]
    scale: Tensor  # fp32 [...]


def row_scales(x: Tensor) -> Tensor:
    """The multiplier s of every row of x [..., K], as [..., 1] in fp32."""
    return tensor_to_scale(
        x, E4M3, scaling_granularity=ScalingGranularity.AXISWISE, axiswise_dim=-1, round_scales_to_power_of_2=True
    )


def quantize_rows(x: Tensor) -> Quantized:
    s = row_scales(x)
    return Quantized(to_fp8_saturated(x.float() * s, E4M3), s.reciprocal().squeeze(-1))


def activate_quantize(a: Tensor, activation: str) -> tuple[Tensor, Quantized]:
    """h = act(a) as in model/experts.py, computed in fp32 and rounded once; and h in FP8. a [..., F] (SwiGLU: 2F)."""
    wide = a.float()
    if activation == "swiglu":
        gate, up = wide.chunk(2, dim=-1)
        h = F.silu(gate) * up
    else:
        h = F.relu(wide).square()
    h = h.to(a.dtype)
    return h, quantize_rows(h)


def relu2_backward_quantize(dh: Tensor, h: Tensor) -> tuple[Tensor, Quantized]:
    """The gradient of a where h = relu(a)^2: 2 relu(a) dh, and relu(a) is the root of h."""
    da = (2 * dh.float() * h.float().sqrt()).to(dh.dtype)
    return da, quantize_rows(da)


def swiglu_backward_quantize(dh: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Quantized]:
    """h once more, and the gradient of a = (gate, up) where h = silu(gate) * up."""
    gate, up = a.float().chunk(2, dim=-1)
    dh = dh.float()
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = dh * up * sigmoid * (1 + gate * (1 - sigmoid))
    da = torch.cat([d_gate, dh * silu], dim=-1).to(a.dtype)
    return (silu * up).to(a.dtype), da, quantize_rows(da)


def quantize_weights(w_LNK: Tensor) -> tuple[Quantized, Quantized]:
    """Weights for the forward pass, [L, N, K] with a scale for every row, and for the gradient of the input: [L, K, N],
    with one scale for every matrix (torchao's rowwise_with_gw_hp), the largest of its rows, repeated as [L, K]."""
    s_LN1 = row_scales(w_LNK)
    s_L11 = s_LN1.amin(1, keepdim=True)
    forward = Quantized(to_fp8_saturated(w_LNK.float() * s_LN1, E4M3), s_LN1.reciprocal().squeeze(-1))
    turned_LKN = to_fp8_saturated(w_LNK.float() * s_L11, E4M3).mT.contiguous()
    scale_LK = s_L11.reciprocal().squeeze(-1).expand(-1, w_LNK.shape[2]).contiguous()
    return forward, Quantized(turned_LKN, scale_LK)
