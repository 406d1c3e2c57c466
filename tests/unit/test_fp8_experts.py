"""FP8 experts: torchao's numbers, the error that theory predicts, stale copies that are caught, and the edge cases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_scaling_utils import get_maybe_axiswise_dim, hp_tensor_to_float8_dynamic

from model import fp8
from model.experts import StackedExperts, activate
from model.fp8 import FP8Linear, TorchaoExperts, recipe_config
from model.fp8_casts import quantize_rows, quantize_weights
from model.fp8_experts import FP8Experts, take_over
from model.fp8_matmul import scaled_matmul
from model.fp8_weights import FP8Weights, refresh_fp8, refuse_stale

L, M, D, FFN = 3, 32, 64, 96


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stacked(activation: str = "relu2", dtype: torch.dtype = torch.bfloat16) -> StackedExperts:
    experts = StackedExperts(L, D, FFN, activation, "ep_size_1").to(dtype)
    with torch.no_grad():
        experts.w1.copy_(random(*experts.w1.shape, seed=1) / math.sqrt(D))
        experts.w2.copy_(random(*experts.w2.shape, seed=2) / math.sqrt(FFN))
    return experts


def in_fp8(experts: StackedExperts) -> FP8Experts:
    converted = FP8Experts.of(experts, "torch", compiled=False)
    refresh_fp8(converted)
    return converted


def passes(experts: Any, rows: Tensor, grad: Tensor, ends: Tensor | None = None) -> dict[str, Tensor]:
    """Outputs and all gradients of one pass forwards and backwards."""
    rows = rows.detach().clone().requires_grad_()
    for parameter in experts.parameters():
        parameter.grad = None
    y = experts(rows, ends)
    y.backward(grad)
    return {"y": y.detach(), "dx": rows.grad, "dw1": experts.w1.grad, "dw2": experts.w2.grad}  # type: ignore[dict-item]


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


# --- torchao --------------------------------------------------------------------------------------------------------


def test_operands_and_scales_are_those_of_torchao() -> None:
    """Rows, weights forwards and weights backwards, as Float8Linear casts them for one expert."""
    config = Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp")
    experts, rows = in_fp8(stacked()), random(L, M, D)
    for expert in range(L):
        w_t = experts.w1[expert].detach().t()
        for cast, hp, axis, found in (
            (config.cast_config_input, rows[expert], -1, tuple(quantize_rows(rows[expert]))),
            (config.cast_config_weight, w_t, 0, tuple(each[expert] for each in experts.fp8_weights["w1"].get()[:2])),
            (config.cast_config_weight_for_grad_input, w_t, -1,
             tuple(each[expert] for each in experts.fp8_weights["w1"].get()[2:])),
        ):  # fmt: skip
            theirs = hp_tensor_to_float8_dynamic(
                hp,
                cast.target_dtype,
                None,
                scaling_granularity=cast.scaling_granularity,
                axiswise_dim=get_maybe_axiswise_dim(axis, cast.scaling_granularity),
                round_scales_to_power_of_2=True,
            )
            values, scale = found
            turned = theirs._data.t() if axis == 0 else theirs._data
            assert torch.equal(values.view(torch.uint8), turned.contiguous().view(torch.uint8))
            assert torch.equal(scale, theirs._scale.reciprocal().flatten().expand(len(scale)))


def float8_linear(weight: Tensor, recipe: Any) -> FP8Linear:
    with torch.device("meta"):
        linear = FP8Linear(weight.shape[1], weight.shape[0], bias=False, config=recipe_config(recipe, emulate=True))
    linear.weight = torch.nn.Parameter(weight.detach().clone())
    return linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_every_expert_computes_what_torchaos_emulation_does(activation: str, dtype: torch.dtype) -> None:
    """Forwards equal but for the order of sums in fp32 (in bf16: which can turn a rounding). Backwards the gradient of
    the activation is rounded once here and in every operation there, so a few values of da fall to the next FP8 number,
    2^-3 away: a share of about 2^-8 / 2^-3 of them in bf16, which moves the whole by at most sqrt(2^-5) * 2^-3 = 2%."""
    experts, rows, grad = (
        in_fp8(stacked(activation, dtype)),
        random(L, M, D, dtype=dtype),
        random(L, M, D, seed=3, dtype=dtype),
    )
    found = passes(experts, rows, grad)
    unit = 2**-8 if dtype == torch.bfloat16 else 1e-6
    for expert in range(L):
        first, second = (float8_linear(weights[expert], "rowwise_with_gw_hp") for weights in (experts.w1, experts.w2))
        x = rows[expert].clone().requires_grad_()
        y = second(activate(first(x), activation))
        y.backward(grad[expert])
        assert (
            relative(found["y"][expert], y) < unit if activation == "relu2" else relative(found["y"][expert], y) < 0.02
        )
        for name, theirs in (("dx", x.grad), ("dw1", first.weight.grad), ("dw2", second.weight.grad)):
            assert relative(found[name][expert], theirs) < 0.02, name


@pytest.mark.parametrize("rows_each", [M, 17, 1])
def test_the_gradient_of_the_rows_is_torchaos_too(rows_each: int) -> None:
    """One product alone, without an activation between: fp32, so that nothing but the order of sums differs."""
    experts = in_fp8(stacked(dtype=torch.float32))
    grad = random(L, rows_each, FFN, seed=4, dtype=torch.float32)
    found = scaled_matmul(*quantize_rows(grad), *experts.fp8_weights["w1"].get()[2:], None, torch.float32)
    for expert in range(L):
        linear, x = (
            float8_linear(experts.w1[expert], "rowwise_with_gw_hp"),
            torch.zeros(rows_each, D, requires_grad=True),
        )
        linear(x).backward(grad[expert])
        torch.testing.assert_close(found[expert], x.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows_each", [M, 17])
def test_the_rowwise_recipe_is_torchaos_in_all_three_products(rows_each: int) -> None:
    """17 rows are padded with zeros to 32."""
    experts = take_over(TorchaoExperts, stacked(dtype=torch.float32))
    rows, grad = (random(L, rows_each, D, seed=seed, dtype=torch.float32) for seed in (5, 6))
    found = passes(experts, rows, grad)
    for expert in range(L):
        first, second = (float8_linear(weights[expert], "rowwise") for weights in (experts.w1, experts.w2))
        x = rows[expert].clone().requires_grad_()
        y = second(activate(first(x), "relu2"))
        y.backward(grad[expert])
        theirs = {"y": y.detach(), "dx": x.grad, "dw1": first.weight.grad, "dw2": second.weight.grad}
        for name, value in theirs.items():
            assert relative(found[name][expert], value) < 1e-5, name


def test_torchaos_operator_is_only_given_multiples_of_16_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient of the weight sums over the rows in FP8, and Hopper's FP8 products sum over multiples of 16."""
    given = []

    class Spy:
        @staticmethod
        def apply(rows: Tensor, weight: Tensor) -> Tensor:
            given.append(rows.shape[1])
            return rows @ weight.mT

    monkeypatch.setattr(fp8, "RowwiseLinear", Spy)
    y = take_over(TorchaoExperts, stacked())(random(L, 17, D))
    assert (given, y.shape, y.is_contiguous()) == ([32, 32], (L, 17, D), True)


# --- error ----------------------------------------------------------------------------------------------------------


def test_gradients_are_off_by_what_the_rounding_of_e4m3_predicts() -> None:
    """Neither more (a wrong scale, a lost sign) nor less (a product that is silently in bf16).

    A cast alone has a relative error (of norms) q, measured here; that it is e4m3's is another test. Errors of two
    operands add up in squares, and a product sums independent ones, so one FP8 product has p = sqrt(2) q. From there,
    for Gaussian rows and relu^2:

        h    2 relu(a) da, where mean(relu(a)^2) = s^2/2 and mean(relu(a)^4) = 3 s^4/2:   sqrt(4/3) p
        y    h in FP8, and w2:   sqrt(4/3 + 1) p          dh   p            dw2   as h:  sqrt(4/3) p
        da   2 relu(a) dh: of dh p, of relu(a) p:   sqrt(2) p       dx   sqrt(2 + 1) p       dw1   sqrt(2) p

    bf16 adds 2^-9 / sqrt 3 here and there, 5% of q. A twentieth is left for the sample.
    """
    experts, rows, grad = in_fp8(stacked()), random(L, 256, D), random(L, 256, D, seed=3)
    found = passes(experts, rows, grad)
    reference = stacked().double()
    expected = passes(LoopOf(reference), rows.double(), grad.double())
    values, scale = quantize_rows(rows)
    p = math.sqrt(2) * relative(values.double() * scale.double().unsqueeze(-1), rows)
    predicted = {"y": math.sqrt(7 / 3), "dx": math.sqrt(3), "dw1": math.sqrt(2), "dw2": math.sqrt(4 / 3)}
    for name, factor in predicted.items():
        assert relative(found[name], expected[name]) == pytest.approx(factor * p, rel=0.1), name


class LoopOf(torch.nn.Module):
    """The experts one by one, in the type of their weights."""

    def __init__(self, experts: StackedExperts) -> None:
        super().__init__()
        self.w1, self.w2, self.activation = experts.w1, experts.w2, experts.activation

    def forward(self, rows: Tensor, ends: None) -> Tensor:
        return torch.stack(
            [activate(x @ a.t(), self.activation) @ b.t() for x, a, b in zip(rows, self.w1, self.w2, strict=True)]
        )


# --- edge cases -----------------------------------------------------------------------------------------------------

SIZES = (0, 1, 15, 16, 17)


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_groups_of_any_size_compute_what_each_would_alone(activation: str) -> None:
    experts = StackedExperts(len(SIZES), D, FFN, activation, "ep_size_1")
    with torch.no_grad():
        for number, parameter in enumerate(experts.parameters()):
            parameter.copy_(random(*parameter.shape, seed=number) / 8)
    converted = in_fp8(experts)
    ends = torch.tensor(SIZES).cumsum(0).to(torch.int32)
    rows, grad = (random(int(ends[-1]), D, seed=seed, dtype=torch.float32) for seed in (7, 8))
    found = passes(converted, rows, grad, ends)
    assert not found["dw1"][0].any()
    assert not found["dw2"][0].any()
    for group, (start, end) in enumerate(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)):
        alone = StackedExperts(1, D, FFN, activation, "ep_size_1")
        for own, weights in zip(alone.parameters(), experts.parameters(), strict=True):
            own.data.copy_(weights[group : group + 1])
        one = passes(in_fp8(alone), rows[None, start:end], grad[None, start:end])
        torch.testing.assert_close(found["y"][start:end], one["y"][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["dx"][start:end], one["dx"][0], rtol=1e-5, atol=1e-5)
        for name in ("dw1", "dw2"):
            torch.testing.assert_close(found[name][group], one[name][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [FP8Experts, TorchaoExperts])
def test_an_expert_without_tokens_gives_zeros_and_gets_no_gradient(kind: type) -> None:
    experts = in_fp8(stacked()) if kind is FP8Experts else take_over(kind, stacked())
    rows, grad = random(L, M, D), random(L, M, D, seed=3)
    rows[1], grad[1] = 0, 0
    found = passes(experts, rows, grad)
    assert all(not value[1].any() for value in found.values())
    assert all(value[0].any() for value in found.values())


@pytest.mark.parametrize("dropless", [False, True])
def test_no_rows_at_all_give_no_rows_and_gradients_of_zeros(dropless: bool) -> None:
    rows, ends = (torch.zeros(0, D), torch.zeros(L, dtype=torch.int32)) if dropless else (torch.zeros(L, 0, D), None)
    found = passes(in_fp8(stacked(dtype=torch.float32)), rows, rows, ends)
    assert found["y"].shape == rows.shape
    assert not found["dw1"].any()
    assert not found["dw2"].any()


def test_large_values_stay_finite_and_as_exact_as_small_ones() -> None:
    experts = in_fp8(stacked())
    small = passes(experts, random(L, M, D), random(L, M, D, seed=3))
    large = passes(experts, random(L, M, D) * 2**17, random(L, M, D, seed=3))  # 1e5, and a power of two
    assert torch.equal(large["y"], small["y"] * 2**34)


def test_a_nan_shows_in_its_own_row_and_in_its_experts_gradients() -> None:
    rows, grad = random(L, M, D), random(L, M, D, seed=3)
    rows[1, 5, 2] = torch.nan
    found = passes(in_fp8(stacked()), rows, grad)
    poisoned = torch.zeros(L, M, dtype=torch.bool)
    poisoned[1, 5] = True
    assert torch.equal(found["y"].isnan().any(-1), poisoned)
    assert found["dw1"][1].isnan().any()
    assert found["dw1"][0].isfinite().all()


# --- copies of weights ----------------------------------------------------------------------------------------------


def test_copies_that_are_older_than_their_weights_are_caught_and_named() -> None:
    """Written as DeepSpeed writes: through .data, where torch's version counter does not move."""
    experts = in_fp8(stacked())
    refuse_stale(experts)
    version = experts.w2._version
    experts.w2.data.copy_(experts.w2 * 1.5)
    assert experts.w2._version == version
    with pytest.raises(RuntimeError, match=r"FP8 copies of \.w2 are not those of the weights"):
        refuse_stale(experts)
    refresh_fp8(experts)
    refuse_stale(experts)


def test_what_is_stale_is_used_so_that_forgetting_to_refresh_is_a_fault() -> None:
    experts, rows = in_fp8(stacked()), random(L, M, D)
    before = experts(rows)
    experts.w1.data.mul_(2)
    assert torch.equal(experts(rows), before)
    refresh_fp8(experts)
    assert torch.equal(experts(rows), before * 4)


def test_refreshing_writes_into_the_same_memory() -> None:
    experts = in_fp8(stacked())
    places = [copy.data_ptr() for weights in experts.fp8_weights.values() for copy in weights.get()]
    experts.w1.data.mul_(3)
    refresh_fp8(experts)
    assert places == [copy.data_ptr() for weights in experts.fp8_weights.values() for copy in weights.get()]


def test_a_forward_pass_before_the_first_refresh_says_what_to_call() -> None:
    with pytest.raises(RuntimeError, match=r"before refresh_fp8\(model\)"):
        FP8Experts.of(stacked(), "torch", compiled=False)(random(L, M, D))


@pytest.mark.parametrize(
    ("shape", "way_out"),
    [
        ((L, D, FFN), r"weights \[3, 64, 96\] of experts .* Use run.compile.mode='none', or run.fp8.casts='triton'"),
        ((D, FFN), r"weights \[64, 96\] of the head .* Use run.compile.mode='none', or run.fp8.lm_head=false"),
    ],
)
def test_casts_that_compile_to_something_else_are_caught_when_they_are_first_used(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], way_out: str
) -> None:
    """With a weight of zeros too, as w2 has at the start: a byte of them that is lost is the byte that was there."""

    def miscompiled(quantize: Any, dynamic: bool) -> Any:
        def wrong(weight: Tensor) -> Any:
            forward, backward = quantize(weight)
            backward.values.view(torch.uint8)[0, 3, 5] = 0
            return forward, backward

        return wrong

    zeros = torch.zeros(shape, dtype=torch.bfloat16)
    FP8Weights(quantize_weights, compiled=True).refresh(zeros)
    monkeypatch.setattr(torch, "compile", miscompiled)
    with pytest.raises(RuntimeError, match=way_out):
        FP8Weights(quantize_weights, compiled=True).refresh(zeros)


def test_loading_a_state_dict_refreshes_and_its_names_are_those_of_bf16_experts() -> None:
    plain, converted = stacked(), in_fp8(stacked())
    assert list(plain.state_dict()) == list(converted.state_dict())
    with torch.no_grad():
        plain.w1.mul_(0.3)
    converted.load_state_dict(plain.state_dict())
    refuse_stale(converted)
    assert torch.equal(converted(random(L, M, D)), in_fp8(plain)(random(L, M, D)))


# --- beside bf16 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropless", [False, True])
def test_evaluation_is_in_bf16_bit_for_bit(dropless: bool) -> None:
    rows = random(M, D) if dropless else random(L, M, D)
    ends = torch.tensor([4, 4, M], dtype=torch.int32) if dropless else None
    plain, converted = stacked(), in_fp8(stacked()).eval()
    with torch.no_grad():
        assert torch.equal(converted(rows, ends), plain(rows, ends))


def test_marks_for_deepspeed_and_muon_are_taken_over() -> None:
    experts = stacked()
    converted = in_fp8(experts)
    assert converted.w1 is experts.w1
    assert vars(converted.w1) == {"allreduce": False, "group_name": "ep_size_1", "is_expert_group": True}
    assert list(dict(converted.named_parameters())) == ["w1", "w2"]
    assert not list(converted.buffers()), "a buffer would be cast to bf16 with the model, and saved"
