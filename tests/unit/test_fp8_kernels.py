"""The Triton casts equal those in torch, interpreted on the CPU; and for Hopper they compile to what was meant.

What the interpreter cannot show, the machine's own arithmetic and casts, is in tests/gpu/test_fp8_kernels_gpu.py.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8_cases import DTYPES, INF, NAN, before_the_cast, differing, far, gate_and_up, in_e4m3, rows_of
from interpreted import Interpreter
from model import dispatch, fp8_casts
from model.fp8_casts import E4M3

if sys.platform != "linux":
    pytest.skip("Triton has wheels for Linux only", allow_module_level=True)
try:
    import triton
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError("no triton: `make setup` installs it where torch does not bring it") from missing
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model import fp8_kernels

ROWS, K = 17, 48
SHAPES = [(0, 16), (1, 16), (15, 48), (16, 256), (17, 768), (33, 1536), (9, 4112)]  # the last walks its rows in blocks
PLAIN = torch.float32  # instead of FP8: values as they are before the cast


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    pool = Interpreter()
    yield pool
    pool.close()


def assert_quantized(y: Tensor, plain: Any, cast: Any) -> None:
    """What an operator gave in PLAIN and in FP8 (values, scale) is y's, as fp8_casts has it."""
    values, scale = before_the_cast(y)
    assert differing(plain[-1], scale) == ""
    assert differing(plain[-2], values) == ""
    assert differing(cast[-1], scale) == ""
    assert differing(cast[-2], in_e4m3(y)) == ""


# --- equal to the casts in torch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_quantised_as_in_torch(interpreter: Interpreter, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = rows_of(*shape, dtype)
    assert_quantized(x, interpreter.run("fp8_rows", x, PLAIN), interpreter.run("fp8_rows", x, E4M3))


def test_leading_dimensions_and_strides_do_not_matter(interpreter: Interpreter) -> None:
    x = rows_of(12, K, torch.bfloat16).view(3, 4, K).transpose(0, 1)
    values, scale = interpreter.run("quantize_rows", x)
    expected = fp8_casts.quantize_rows(x)
    assert differing(values, expected.values) == ""
    assert differing(scale, expected.scale) == ""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_are_gathered_then_quantised(
    interpreter: Interpreter, weighted: bool, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, generator = rows_of(*shape, dtype), torch.Generator().manual_seed(0)
    T, N = shape[0], 21
    index = torch.randint(0, T + 1, (N,), generator=generator)
    index[3] = T
    weights = torch.randn(N, generator=generator) if weighted else None  # fp32, and rounded to x's type
    if weights is not None:
        weights[::5] = 0.0
    plain = interpreter.run("fp8_gather", x, index, weights, PLAIN)
    padded = torch.cat([x, torch.zeros_like(x[:1]) if T else torch.zeros(1, shape[1], dtype=dtype)])
    rows = padded[index]
    if weights is not None:
        rows = (rows.float() * torch.where(index < T, weights, 0).to(dtype).float()[:, None]).to(dtype)
    assert differing(plain[0], rows) == ""
    assert_quantized(rows, plain, interpreter.run("fp8_gather", x, index, weights, E4M3))


@pytest.mark.parametrize("weights", [None, [0.3, -2.0, 0.7, 1.0]])
def test_a_gathered_row_is_the_one_dispatch_gathers(
    interpreter: Interpreter, weights: list[float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "by_formula", lambda _: True)  # as on a GPU
    x, index = torch.randn(3, K).bfloat16(), torch.tensor([2, 3, 0, 2])
    given = None if weights is None else torch.tensor(weights)
    rows, _ = interpreter.run("gather_quantize", x, index, given)
    assert torch.equal(rows, dispatch.sum_of_rows(x, index.unsqueeze(1), None if given is None else given.unsqueeze(1)))


def test_a_row_that_is_not_there_is_zeros_beside_nan(interpreter: Interpreter) -> None:
    x = torch.full((2, K), NAN)
    rows, quantized = interpreter.run("gather_quantize", x, torch.tensor([2, 2]), torch.tensor([NAN, 1.0]))
    assert not rows.any()
    assert not quantized.values.float().any()
    assert torch.equal(quantized.scale, before_the_cast(torch.zeros(2, K))[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_relu2_and_its_backward_are_those_in_torch(
    interpreter: Interpreter, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    a, dh = rows_of(*shape, dtype), rows_of(*shape, dtype, seed=1)
    plain = interpreter.run("fp8_activate", a, "relu2", PLAIN)
    h, _ = fp8_casts.activate_quantize(a, "relu2")
    assert differing(plain[0], h) == ""
    assert_quantized(h, plain, interpreter.run("fp8_activate", a, "relu2", E4M3))

    plain = interpreter.run("fp8_relu2_backward", dh, h, PLAIN)
    root = h.double().sqrt().float()  # rounded once; torch's root on the CPU is an ulp of fp32 off now and then
    da = (2 * dh.float() * root).to(dtype)
    assert differing(plain[0], da) == ""
    assert far(da, fp8_casts.relu2_backward_quantize(dh, h)[0]) == ""
    assert_quantized(da, plain, interpreter.run("fp8_relu2_backward", dh, h, E4M3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_and_its_backward_are_those_in_torch(
    interpreter: Interpreter, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    a, dh = gate_and_up(*shape, dtype), rows_of(*shape, dtype, seed=2)
    plain = interpreter.run("fp8_activate", a, "swiglu", PLAIN)
    assert far(plain[0], fp8_casts.activate_quantize(a, "swiglu")[0]) == ""
    assert_quantized(plain[0], plain, interpreter.run("fp8_activate", a, "swiglu", E4M3))

    plain = interpreter.run("fp8_swiglu_backward", dh, a, PLAIN)
    h, da, _ = fp8_casts.swiglu_backward_quantize(dh, a)
    gate, up = a.float().chunk(2, dim=-1)
    of_gate = dh.float() * up * torch.sigmoid(gate) * (1 + gate.abs())
    assert far(plain[0], h) == ""
    assert far(plain[1], da, terms=torch.cat([of_gate, torch.zeros_like(of_gate)], dim=-1)) == ""
    assert_quantized(plain[1], plain, interpreter.run("fp8_swiglu_backward", dh, a, E4M3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 48, 80), (2, 144, 256), (2, 256, 64), (1, 16, 4112)])
def test_weights_are_quantised_both_ways_as_in_torch(
    interpreter: Interpreter, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    L, N, K = shape
    w = torch.stack([rows_of(N, K, dtype, seed=matrix) for matrix in range(L)])
    w[0].nan_to_num_(1.0, 1.0, -1.0)  # else one NaN is all that a turned matrix shows
    cast = fp8_casts.quantize_weights(w)
    forward, turned = interpreter.run("quantize_weights", w)
    for ours, theirs in zip((*forward, *turned), (*cast[0], *cast[1]), strict=True):
        assert differing(ours, theirs) == ""
    values, scale_LN, turned_values, scale_LK = interpreter.run("fp8_weights", w, PLAIN)
    assert differing(scale_LK, cast[1].scale) == ""
    assert differing(turned_values, (w.float() / scale_LK[:, :1, None]).clamp(-448, 448).mT) == ""
    assert_quantized(w, (values, scale_LN), forward)


@pytest.mark.parametrize("special", [NAN, INF])
def test_one_value_that_is_not_finite_spoils_its_row_and_its_turned_matrix(
    interpreter: Interpreter, special: float
) -> None:
    w = torch.randn(2, 32, K).bfloat16()
    w[0, 3, 5] = special
    forward, turned = interpreter.run("quantize_weights", w)
    back = forward.values.float() * forward.scale.unsqueeze(-1)
    assert back[0, 3].isnan().all()
    assert back[0, 4].isfinite().all()
    back = turned.values.float() * turned.scale.unsqueeze(-1)
    assert back[0].isnan().all()
    assert back[1].isfinite().all()


# --- scales ---------------------------------------------------------------------------------------------------------


def test_the_scale_of_every_amax_in_bf16_is_torchaos(interpreter: Interpreter) -> None:
    amax = (
        torch.arange(0x8000, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    )  # infinity and NaN are among them
    x = torch.zeros(len(amax), 16, dtype=torch.bfloat16)
    x[:, 11] = -amax
    values, scale = interpreter.run("fp8_rows", x, PLAIN)
    assert differing(scale, before_the_cast(x)[1]) == ""
    assert values[amax < INF].abs().max() <= 448


def test_the_scale_of_an_amax_in_fp32_is_exact_and_torchaos_but_just_above_three_and_a_half(
    interpreter: Interpreter,
) -> None:
    boundary = (1.75 * 2.0 ** torch.arange(-39, 127)).view(torch.int32)
    near = (boundary[:, None] + torch.arange(-99, 100)).flatten()
    generator = torch.Generator().manual_seed(0)
    anywhere = torch.randint(0x2B8CBCCD, 0x7F7FFFFF, (20_000,), generator=generator)  # from 1e-12
    amax = torch.cat([near, anywhere]).int().view(torch.float32)
    x = torch.zeros(len(amax), 16)
    x[:, 2] = amax
    _, scale = interpreter.run("fp8_rows", x, PLAIN)
    s = scale.double().reciprocal()
    assert (s * amax.double() <= 448).all()  # the largest power of two that
    assert (2 * s * amax.double() > 448).all()  # keeps amax in range
    theirs = before_the_cast(x)[1]
    above = torch.frexp(amax.double()).mantissa / 0.875 - 1  # of amax over 1.75 * 2^j
    differs = scale != theirs
    assert differs.any()
    assert ((above > 0) & (above < 2.7e-6))[differs].all()
    assert torch.equal(theirs[differs] * 2, scale[differs])


# --- for torch.compile, and for Hopper ------------------------------------------------------------------------------


X, A = torch.randn(5, K), torch.randn(5, 2 * K)
INDEX, WEIGHTS = torch.tensor([4, 5, 0]), torch.randn(3)
CALLS = [
    ("fp8_rows", X),
    ("fp8_gather", X, INDEX, None),
    ("fp8_gather", X, INDEX, WEIGHTS),
    ("fp8_activate", X, "relu2"),
    ("fp8_activate", A, "swiglu"),
    ("fp8_relu2_backward", X, X.square()),
    ("fp8_swiglu_backward", X, A),
    ("fp8_weights", torch.randn(2, 32, K)),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0])
def test_torch_compile_can_trace_the_operator(interpreter: Interpreter, call: tuple[Any, ...]) -> None:
    interpreter.run("check_op", *call, PLAIN)


class Recorder:
    """Instead of a kernel: what it would be compiled for, where it would run."""

    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, num_warps: int, **named: Any) -> None:
            signature, constants, attributes = {}, {}, {}
            for i, (parameter, value) in enumerate(zip(self.kernel.params, (*arguments, *named.values()), strict=True)):
                if isinstance(value, Tensor):
                    signature[parameter.name] = triton.runtime.jit.mangle_type(value)
                    attributes[(i,)] = [["tt.divisibility", 16]]
                elif value is None or parameter.is_constexpr:
                    signature[parameter.name], constants[parameter.name] = "constexpr", value
                else:
                    assert parameter.do_not_specialize, parameter.name
                    signature[parameter.name] = "i32"
            assert list(named) == self.kernel.arg_names[len(arguments) :]
            self.launches.append((self.kernel, signature, constants, attributes, num_warps))

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    recorded: list[Any] = []
    for name in ("rows_kernel", "swiglu_backward_kernel", "turn_kernel"):
        monkeypatch.setattr(fp8_kernels, name, Recorder(getattr(fp8_kernels, name), recorded))
    return recorded


def call_all(rows: int, K: int) -> None:
    x = torch.zeros(rows, K, dtype=torch.bfloat16)
    a, index = torch.cat([x, x], dim=1), torch.zeros(rows, dtype=torch.int64)
    fp8_kernels.quantize_rows(x)
    fp8_kernels.gather_quantize(x, index, torch.zeros(rows))
    fp8_kernels.activate_quantize(x, "relu2")
    fp8_kernels.activate_quantize(a, "swiglu")
    fp8_kernels.relu2_backward_quantize(x, x)
    fp8_kernels.swiglu_backward_quantize(x, a)
    fp8_kernels.quantize_weights(torch.zeros(2, 768, K, dtype=torch.bfloat16))


def test_another_number_of_rows_compiles_nothing(launches: list[Any]) -> None:
    call_all(1, 768)
    once = list(launches)
    for rows in (16, 17, 1000):
        launches.clear()
        call_all(rows, 768)
        assert launches == once


@pytest.mark.parametrize("K", [768, 14336])
def test_on_hopper_every_kernel_moves_16_bytes_a_time_and_never_fp8_between_threads(
    launches: list[Any], K: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    call_all(5, K)
    assert len(launches) == 8
    for kernel, signature, constants, attributes, num_warps in launches:
        source = ASTSource(kernel, signature, constants, attributes)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
        ttgir, ptx = made.asm["ttgir"], made.asm["ptx"]
        assert made.asm["cubin"]  # ptxas took it
        moved = re.findall(r"ttg\.convert_layout .*? : tensor<(\S+?),", ttgir)
        assert not [one for one in moved if re.search(r"x(f8|i8)", one)], moved  # triton-lang/triton#11111
        assert ".NaN" not in ptx
        if writes_tiles := constants.get("values", 0) is not None:
            assert {"0f43E00000", "0fC3E00000"} <= set(re.findall(r"\b0f[0-9A-F]{8}", ptx))  # clamped to +-448
            assert set(re.findall(r"cvt\S*e4m3\S*", ptx)) == {"cvt.rn.satfinite.e4m3x2.f32"}
        if "turned" in signature:  # tensors may have more than 2^31 elements
            assert set(re.findall(r"tt\.addptr .* tensor<\d+x\d+x(i\d+),", ttgir)) == {"i64"}
        else:
            assert all("i64" in product for product in re.findall(r"arith\.muli .* : (\S+)", ttgir))
        for direction in ("ld", "st") if writes_tiles else ("ld",):
            accesses = re.findall(rf"\b{direction}\.global\S*", ptx)
            assert f"{direction}.global.v4.b32" in accesses
            assert not [one for one in accesses if one.endswith(("b8", "b16"))]


def test_a_width_that_is_no_multiple_of_16_is_refused() -> None:
    with pytest.raises(AssertionError, match="not a multiple of 16"):
        fp8_kernels.quantize_rows(torch.zeros(2, 40))
