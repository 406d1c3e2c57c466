"""The Triton casts on a GPU: its arithmetic and its own casts, byte for byte with those in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8_cases import DTYPES, differing, far, gate_and_up, rows_of
from model import dispatch, fp8_casts
from model.fp8_casts import Quantized

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs a CUDA device that casts to FP8",
    ),
]
if torch.cuda.is_available():
    from model import fp8_kernels

SHAPES = [(0, 16), (1, 16), (15, 48), (16, 256), (17, 768), (33, 1536), (9, 4112), (5, 16384)]
# Many rows in bf16 only: of so many amax in fp32 one may lie where torchao's log2 rounds up (multiplier_and_scale).
CASES = [*((shape, dtype) for shape in SHAPES for dtype in DTYPES), ((32768, 768), torch.bfloat16)]


def assert_same(ours: Quantized, theirs: Quantized) -> None:
    assert differing(ours.scale, theirs.scale) == ""
    assert differing(ours.values, theirs.values) == ""


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_rows_are_quantised_as_in_torch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = rows_of(*shape, dtype, "cuda")
    assert_same(fp8_kernels.quantize_rows(x), fp8_casts.quantize_rows(x))


@pytest.mark.parametrize(("shape", "dtype"), CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_are_gathered_then_quantised(weighted: bool, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.nan_to_num(rows_of(*shape, dtype, "cuda"), 1.0, 1.0, -1.0)
    T, N = shape[0], shape[0] + 5
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, T + 1, (N,), generator=generator).cuda()
    weights = torch.randn(N, generator=generator).cuda() if weighted else None
    rows, quantized = fp8_kernels.gather_quantize(x, index, weights)
    if T:
        expected = dispatch.sum_of_rows(x, index.unsqueeze(1), None if weights is None else weights.unsqueeze(1))
        assert torch.equal(rows, expected)
    assert not rows[index == T].any()
    assert_same(quantized, fp8_casts.quantize_rows(rows))


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_relu2_and_its_backward_are_those_in_torch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    a, dh = rows_of(*shape, dtype, "cuda"), rows_of(*shape, dtype, "cuda", seed=1)
    h, quantized = fp8_kernels.activate_quantize(a, "relu2")
    expected_h, expected = fp8_casts.activate_quantize(a, "relu2")
    assert differing(h, expected_h) == ""
    assert_same(quantized, expected)
    da, quantized = fp8_kernels.relu2_backward_quantize(dh, h)
    expected_da, expected = fp8_casts.relu2_backward_quantize(dh, h)
    assert differing(da, expected_da) == ""
    assert_same(quantized, expected)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_swiglu_and_its_backward_are_those_in_torch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    a, dh = gate_and_up(*shape, dtype, "cuda"), rows_of(*shape, dtype, "cuda", seed=2)
    h, quantized = fp8_kernels.activate_quantize(a, "swiglu")
    assert far(h, fp8_casts.activate_quantize(a, "swiglu")[0]) == ""
    assert_same(quantized, fp8_casts.quantize_rows(h))
    again, da, quantized = fp8_kernels.swiglu_backward_quantize(dh, a)
    assert differing(again, h) == ""
    gate, up = a.float().chunk(2, dim=-1)
    of_gate = dh.float() * up * torch.sigmoid(gate) * (1 + gate.abs())
    terms = torch.cat([of_gate, torch.zeros_like(of_gate)], dim=-1)
    assert far(da, fp8_casts.swiglu_backward_quantize(dh, a)[1], terms) == ""
    assert_same(quantized, fp8_casts.quantize_rows(da))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 48, 80), (2, 144, 256), (1, 16, 16384), (8, 1536, 768)])
def test_weights_are_quantised_both_ways_as_in_torch(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    L, N, K = shape
    w = torch.stack([rows_of(N, K, dtype, "cuda", seed=matrix) for matrix in range(L)])
    w[0].nan_to_num_(1.0, 1.0, -1.0)
    for ours, theirs in zip(fp8_kernels.quantize_weights(w), fp8_casts.quantize_weights(w), strict=True):
        assert_same(ours, theirs)


def test_rows_beyond_two_to_the_31_elements_are_their_own() -> None:
    K = 768
    x = torch.zeros(2**31 // K + 100, K, dtype=torch.bfloat16, device="cuda")
    x[-90:] = rows_of(90, K, torch.bfloat16, "cuda")
    values, scale = fp8_kernels.quantize_rows(x)
    assert_same(Quantized(values[-90:], scale[-90:]), fp8_casts.quantize_rows(x[-90:]))
    assert not values[:100].float().any()


def test_a_compiled_function_gives_the_same() -> None:
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        h, quantized = fp8_kernels.activate_quantize(x * 2, "relu2")
        return h + 1, quantized.values

    x = rows_of(33, 768, torch.bfloat16, "cuda")
    for ours, theirs in zip(torch.compile(forward, fullgraph=True)(x), forward(x), strict=True):
        assert differing(ours, theirs) == ""


def test_another_number_of_rows_compiles_nothing() -> None:
    cache = fp8_kernels.rows_kernel.device_caches
    counts = []
    for rows in (1, 16, 17, 1000):
        fp8_kernels.quantize_rows(rows_of(rows, 768, torch.bfloat16, "cuda"))
        counts.append(len(cache[torch.cuda.current_device()][0]))
    assert len(set(counts)) == 1
