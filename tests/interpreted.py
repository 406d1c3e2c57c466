"""A process in which Triton's kernels run on the CPU, one program after the other.

Triton decides when it is first imported whether it interprets (TRITON_INTERPRET), and torch imports it sooner or later:
so this happens in a process of its own, and the tests' process keeps the compiler. The interpreter of Triton 3.6 and
3.7 casts wrongly: fp32 to bf16 truncates, bf16's subnormals grow, one FP8 value in twenty is another. Here torch casts.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

SECONDS_PER_CALL = 120  # a hang is a failure; no call is near this


class Interpreter:
    """`run(name, *arguments)` is model.fp8_kernels' function of that name, interpreted; or check_op below."""

    def __init__(self) -> None:
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=interpret)

    def run(self, name: str, *arguments: Any) -> Any:
        return unpacked(self.pool.submit(call, name, packed(arguments)).result(timeout=SECONDS_PER_CALL))

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def interpret() -> None:
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy
    from triton.runtime import interpreter

    torch.set_num_threads(1)
    numpy.seterr(all="ignore")  # NaN and infinity are among the cases

    def by_torch(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}
        bits = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}
        given = torch.from_numpy(data.copy()).view(types[source.name]).to(types[target.name])
        return given.view(bits[given.itemsize]).numpy()

    assert interpreter._convert_float
    interpreter._convert_float = by_torch


def call(name: str, arguments: bytes) -> bytes:
    from model import fp8_kernels

    function = check_op if name == "check_op" else getattr(fp8_kernels, name)
    return packed(function(*unpacked(arguments)))


def packed(what: Any) -> bytes:
    torch.save(what, file := io.BytesIO())
    return file.getvalue()


def unpacked(what: bytes) -> Any:
    return torch.load(io.BytesIO(what), weights_only=False)


def check_op(name: str, *arguments: Any) -> None:
    """torch's own checks of a custom operator: nothing is mutated or aliased, and shapes are as announced."""
    from model import fp8_kernels

    torch.library.opcheck(
        getattr(fp8_kernels, name),
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
