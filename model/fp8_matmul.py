"""The product of two FP8 matrices, or of two stacks of them: one operator for every device that has it."""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import ConfigError, FP8Config

# As in torchao's grouped operator: Hopper then adds products up with about 14 bits, not in fp32 after every few.
FAST_ACCUMULATION = True

# Hopper. Later GPUs lack a grouped product of rowwise FP8, or have one that traps (torch 2.13, pytorch/pytorch#187095).
CAPABILITY = (9, 0)


@torch.library.custom_op("moelab::scaled_matmul", mutates_args=())
def scaled_matmul(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, ends: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(a * a_scale) @ (b * b_scale)^T of FP8 matrices, in `dtype`. Scales are fp32, one for every row of a and of b.

    a [L, M, K], b [L, N, K] -> [L, M, N];  a [R, K], b [L, N, K], ends int32 [L] -> [R, N], rows of group l with b[l];
    a [M, K], b [N, K] -> [M, N]. K and N are multiples of 16.

    On a GPU torch's kernels, which write bf16; elsewhere the same values, dequantised and multiplied in fp32.
    """
    if a.numel() == 0:
        return _output_like(a, b, dtype).zero_()
    if a.is_cuda:
        return _on_gpu(a, a_scale, b, b_scale, ends).to(dtype)
    a, b = a.float() * a_scale.unsqueeze(-1), (b.float() * b_scale.unsqueeze(-1)).mT
    return (a @ b if ends is None else torch._grouped_mm(a, b, offs=ends)).to(dtype)


def _on_gpu(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, ends: Tensor | None) -> Tensor:
    if b.ndim == 2:
        return torch._scaled_mm(
            a,
            b.t(),
            scale_a=a_scale.unsqueeze(1),
            scale_b=b_scale.unsqueeze(0),
            out_dtype=torch.bfloat16,
            use_fast_accum=FAST_ACCUMULATION,
        )
    return torch._scaled_grouped_mm(
        a, b.mT, a_scale, b_scale, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=FAST_ACCUMULATION
    )


def _output_like(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-2], dtype=dtype)


@scaled_matmul.register_fake
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, ends: Tensor | None, dtype: torch.dtype) -> Tensor:
    return _output_like(a, b, dtype)


def refuse_fp8(config: FP8Config, on_gpu: bool, bf16: bool) -> None:
    """Raise ConfigError for what this process's device cannot do."""
    if not config.enabled:
        return
    if not on_gpu:
        if config.experts and config.casts == "triton":
            raise ConfigError(
                "run.fp8.casts='triton' has kernels for GPUs only, and this run is on the CPU. Use 'torch'."
            )
        return
    if not bf16:
        raise ConfigError("run.fp8.enabled=true on a GPU needs bf16.enabled=true: its products are written in bf16.")
    capability = torch.cuda.get_device_capability()
    if capability != CAPABILITY:
        raise ConfigError(
            f"run.fp8.enabled=true: {torch.cuda.get_device_name()} has compute capability "
            f"{'.'.join(map(str, capability))}, and torch's FP8 products with a scale for every row are for "
            f"{'.'.join(map(str, CAPABILITY))} (H100, H200, H800). Remove run.fp8."
        )
