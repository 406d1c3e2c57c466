"""What is cast to FP8: scales are exact powers of two, values lie within e4m3's error, nothing overflows or hides."""

from __future__ import annotations

import pytest
import torch

from model.fp8_casts import E4M3, Quantized, quantize_rows, quantize_weights, row_scales, to_fp8_saturated

R, K = 16, 48


def dequantized(quantized: Quantized) -> torch.Tensor:
    return quantized.values.double() * quantized.scale.double().unsqueeze(-1)


def rows(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(R, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_scale_of_every_bf16_number_is_the_largest_power_of_two_that_keeps_it_in_range() -> None:
    amax = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)  # all that are finite, from 0
    s = row_scales(amax.unsqueeze(1)).squeeze(1).double()
    mantissa, _ = torch.frexp(s)
    assert (mantissa == 0.5).all(), "not a power of two"
    clamped = amax.double().clamp(min=1e-12)
    assert (s * clamped <= 448).all()
    assert (2 * s * clamped > 448).all(), "half of the range is given away"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 1e5, 1e30])
def test_a_value_is_off_by_at_most_half_a_step_of_e4m3(dtype: torch.dtype, size: float) -> None:
    x = (rows(torch.float32) * size).to(dtype)
    error = (dequantized(quantize_rows(x)) - x.double()).abs()
    s = row_scales(x).double()
    assert (error <= torch.maximum(2**-4 * x.double().abs(), 2**-10 / s)).all()
    assert error.max() > 0, "a cast without any error is not to FP8"


def test_what_is_out_of_range_saturates_and_nan_stays_nan() -> None:
    x = torch.tensor([1000.0, -1000.0, torch.inf, torch.nan, 448.0])
    assert to_fp8_saturated(x, E4M3).float().tolist()[:3] == [448.0, -448.0, 448.0]
    assert to_fp8_saturated(x, E4M3).float().isnan().tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_row_with_a_number_that_is_not_finite_is_nan_and_no_other_row_is(poison: float) -> None:
    x = rows()
    clean = dequantized(quantize_rows(x))
    x[3, 7] = poison
    found = dequantized(quantize_rows(x))
    assert found[3].isnan().all()
    others = torch.arange(R) != 3
    assert torch.equal(found[others], clean[others])


def test_rows_of_zeros_and_no_rows_at_all_are_cast() -> None:
    assert torch.equal(dequantized(quantize_rows(torch.zeros(2, K))), torch.zeros(2, K, dtype=torch.float64))
    assert quantize_rows(torch.zeros(0, K)).values.shape == (0, K)


def test_weights_have_a_scale_for_every_row_forwards_and_one_for_every_matrix_backwards() -> None:
    w_LNK = torch.stack([rows(seed=seed) * 10.0**seed for seed in range(3)])
    w_LNK[1, 4] *= 100
    forward, backward = quantize_weights(w_LNK)
    assert torch.equal(forward.scale, row_scales(w_LNK).reciprocal().squeeze(-1))
    largest = w_LNK.abs().amax((1, 2), keepdim=True)
    assert torch.equal(backward.scale, row_scales(largest).reciprocal().view(3, 1).expand(3, K))
    assert backward.values.shape == (3, K, R)
    assert backward.values.is_contiguous()
    error = (dequantized(backward).mT - w_LNK.double()).abs()
    smallest = 2**-10 * backward.scale[:, :1, None].double()
    assert (error <= torch.maximum(2**-4 * w_LNK.double().abs(), smallest)).all()


def test_compiled_casts_give_the_same_bits() -> None:
    x = rows(torch.bfloat16)
    for cast in (quantize_rows, lambda x: quantize_weights(x.unsqueeze(0))[1]):
        eager, compiled = cast(x), torch.compile(cast)(x)
        assert torch.equal(eager.values.view(torch.uint8), compiled.values.view(torch.uint8))
        assert torch.equal(eager.scale, compiled.scale)
