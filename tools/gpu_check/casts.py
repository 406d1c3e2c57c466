"""The casts to FP8, compiled torch beside Triton: time, bytes that have to move at the least, and whether bytes agree.

Inputs rotate over copies that together are several times as large as the L2 cache, as a training step would have them.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model import fp8_casts
from model.dispatch import sum_of_rows
from model.fp8_casts import Quantized, quantize_rows
from tools.gpu_check.child import Context, Row, faults, in_one_line, without_triton_casts
from tools.gpu_check.gemms import draw, patch_inductor
from tools.gpu_check.shapes import Shape, shape_named
from tools.gpu_check.timing import Step, figures, measure, speed_over

ROTATE_OVER = 256 * 2**20  # bytes; H200's L2 has 50 MB
COPY_BYTES = 2**30
BASE = "torch, compiled"

Inputs = tuple[Any, ...]
Cast = Callable[..., Any]


def gather_quantize(x: Tensor, index: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Quantized]:
    """rows[n] = x[index[n]], times weights[n], as model/dispatch.py gathers; and their cast."""
    rows = sum_of_rows(x, index.unsqueeze(1), None if weights is None else weights.unsqueeze(1))
    return rows, quantize_rows(rows)


def casts(case: str, context: Context) -> None:
    """Rows of one cast at one shape, and of a device copy in the same process."""
    name, _, cast = case.partition(" ")
    shape = shape_named(name, context.dry_run)
    torch.compiler.reset()  # dynamo's limit on recompiling is one for all shapes
    patch_inductor(context)
    inputs, moved = inputs_of(cast, shape, context)
    measure_cast(cast, inputs, moved, {"what": cast, "shape": str(shape)}, copy_bandwidth(context), context)


def copy_bandwidth(context: Context) -> float | None:
    """GB/s of a device copy, read and written bytes together."""
    size = 2**12 if context.dry_run else COPY_BYTES
    source = torch.zeros(size, dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    series = measure({"copy": lambda: target.copy_(source)}, context.device, hide_launches=True)["copy"]
    row = {"what": "device copy", "implementation": "torch", **figures(series, True, moved_bytes=2 * size)}
    context.add(row)
    return row.get("gb_per_s")


def inputs_of(cast: str, shape: Shape, context: Context) -> tuple[Inputs, int]:
    """A cast's inputs, and the bytes to be moved: bf16 has 2 for a number, FP8 1, a scale 4, an index 8, a gate 4."""
    E, C, K, N = shape
    R = E * C
    T, top_k = R // 2, 2
    match cast:
        case "quantize_rows x":  # or dy, which has the same shape
            return (draw(context, R, K),), R * (3 * K + 4)
        case "gather_quantize x":
            index = torch.randperm(R, device=context.device) // top_k
            return (draw(context, T, K), index), T * 2 * K + R * (3 * K + 4 + 8)
        case "gather_quantize dy":  # weighted by the gates
            index = torch.randperm(R, device=context.device) // top_k
            gates = torch.rand(R, device=context.device)
            return (draw(context, T, K), index, gates), T * 2 * K + R * (3 * K + 4 + 8 + 4)
        case "activate_quantize relu2":
            return (draw(context, R, N), "relu2"), R * (5 * N + 4)
        case "relu2_backward_quantize":
            return (draw(context, R, N), draw(context, R, N).square()), R * (7 * N + 4)
        case "activate_quantize swiglu":
            return (draw(context, R, 2 * N), "swiglu"), R * (7 * N + 4)
        case "swiglu_backward_quantize":
            return (draw(context, R, N), draw(context, R, 2 * N)), R * (14 * N + 4)
    assert cast == "quantize_weights", cast
    return (draw(context, E, N, K),), E * (4 * N * K + 4 * (N + K))


def measure_cast(cast: str, inputs: Inputs, moved: int, head: Row, copied: float | None, context: Context) -> None:
    """Its implementations in turn, and whether they give the same bytes as the plain torch form."""
    function = cast.split()[0]
    plain: Cast = gather_quantize if function == "gather_quantize" else getattr(fp8_casts, function)
    implementations: dict[str, Cast] = {BASE: plain if context.dry_run else torch.compile(plain, dynamic=False)}
    absent = without_triton_casts(context.dry_run)
    if absent is None:
        try:
            implementations["triton"] = getattr(importlib.import_module("model.fp8_kernels"), function)
        except faults() as fault:
            absent = in_one_line(fault)
    if absent is not None:
        context.add({**head, "implementation": "triton", "absent": absent})
    size = sum(each.nbytes for each in inputs if isinstance(each, Tensor))
    more = 0 if context.dry_run else math.ceil(ROTATE_OVER / size) - 1
    copies = [inputs, *(tuple(clone(each) for each in inputs) for _ in range(more))]
    steps: dict[str, Step] = {
        name: partial(on_the_next, implementation, itertools.cycle(copies))
        for name, implementation in implementations.items()
    }
    measured = measure(steps, context.device, hide_launches=True)
    for name, series in measured.items():
        row: Row = {**head, "implementation": name, "input_copies": len(copies)}
        row |= figures(series, True, moved_bytes=moved)
        if copied is not None and "gb_per_s" in row:
            row["share_of_copy"] = row["gb_per_s"] / copied
        if series.error is None:
            row |= compare(implementations[name], plain, inputs) | {"first_call_s": series.first_call_s}
        if name != BASE:
            row["speed_over_torch"] = speed_over(series, measured[BASE])
        context.add(row)


def on_the_next(cast: Cast, turn: Iterator[Inputs]) -> Any:
    return cast(*next(turn))


def clone(each: Any) -> Any:
    return each.clone() if isinstance(each, Tensor) else each


def compare(cast: Cast, plain: Cast, inputs: Inputs) -> Row:
    """How many bytes of the outputs differ from those of the plain form. Some do where inductor fuses: what it casts it
    has not rounded to bf16 before, as the plain form has."""
    try:
        pairs = list(zip(flat(cast(*inputs)), flat(plain(*inputs)), strict=True))
    except faults() as fault:  # the plain form needs more memory than the compiled one
        return {"bytes": f"not compared: {in_one_line(fault)}"}
    different = sum(int((a.view(torch.uint8) != b.view(torch.uint8)).sum()) for a, b in pairs)
    share = different / sum(a.nbytes for a, _ in pairs)
    return {"bytes": f"{100 * share:.2g}% differ from plain torch's" if different else "equal to plain torch's",
            "bytes_differing": different}  # fmt: skip


def flat(outputs: Any) -> list[Tensor]:
    return [outputs.contiguous()] if isinstance(outputs, Tensor) else [x for each in outputs for x in flat(each)]
