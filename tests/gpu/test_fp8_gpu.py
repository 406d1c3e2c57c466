"""What only a GPU can prove of FP8: its products equal those of the CPU, which computes from the same quantised values.

Written without a GPU at hand; `python -m tools.gpu_check` runs these and says what they showed.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.config import FP8Config, MoEConfig
from model.experts import StackedExperts
from model.fp8 import TorchaoExperts, apply_fp8
from model.fp8_casts import quantize_rows
from model.fp8_experts import FP8Experts, take_over
from model.fp8_matmul import CAPABILITY, scaled_matmul
from model.fp8_weights import refresh_fp8
from model.loss import Head
from model.moe import MoELayer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != CAPABILITY,
        reason="needs a GPU with FP8 products for every row (H100, H200)",
    ),
]
L, M, D, F = 4, 160, 256, 512


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())


def check_product(a: Tensor, b: Tensor, ends: Tensor | None) -> None:
    """Against fp64. Hopper adds products with about 14 bits, 32 at a time, and the result is rounded to bf16."""
    a8, b8 = quantize_rows(a), quantize_rows(b)
    on_gpu = [tensor.cuda() for tensor in (*a8, *b8)]
    found = scaled_matmul(*on_gpu, None if ends is None else ends.cuda(), torch.bfloat16).cpu().double()
    exact_a = a8.values.double() * a8.scale.double().unsqueeze(-1)
    exact_b = b8.values.double() * b8.scale.double().unsqueeze(-1)
    if ends is None:
        pairs = [(exact_a, exact_b, found)]
    else:
        starts = [0, *ends[:-1].tolist()]
        pairs = [(exact_a[i:j], exact_b[n], found[i:j]) for n, (i, j) in enumerate(zip(starts, ends, strict=True))]
    for left, right, ours in pairs:
        exact, size = left @ right.mT, left.abs() @ right.abs().mT
        bound = 2**-8 * exact.abs() + math.ceil(a.shape[-1] / 32) * 2**-13 * size
        assert ((ours - exact).abs() <= bound).all()


@pytest.mark.parametrize("rows", [M, 17, 1])
def test_stacks_are_multiplied(rows: int) -> None:
    check_product(random(L, rows, D), random(L, F, D, seed=1), None)


@pytest.mark.parametrize("sizes", [(0, 1, 15, 16, 17, 300), (64, 0, 0, 64), (0, 0, 0, 5), (0, 0)])
def test_groups_of_any_size_are_multiplied(sizes: tuple[int, ...]) -> None:
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    check_product(random(int(ends[-1]), D), random(len(sizes), F, D, seed=1), ends)


@pytest.mark.parametrize("rows", [1024, 100])
def test_two_matrices_are_multiplied(rows: int) -> None:
    check_product(random(rows, D), random(F, D, seed=1), None)


def stacked(activation: str) -> StackedExperts:
    experts = StackedExperts(L, D, F, activation, "ep_size_1").bfloat16()
    with torch.no_grad():
        for number, parameter in enumerate(experts.parameters()):
            parameter.copy_(random(*parameter.shape, seed=number) / math.sqrt(parameter.shape[-1]))
    return experts


@pytest.mark.parametrize("casts", ["torch", "triton", "torchao"])
@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
@pytest.mark.parametrize("dropless", [False, True])
def test_experts_on_the_gpu_equal_those_on_the_cpu(casts: str, activation: str, dropless: bool) -> None:
    """A sum in another order takes a few values to the next FP8 number, 2^-3 away: far below FP8's own error of 5%."""
    if casts == "torchao" and dropless:
        pytest.skip("torchao's operator takes groups of multiples of 16 rows; such a run is refused")

    def converted(device: str) -> StackedExperts:
        experts = stacked(activation).to(device)
        if casts == "torchao":
            return take_over(TorchaoExperts, experts)
        # The casts in Triton are for GPUs only; on the CPU it is torch that gives the same bits.
        fp8 = FP8Experts.of(experts, casts if device == "cuda" else "torch", compiled=False)  # type: ignore[arg-type]
        refresh_fp8(fp8)
        return fp8

    results = {}
    for device in ("cpu", "cuda"):
        experts = converted(device)
        rows = random(*((L * M, D) if dropless else (L, M, D)), seed=5).to(device).requires_grad_()
        ends = torch.tensor([0, 17, 400, L * M], dtype=torch.int32, device=device) if dropless else None
        y = experts(rows, ends)
        y.backward(random(*rows.shape, seed=6).to(device))
        results[device] = {"y": y, "dx": rows.grad, "dw1": experts.w1.grad, "dw2": experts.w2.grad}
    for name, expected in results["cpu"].items():
        assert relative(results["cuda"][name], expected) < 0.02, name  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", ["rowwise_with_gw_hp", "rowwise", "tensorwise"])
def test_a_list_of_float8_linears_runs_and_is_close_to_bf16(recipe: str) -> None:
    config = MoEConfig(num_experts=L, ffn_hidden_size=F, capacity_factor=1.0, expert_backend="loop")
    layer = MoELayer(D, config, "relu2").bfloat16().cuda()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.05)
    x = random(1, 200, D).cuda()
    expected = layer(x)[0]
    apply_fp8(layer, FP8Config(enabled=True, recipe=recipe), emulate=False, compiled=False)  # type: ignore[arg-type]
    y = layer(x)[0]
    y.sum().backward()
    assert 1e-3 < relative(y, expected) < 0.15
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.deepspeed_moe.experts.parameters())


def test_the_head_on_the_gpu_equals_that_on_the_cpu() -> None:
    x, targets = random(1, 1500, D), torch.randint(0, 4096, (1, 1500))
    results = {}
    for device in ("cpu", "cuda"):
        model = torch.nn.ModuleDict({"lm_head": Head(D, 4096, 15.0, "chunked")}).bfloat16()
        model["lm_head"].weight.data.copy_(random(4096, D, seed=3) / 16)
        model = model.to(device)
        apply_fp8(model, FP8Config(enabled=True, experts=False, lm_head=True), emulate=False, compiled=False)
        refresh_fp8(model)
        rows = x.to(device).requires_grad_()
        loss = model["lm_head"](rows, targets.to(device))
        loss.backward()
        results[device] = (loss, rows.grad, model["lm_head"].weight.grad)
    assert results["cuda"][0].item() == pytest.approx(results["cpu"][0].item(), rel=1e-3)
    for ours, expected in zip(results["cuda"][1:], results["cpu"][1:], strict=True):
        assert relative(ours, expected) < 0.02  # type: ignore[arg-type]
