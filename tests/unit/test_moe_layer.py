"""The MoE layer equals the loop in tests/reference.py: values, every gradient, and exactly the predicted drops."""

from __future__ import annotations

import pytest
import torch

import reference
from model.config import MoEConfig
from model.moe import MoELayer, route_in_slot
from model.router import choose_top_k

T, D, F, E = 24, 8, 16, 4


def build(activation: str = "relu2", **moe: object) -> tuple[MoELayer, MoEConfig]:
    """A float64 layer with random weights everywhere, the gate included."""
    config = MoEConfig(num_experts=E, ffn_hidden_size=F, **moe)
    layer = MoELayer(D, config, activation).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return layer, config


def stacked(layer: MoELayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copies of the layer's gate and expert weights that collect gradients of their own."""
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    weights = (
        layer.deepspeed_moe.gate.wg.weight,
        torch.stack([expert.w1.weight for expert in experts]),
        torch.stack([expert.w2.weight for expert in experts]),
    )
    return tuple(weight.detach().clone().requires_grad_() for weight in weights)


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
@pytest.mark.parametrize("capacity_factor", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_layer_equals_the_reference_in_values_and_gradients(
    top_k: int, capacity_factor: float, activation: str
) -> None:
    layer, config = build(activation, top_k=top_k, capacity_factor=capacity_factor, min_capacity=1)
    x_BSD = torch.randn(
        2, T // 2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True
    )
    y_BSD, stats = layer(x_BSD)
    x_TD = x_BSD.detach().reshape(T, D).clone().requires_grad_()
    wg, w1, w2 = stacked(layer)
    expected_TD, aux_loss, kept = reference.moe_layer(x_TD, wg, w1, w2, config, activation)

    torch.testing.assert_close(y_BSD.reshape(T, D), expected_TD)
    torch.testing.assert_close(stats.aux_loss, aux_loss)
    assert int(stats.dropped) == T * top_k - len(kept)
    assert int(stats.tokens_per_expert_E.sum()) == T * top_k

    grad = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ((y_BSD.reshape(T, D) * grad).sum() + stats.aux_loss).backward()
    ((expected_TD * grad).sum() + aux_loss).backward()
    got = stacked_gradients(layer)
    for name, ours, theirs in zip(("wg", "w1", "w2"), got, (wg.grad, w1.grad, w2.grad), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(x_BSD.grad.reshape(T, D), x_TD.grad)


def stacked_gradients(layer: MoELayer) -> list[torch.Tensor]:
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    return [
        layer.deepspeed_moe.gate.wg.weight.grad,
        torch.stack([expert.w1.weight.grad for expert in experts]),
        torch.stack([expert.w2.weight.grad for expert in experts]),
    ]


def test_exactly_the_predicted_routes_are_dropped() -> None:
    layer, config = build(top_k=2, capacity_factor=0.5, min_capacity=1)
    x_TD = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    routing = layer.deepspeed_moe.gate(x_TD)
    *_, kept = reference.moe_layer(x_TD, *stacked(layer), config)
    table = route_in_slot(routing, E * routing.capacity).view(E, routing.capacity)
    ours = {(int(route) // 2, expert) for expert in range(E) for route in table[expert] if route < T * 2}
    assert ours == set(kept)


@torch.no_grad()
def prefer_expert_two(layer: MoELayer) -> None:
    """With top_k 1, tokens of ones then all go to expert 2."""
    layer.deepspeed_moe.gate.wg.weight.zero_()
    layer.deepspeed_moe.gate.wg.weight[2] = 1.0


def test_dropless_keeps_every_route_even_when_all_choose_one_expert() -> None:
    layer, _ = build(top_k=1, capacity_factor=0.0)
    prefer_expert_two(layer)
    _, stats = layer(torch.ones(1, T, D, dtype=torch.float64))
    assert stats.tokens_per_expert_E.tolist() == [0, 0, T, 0]
    assert int(stats.dropped) == 0


def test_experts_without_tokens_give_zero_gradients_and_no_nan() -> None:
    layer, _ = build(top_k=1, capacity_factor=1.0)
    prefer_expert_two(layer)
    y, _ = layer(torch.ones(1, T, D, dtype=torch.float64))
    y.sum().backward()
    _, w1_grad, _ = stacked_gradients(layer)
    assert w1_grad[[0, 1, 3]].abs().max() == 0
    assert w1_grad.isfinite().all()


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 1), (8, 2), (6, 3), (64, 6)])
def test_equal_scores_load_all_experts_evenly(num_experts: int, top_k: int) -> None:
    chosen_TK = choose_top_k(torch.full((192, num_experts), 0.5), top_k)
    assert torch.bincount(chosen_TK.flatten(), minlength=num_experts).unique().tolist() == [192 * top_k // num_experts]
    assert all(len(set(row)) == top_k for row in chosen_TK.tolist())


def test_different_scores_are_chosen_as_topk_does() -> None:
    scores_TE = torch.rand(100, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(choose_top_k(scores_TE, 3), scores_TE.topk(3).indices)


def test_a_zero_gate_reads_an_aux_loss_of_one() -> None:
    layer, _ = build(top_k=2, capacity_factor=1.0)
    torch.nn.init.zeros_(layer.deepspeed_moe.gate.wg.weight)
    _, stats = layer(torch.randn(1, T, D, dtype=torch.float64))
    assert stats.aux_loss.item() == pytest.approx(1.0, abs=1e-6)
    assert int(stats.dropped) == 0


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_loss_reaches_the_router(top_k: int) -> None:
    layer, _ = build(top_k=top_k)
    y, _ = layer(torch.randn(1, T, D, dtype=torch.float64))
    y.square().sum().backward()
    assert layer.deepspeed_moe.gate.wg.weight.grad.abs().max() > 1e-3


def test_evaluation_uses_its_own_capacity() -> None:
    layer, _ = build(top_k=2, capacity_factor=0.25, eval_capacity_factor=0.0, min_capacity=1)
    x = torch.randn(1, T, D, dtype=torch.float64)
    assert int(layer(x)[1].dropped) > 0
    assert int(layer.eval()(x)[1].dropped) == 0
