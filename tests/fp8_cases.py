"""Inputs for the FP8 kernels, and what they must give, for tests on the CPU (interpreted) and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from model.fp8_casts import E4M3, row_scales, to_fp8_saturated

DTYPES = [torch.bfloat16, torch.float32]
INF, NAN = float("inf"), float("nan")


def rows_of(rows: int, K: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    """[rows, K]: sizes from subnormal to 1e5, and every kind of row that a cast could get wrong, as far as rows go."""
    generator = torch.Generator().manual_seed(seed + 1000 * rows + K)
    x = torch.randn(rows, K, generator=generator) * 10 ** torch.empty(rows, 1).uniform_(-14, 5, generator=generator)
    specials = [
        (-1, 1.75 * 2.0**7),  # 448 and just above it in bf16: the last value for s = 2, the first for 1
        (K // 2, -1.7578125 * 2.0**7),
        (3, INF),
        (K - 1, NAN),
        (0, -INF),
        (5, 1e5),
        (7, -1e-30),
    ]
    for row, (column, value) in zip(range(1, rows), specials, strict=False):
        x[row] = torch.randn(K, generator=generator).clamp(-3, 3)
        x[row, column] = value
    if rows > len(specials) + 4:
        x[-1], x[-2], x[-3], x[-4] = 0.0, -0.0, 1e-30, 1e-39  # the last: subnormal, in bf16 too
        x[-4, 1], x[-3, ::2] = -3e-40, -1e-20
    return x.to(dtype).to(device)


def before_the_cast(y: Tensor) -> tuple[Tensor, Tensor]:
    """fp8_casts.quantize_rows of y, but for the cast."""
    s = row_scales(y)
    return (y.float() * s).clamp(-448, 448), s.reciprocal().squeeze(-1)


def in_e4m3(y: Tensor) -> Tensor:
    return to_fp8_saturated(y.float() * row_scales(y), E4M3)


def gate_and_up(rows: int, K: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """[rows, 2K]: gates where silu is curved, and a few far out."""
    gate = 8 * torch.randn(rows, K, generator=torch.Generator().manual_seed(rows + K))
    gate[::4, 0], gate[1::4, 0], gate[2::4, 1] = 1e5, -1e5, 0.0
    return torch.cat([gate.to(dtype).to(device), rows_of(rows, K, dtype, device, seed=1)], dim=1)


def differing(ours: Tensor, theirs: Tensor) -> str:
    """Empty where the bits are equal (any NaN equals any), else where they first differ."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return f"{ours.dtype} {list(ours.shape)} and {theirs.dtype} {list(theirs.shape)}"
    as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[ours.itemsize]
    differs = ours.contiguous().view(as_bits) != theirs.contiguous().view(as_bits)
    differs &= ~(ours.float().isnan() & theirs.float().isnan())
    if not differs.any():
        return ""
    at = tuple(differs.nonzero()[0].tolist())
    return f"{int(differs.sum())} of {differs.numel()} differ, first {list(at)}: {ours[at]} and {theirs[at]}"


def far(ours: Tensor, theirs: Tensor, terms: Tensor | None = None) -> str:
    """Empty where ours is within a rounding of theirs, else where it is farthest out.

    One ulp of bf16 is at most 2^-7 of a value. For fp32, exp is the widest: on a GPU 2^(x log2 e), whose rounded
    argument costs |x| * 2^-24, 2^-17 for gates up to 100. `terms` is the size of what was summed, if that is more.
    """
    sizes = theirs.float().abs() if terms is None else torch.maximum(terms.abs(), theirs.float().abs())
    tolerance = theirs.float().abs() * 2**-7 if ours.dtype == torch.bfloat16 else 0.0
    excess = (ours.float() - theirs.float()).abs() - (tolerance + sizes * 2**-16)
    excess = torch.where((ours == theirs) | (ours.isnan() & theirs.isnan()), 0.0, excess)
    if not (excess > 0).any() and not excess.isnan().any():
        return ""
    at = tuple(torch.unravel_index(excess.nan_to_num(nan=INF).argmax(), excess.shape))
    return f"at {[int(i) for i in at]}: {ours[at]} and {theirs[at]}"
