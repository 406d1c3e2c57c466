"""The casts to FP8, compiled torch beside Triton: time, bytes that have to move at the least, and whether bytes agree.

Inputs rotate over copies that together are several times as large as the L2 cache, as a training step would have them.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from model import fp8_casts
from model.config import FP8Config
from model.dispatch import sum_of_rows
from model.fp8 import apply_fp8
from model.fp8_casts import Quantized, quantize_rows
from tools.gpu_check.child import FAULTS, Context, Row, in_one_line
from tools.gpu_check.gemms import draw
from tools.gpu_check.shapes import Shape, shape_named
from tools.gpu_check.timing import Step, figures, measure, speed_over

ROTATE_OVER = 256 * 2**20  # bytes; H200's L2 has 50 MB
COPY_BYTES = 2**30

Inputs = tuple[Any, ...]
Cast = Callable[..., Any]


def gather_quantize(x: Tensor, index: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Quantized]:
    """rows[n] = x[index[n]], times weights[n], as model/dispatch.py gathers; and their cast."""
    rows = sum_of_rows(x, index.unsqueeze(1), None if weights is None else weights.unsqueeze(1))
    return rows, quantize_rows(rows)


def casts(case: str, context: Context) -> None:
    patch_inductor(context)
    shape = shape_named(case, context.dry_run)
    triton, absent = triton_casts()
    copied = copy_bandwidth(context)
    for (
        name,
        make,
        moved,
    ) in casts_of(shape, context):
        measure_cast(name, make, moved, shape, context, (triton, absent), copied)


def patch_inductor(context: Context) -> None:
    """As a run does it before it compiles casts: apply_fp8 patches inductor, and there is nothing else to convert."""
    apply_fp8(nn.Module(), FP8Config(enabled=True), emulate=context.dry_run, compiled=not context.dry_run)


def triton_casts() -> tuple[ModuleType | None, str]:
    """model/fp8_kernels.py, or why it is not measured."""
    try:
        return importlib.import_module("model.fp8_kernels"), ""
    except ImportError as error:
        return None, in_one_line(error)


def copy_bandwidth(context: Context) -> float | None:
    """GB/s of a device copy, read and written bytes together."""
    size = 2**12 if context.dry_run else COPY_BYTES
    source = torch.zeros(size, dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    series = measure({"copy": lambda: target.copy_(source)}, context.device, hide_launches=True)["copy"]
    row = {"what": "device copy", "implementation": "torch", **figures(series, True, moved_bytes=2 * size)}
    context.add(row)
    return row.get("gb_per_s")


def casts_of(shape: Shape, context: Context) -> list[tuple[str, Callable[[], Inputs], int]]:
    """Name, a maker of inputs, and bytes to be moved: bf16 has 2 for a number, FP8 1, a scale 4."""
    E, C, K, N = shape
    R = E * C
    T, top = R // 2, 2  # tokens of a block with two choices for each
    index = torch.randperm(R, device=context.device) // top
    gates = torch.rand(R, device=context.device)
    small, wide = (lambda: draw(context, R, K)), (lambda: draw(context, R, N))
    return [
        ("quantize_rows of x, or of dy", lambda: (small(),), R * (3 * K + 4)),
        ("gather_quantize of x", lambda: (draw(context, T, K), index), T * 2 * K + R * (3 * K + 4 + 8)),
        ("gather_quantize of dy, weighted", lambda: (draw(context, T, K), index, gates), T * 2 * K + R * (3 * K + 16)),
        ("activate_quantize relu2", lambda: (wide(), "relu2"), R * (5 * N + 4)),
        ("relu2_backward_quantize", lambda: (wide(), wide().square()), R * (7 * N + 4)),
        ("activate_quantize swiglu", lambda: (draw(context, R, 2 * N), "swiglu"), R * (7 * N + 4)),
        ("swiglu_backward_quantize", lambda: (wide(), draw(context, R, 2 * N)), R * (14 * N + 4)),
        ("quantize_weights", lambda: (draw(context, E, N, K),), E * (4 * N * K + 4 * (N + K))),
    ]


def measure_cast(
    name: str,
    make: Callable[[], Inputs],
    moved: int,
    shape: Shape,
    context: Context,
    triton: tuple[ModuleType | None, str],
    copied: float | None,
) -> None:
    """Rows of one cast, and of whether both give the same bytes as the plain torch form."""
    function = name.split()[0]
    plain: Cast = gather_quantize if function == "gather_quantize" else getattr(fp8_casts, function)
    compiled: Cast = plain if context.dry_run else torch.compile(plain, dynamic=False)
    inputs = make()
    size = sum(each.nbytes for each in inputs if isinstance(each, Tensor))
    copies = [inputs, *(tuple(clone(each) for each in inputs) for _ in range(math.ceil(ROTATE_OVER / size) - 1))]
    if context.dry_run:
        copies = copies[:1]
    implementations: dict[str, Cast] = {"torch, compiled": compiled}
    head = {"what": name, "shape": str(shape), "input_copies": len(copies)}
    module, absent = triton
    if module is not None and hasattr(module, function):
        implementations["triton"] = getattr(module, function)
    else:
        context.add({**head, "implementation": "triton", "absent": absent or f"no {function} in model/fp8_kernels.py"})
    steps: dict[str, Step] = {}
    for implementation, cast in implementations.items():
        steps[implementation] = partial(on_the_next, cast, itertools.cycle(copies))
    measured = measure(steps, context.device, hide_launches=True)
    for implementation, series in measured.items():
        row: Row = {**head, "implementation": implementation, **figures(series, True, moved_bytes=moved)}
        if copied is not None and "gb_per_s" in row:
            row["share_of_copy"] = row["gb_per_s"] / copied
        if series.error is None:
            row |= compare(implementations[implementation], plain, inputs)
            row["first_call_s"] = series.first_call_s
        if implementation != "torch, compiled":
            row["speed_over_torch"] = speed_over(series, measured["torch, compiled"])
        context.add(row)


def on_the_next(cast: Cast, turn: Iterator[Inputs]) -> Any:
    return cast(*next(turn))


def clone(each: Any) -> Any:
    return each.clone() if isinstance(each, Tensor) else each


def compare(cast: Cast, plain: Cast, inputs: Inputs) -> Row:
    """How many bytes of the outputs differ from those of the plain form."""
    try:
        pairs = list(zip(flat(cast(*inputs)), flat(plain(*inputs)), strict=True))
    except FAULTS as fault:  # the plain form needs more memory than the compiled one
        return {"bytes": f"not compared: {in_one_line(fault)}"}
    different = sum(int((a.view(torch.uint8) != b.view(torch.uint8)).sum()) for a, b in pairs)
    return {"bytes": "equal to plain torch's" if not different else f"{different} differ from plain torch's",
            "bytes_differing": different}  # fmt: skip


def flat(outputs: Any) -> list[Tensor]:
    return [outputs.contiguous()] if isinstance(outputs, Tensor) else [x for each in outputs for x in flat(each)]
