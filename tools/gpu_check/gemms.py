"""Matrix products alone: FP8 beside BF16 for experts and head, whether they are right, and attention.

Operands of the rates are the same in every iteration, so what fits into the L2 cache is there: for both precisions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import fp8_matmul
from model.attention import attention_backend
from model.config import FP8Config, ModelConfig
from model.experts import grouped_weight_gradient
from model.fp8_casts import Quantized, quantize_rows
from model.fp8_matmul import scaled_matmul
from tools.gpu_check.child import Context, device_answers, faults, in_one_line
from tools.gpu_check.shapes import shape_named
from tools.gpu_check.timing import Step, figures, measure, speed_over

BF16_BASE, EXACT = "bf16 bmm forward", "exact accumulation"
VOCAB, WIDTH = 32768, 768
# A wrong row or group makes an error of about 1; bf16 outputs one of 2^-9, fast accumulation less than 2^-10.
RIGHT = 1e-2


def gemm(case: str, context: Context) -> None:
    kind, _, rest = case.partition(" ")
    {"rates": rates, "accuracy": accuracy, "lm_head": lm_head, "attention": attention}[kind](rest, context)


def draw(context: Context, *size: int, std: float = 1.0) -> Tensor:
    generator = torch.Generator(context.device).manual_seed(sum(size))
    return (torch.randn(*size, generator=generator, device=context.device) * std).to(torch.bfloat16)


def ends_of(sizes: list[int], device: torch.device) -> Tensor:
    return torch.tensor(sizes, device=device).cumsum(0).to(torch.int32)


def with_accumulation(fast: bool, product: Callable[[], Tensor]) -> Step:
    """A product with fast accumulation or without: model/fp8_matmul.py reads its constant at each call."""

    def step() -> Tensor:
        before = fp8_matmul.FAST_ACCUMULATION
        fp8_matmul.FAST_ACCUMULATION = fast
        try:
            return product()
        finally:
            fp8_matmul.FAST_ACCUMULATION = before

    return step


def rates(name: str, context: Context) -> None:
    """One product of experts in every way that there is, forward and for the gradient of the weight."""
    shape = shape_named(name, context.dry_run)
    E, C, K, N = shape
    x, w, grad = draw(context, E, C, K), draw(context, E, N, K, std=K**-0.5), draw(context, E, C, N)
    x8, w8 = quantize_rows(x), quantize_rows(w)
    rows8 = Quantized(x8.values.view(-1, K), x8.scale.view(-1))
    rows, grad_rows = x.view(-1, K), grad.view(-1, N)
    ends = ends_of([C] * E, context.device)
    bf16 = torch.bfloat16

    def one_by_one() -> list[Tensor]:
        return [scaled_matmul(x8[0][e], x8[1][e], w8[0][e], w8[1][e], None, bf16) for e in range(E)]

    stacked = partial(scaled_matmul, *x8, *w8, None, bf16)
    grouped = partial(scaled_matmul, *rows8, *w8, ends, bf16)
    steps: dict[str, Step] = {
        BF16_BASE: lambda: torch.bmm(x, w.mT),
        "bf16 bmm weight gradient": lambda: torch.bmm(grad.mT, x),
        "bf16 grouped_mm forward": lambda: torch._grouped_mm(rows, w.mT, offs=ends),
        "bf16 grouped_mm weight gradient": lambda: grouped_weight_gradient(grad_rows, rows, ends),
        "fp8 3d-3d": with_accumulation(True, stacked),
        f"fp8 3d-3d, {EXACT}": with_accumulation(False, stacked),
        "fp8 2d-3d": with_accumulation(True, grouped),
        f"fp8 2d-3d, {EXACT}": with_accumulation(False, grouped),
        "fp8 one expert after the other": with_accumulation(True, one_by_one),  # type: ignore[arg-type]
    }
    optional = tuple(name for name in steps if EXACT in name)
    report(steps, context, {"shape": str(shape)}, shape.flops, BF16_BASE, optional)


def report(
    steps: dict[str, Step],
    context: Context,
    head: dict[str, Any],
    flops: int,
    base: str | None,
    optional: tuple[str, ...] = (),
) -> None:
    """Measure, and a row for every step, with its speed over `base`. What is optional a GPU or torch may not take."""
    measured = measure(steps, context.device, hide_launches=True)
    for what, series in measured.items():
        row = {"what": what, **head, **figures(series, hide_launches=True, flops=flops)}
        if what in optional and "error" in row:
            row["absent"] = f"not taken: {row.pop('error')}"
        if base is not None and what != base:
            row["speed_over_bf16"] = speed_over(series, measured.get(base))
        context.add(row)


# --- whether they are right -----------------------------------------------------------------------------------------


def accuracy(what: str, context: Context) -> None:
    """A product of given sizes against fp64 of the same FP8 values: the largest error of a row, relative to the row."""
    kind, _, sizes = what.partition(" ")
    K, N = (32, 48) if context.dry_run else (768, 1536)
    if kind == "3d-3d":
        E, C = 8, int(sizes.removeprefix("C="))
        groups = [C] * E
    else:
        groups = [int(size) for size in sizes.removeprefix("groups ").split(",")]
        E = len(groups)
    x = quantize_rows(draw(context, sum(groups), K))
    w = quantize_rows(draw(context, E, N, K, std=K**-0.5))
    expected = reference(x, w, groups)
    for fast in (True, False):
        row: dict[str, Any] = {"what": what, "sizes": f"K={K}, N={N}, rows {groups}", "fast_accumulation": fast}
        if kind == "3d-3d":
            product = partial(scaled_matmul, x.values.view(E, -1, K), x.scale.view(E, -1), *w, None, torch.bfloat16)
        else:
            product = partial(scaled_matmul, *x, *w, ends_of(groups, context.device), torch.bfloat16)
        try:
            found = with_accumulation(fast, product)().reshape(-1, N)
        except faults() as fault:
            if fast or not device_answers():
                raise
            context.add({**row, "absent": f"not taken: {in_one_line(fault)}"})
            continue
        error, rounding = relative_error(found, expected), relative_error(expected.to(torch.bfloat16), expected)
        row |= {"relative_error": error, "relative_error_of_rounding_alone": rounding, "right": error < RIGHT}
        if not error < RIGHT:  # NaN too
            row["error"] = f"wrong: relative error {error:.2g}"
        context.add(row)


def reference(x: Quantized, w: Quantized, groups: list[int]) -> Tensor:
    rows, weights = ((each.values.double() * each.scale.double().unsqueeze(-1)) for each in (x, w))
    return torch.cat([part @ weight.T for part, weight in zip(rows.split(groups), weights, strict=True)])


def relative_error(found: Tensor, expected: Tensor) -> float:
    if expected.numel() == 0:
        return 0.0
    return ((found.double() - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-30)).max().item()


# --- the head and attention -----------------------------------------------------------------------------------------


def patch_inductor(context: Context) -> None:
    """As a run does it before it compiles casts: apply_fp8 patches inductor, and here has nothing to convert."""
    from model.fp8 import apply_fp8  # loads deepspeed: seconds

    apply_fp8(nn.Module(), FP8Config(enabled=True), emulate=context.dry_run, compiled=not context.dry_run)


def lm_head(rows: str, context: Context) -> None:
    """The head's logits and the gradient of its input, in FP8 with and without the cast of what comes in."""
    T, V, D = (64, 128, 32) if context.dry_run else (int(rows), VOCAB, WIDTH)
    x, w, grad = draw(context, T, D), draw(context, V, D, std=D**-0.5), draw(context, T, V)
    x8, w8, grad8, turned8 = (quantize_rows(each) for each in (x, w, grad, w.t().contiguous()))
    patch_inductor(context)
    cast = quantize_rows if context.dry_run else torch.compile(quantize_rows, dynamic=False)
    bf16 = torch.bfloat16
    shape = {"shape": f"T={T}, D={D}, V={V}"}
    for what, base, products in (
        (
            "logits",
            lambda: F.linear(x, w),
            (lambda: scaled_matmul(*x8, *w8, None, bf16), lambda: scaled_matmul(*cast(x), *w8, None, bf16)),
        ),
        (
            "input gradient",
            lambda: grad @ w,
            (
                lambda: scaled_matmul(*grad8, *turned8, None, bf16),
                lambda: scaled_matmul(*cast(grad), *turned8, None, bf16),
            ),
        ),
    ):
        steps: dict[str, Step] = {
            f"bf16 {what}": base,
            f"fp8 {what}": products[0],
            f"fp8 {what}, with its cast": products[1],
        }
        report(steps, context, shape, 2 * T * V * D, f"bf16 {what}")


def attention(heads: str, context: Context) -> None:
    """Causal attention forward and backward: the implementation that torch takes, and each by its name.

    FLOPs: half of the square, and a backward pass of 2.5 times the forward one, as FlashAttention counts.
    """
    N, H = map(int, heads.split("x"))
    B, S = (2, 32) if context.dry_run else (16, 1024)
    q, k, v = (draw(context, B, S, N, H).transpose(1, 2).requires_grad_() for _ in range(3))
    grad = draw(context, B, S, N, H).transpose(1, 2)
    config = ModelConfig(
        num_layers=1, hidden_size=N * H, num_attention_heads=N, ffn_hidden_size=64, seq_len=S, vocab_size=64
    )
    chosen = attention_backend(config, torch.bfloat16, context.device)

    def forward_and_backward(backends: list[SDPBackend]) -> None:
        if backends:
            with sdpa_kernel(backends):
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(y, (q, k, v), grad)

    named = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    if context.dry_run:
        named = ()  # type: ignore[assignment]
    steps: dict[str, Step] = {f"torch's choice, {chosen}": partial(forward_and_backward, [])}
    steps |= {backend.name: partial(forward_and_backward, [backend]) for backend in named}
    flops = int(3.5 * 2 * B * N * S * S * H)
    report(steps, context, {"shape": f"B={B}, S={S}, N={N}, H={H}"}, flops, None, tuple(steps)[1:])
