"""Experts alone, forward and backward from a fixed gradient: BF16, ours in FP8, and torchao's two forms.

All in one module compiled as a run compiles its blocks, on the same rows, in the layout of a fixed capacity. The FP8
copies of our experts' weights are cast once before, as a run casts them once in an optimizer step; that cost has a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.experts import LoopedExperts, StackedExperts
from model.fp8 import TorchaoExperts, to_float8_linear
from model.fp8_experts import FP8Experts, take_over
from tools.gpu_check.child import Context, Row, device_answers, faults, in_one_line, without_triton_casts
from tools.gpu_check.gemms import draw, patch_inductor
from tools.gpu_check.shapes import Shape, shape_named
from tools.gpu_check.timing import figures, measure, speed_over

BASE = "bf16"
KINDS = {
    "ours": (BASE, "fp8", "fp8, triton casts"),
    "torchao": (BASE, "torchao grouped, rowwise", "torchao Float8Linear loop, tensorwise"),
}


def mlp(case: str, context: Context) -> None:
    name, _, group = case.partition(" ")
    shape = shape_named(name, context.dry_run)
    torch.compiler.reset()  # dynamo's limit on recompiling is one for all modules
    patch_inductor(context)
    makers = makers_of(shape, context)
    rows, grad = draw(context, shape.E, shape.C, shape.K).requires_grad_(), draw(context, shape.E, shape.C, shape.K)
    steps: dict[str, Callable[[], None]] = {}
    notes: dict[str, Row] = {}
    for kind in KINDS[group]:
        if "triton" in kind and (why := without_triton_casts(context.dry_run)):
            notes[kind] = {"absent": why}
            continue
        try:
            steps[kind] = step_of(makers[kind](), rows, grad, context)
        except faults() as fault:
            if not device_answers():
                raise
            notes[kind] = {"error": in_one_line(fault)}
    measured = measure(steps, context.device, hide_launches=False)
    for kind in KINDS[group]:
        row: Row = {"what": kind, "shape": str(shape)}
        if kind in notes:
            context.add(row | notes[kind])
            continue
        series = measured[kind]
        row |= figures(series, hide_launches=False, flops=6 * shape.flops)
        if series.error is None:
            row |= {"first_call_s": series.first_call_s, "peak_mem_mib": peak_memory_mib(steps[kind], context)}
        if kind != BASE:
            row["speed_over_bf16"] = speed_over(series, measured.get(BASE))
        context.add(row)
    if group == "ours":
        report_refresh(makers, context, shape)


def makers_of(shape: Shape, context: Context) -> dict[str, Callable[[], nn.Module]]:
    """Modules by what they are called; all but the loop share the parameters of one StackedExperts."""
    E, _, K, N = shape
    compiled = not context.dry_run
    with context.device:
        stacked = StackedExperts(E, K, N, "relu2", "ep_size_1").to(torch.bfloat16)
    with torch.no_grad():
        stacked.w1.copy_(draw(context, E, N, K, std=K**-0.5))
        stacked.w2.copy_(draw(context, E, K, N, std=N**-0.5))

    def looped() -> nn.Module:
        with context.device:
            experts = LoopedExperts(E, K, N, "relu2", "ep_size_1").to(torch.bfloat16)
        experts.load_state_dict(stacked.state_dict())
        to_float8_linear(experts, None, "tensorwise", emulate=context.dry_run)
        return experts

    return {
        BASE: lambda: stacked,
        "fp8": lambda: FP8Experts.of(stacked, "torch", compiled),
        "fp8, triton casts": lambda: FP8Experts.of(stacked, "triton", compiled),
        "torchao grouped, rowwise": lambda: take_over(TorchaoExperts, stacked),
        "torchao Float8Linear loop, tensorwise": looped,
    }


def step_of(module: nn.Module, rows: Tensor, grad: Tensor, context: Context) -> Callable[[], None]:
    if isinstance(module, FP8Experts):
        module.refresh()
    module.train()
    if not context.dry_run:
        module.compile(dynamic=False)
    parameters = list(module.parameters())

    def step() -> None:
        module(rows).backward(grad)
        rows.grad = None
        for parameter in parameters:
            parameter.grad = None

    return step


def peak_memory_mib(step: Callable[[], None], context: Context) -> float | None:
    """Of one step, over what was allocated before it; None on a CPU."""
    if context.device.type == "cpu":
        step()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def report_refresh(makers: dict[str, Callable[[], nn.Module]], context: Context, shape: Shape) -> None:
    """What an optimizer step costs besides: both weights cast into the copies."""
    experts = makers["fp8"]()
    assert isinstance(experts, FP8Experts)
    series = measure({"refresh": experts.refresh}, context.device, hide_launches=True)["refresh"]
    context.add({"what": "casting the weights, once a step", "shape": str(shape), **figures(series, True)})
