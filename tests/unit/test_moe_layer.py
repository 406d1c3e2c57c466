"""The MoE layer equals the loop in tests/reference.py: values, every gradient, and exactly the predicted drops."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from deepspeed.moe.utils import is_moe_param

import reference
from model.attention import rotary_tables
from model.config import ModelConfig, MoEConfig
from model.dispatch import dispatch, make_plan
from model.experts import StackedExperts, grouped_linear
from model.gpt import GPT
from model.moe import MoELayer
from model.router import choose_top_k

T, D, F, E = 24, 8, 16, 8


def build(activation: str = "relu2", dtype: torch.dtype = torch.float64, **moe: object) -> tuple[MoELayer, MoEConfig]:
    """A layer with random weights everywhere, the gate included."""
    config = MoEConfig(num_experts=E, ffn_hidden_size=F, **moe)
    layer = MoELayer(D, config, activation).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in ("gate.wg.weight", *experts_in_state(layer)):
            weight = dict(layer.deepspeed_moe.state_dict(keep_vars=True))[name]
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.5)
    return layer, config


def experts_in_state(layer: MoELayer) -> list[str]:
    return sorted(name for name in layer.deepspeed_moe.state_dict() if "deepspeed_experts" in name)


def weights_of(layer: MoELayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """wg [E, D], w1 [E, F, D] and w2 [E, D, F], however the experts are stored."""
    state = layer.deepspeed_moe.state_dict()
    names = experts_in_state(layer)
    w1, w2 = (torch.stack([state[name] for name in names if f".{kind}." in name]) for kind in ("w1", "w2"))
    return state["gate.wg.weight"], w1, w2


def copies_with_gradient(layer: MoELayer) -> tuple[torch.Tensor, ...]:
    return tuple(weight.detach().clone().requires_grad_() for weight in weights_of(layer))


def gradients_of(layer: MoELayer) -> list[torch.Tensor]:
    """Gradients of what weights_of returns."""
    gate, experts = layer.deepspeed_moe.gate, layer.deepspeed_moe.experts
    if isinstance(experts, StackedExperts):
        return [gate.wg.weight.grad, experts.w1.grad, experts.w2.grad]
    both = (torch.stack([getattr(e, kind).weight.grad for e in experts.deepspeed_experts]) for kind in ("w1", "w2"))
    return [gate.wg.weight.grad, *both]


def assert_equals_the_reference(
    layer: MoELayer, config: MoEConfig, dtype: torch.dtype, activation: str = "relu2"
) -> None:
    """Outputs, losses, statistics, kept routes, and the gradients of everything, all losses weighing in."""
    x_BSD = torch.randn(1, T, D, dtype=dtype, generator=torch.Generator().manual_seed(2), requires_grad=True)
    y_BSD, stats = layer(x_BSD)
    x_TD = x_BSD.detach().reshape(T, D).clone().requires_grad_()
    wg, w1, w2 = copies_with_gradient(layer)
    expected = reference.moe_layer(x_TD, wg, w1, w2, config, activation, layer.deepspeed_moe.gate.selection_bias)

    torch.testing.assert_close(y_BSD.reshape(T, D), expected.y_TD)
    for name in ("aux_loss", "z_loss", "entropy"):
        torch.testing.assert_close(
            getattr(stats, name), getattr(expected, name), msg=lambda text, name=name: name + text
        )
    assert kept_routes(layer, x_TD.detach()) == set(expected.kept)
    assert int(stats.dropped) == T * config.top_k - len(expected.kept)
    assert int(stats.tokens_per_expert_E.sum()) == T * config.top_k

    grad = torch.randn(T, D, dtype=dtype, generator=torch.Generator().manual_seed(3))
    ((y_BSD.reshape(T, D) * grad).sum() + stats.aux_loss + stats.z_loss).backward()
    ((expected.y_TD * grad).sum() + expected.aux_loss + expected.z_loss).backward()
    for name, ours, theirs in zip(("wg", "w1", "w2"), gradients_of(layer), (wg.grad, w1.grad, w2.grad), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(x_BSD.grad.reshape(T, D), x_TD.grad)


def kept_routes(layer: MoELayer, x_TD: torch.Tensor) -> set[tuple[int, int]]:
    """Routes (token, expert) that have a row."""
    plan, K = layer.deepspeed_moe.gate(x_TD).plan, layer.deepspeed_moe.gate.top_k
    rows = plan.route_of_row_N.tolist()
    if plan.capacity is None:
        ends = plan.ends_E.tolist()
        experts = [sum(row >= end for end in ends) for row in range(len(rows))]
    else:
        experts = [row // plan.capacity for row in range(len(rows))]
    return {(route // K, expert) for route, expert in zip(rows, experts, strict=True) if route < T * K}


# Capacity, backend, drop policy; torch's grouped GEMM has no fp64, the loop beside it proves the rest in it.
WAYS = [
    (0.0, "loop", "position", torch.float64),
    (0.0, "grouped", "position", torch.float32),
    (0.5, "bmm", "position", torch.float64),
    (0.5, "bmm", "probability", torch.float64),
    (0.5, "bmm", "probability", torch.float32),
    (1.0, "bmm", "position", torch.float32),
    (1.0, "loop", "probability", torch.float64),
    (4.0, "bmm", "position", torch.float64),
]


@pytest.mark.parametrize(("capacity_factor", "backend", "drop_policy", "dtype"), WAYS)
@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2, 4, 6])
def test_layer_equals_the_reference_in_values_and_gradients(
    top_k: int, score_func: str, capacity_factor: float, backend: str, drop_policy: str, dtype: torch.dtype
) -> None:
    dropping = {"drop_policy": drop_policy, "min_capacity": 1}
    how = {"top_k": top_k, "score_func": score_func, "capacity_factor": capacity_factor, "expert_backend": backend}
    layer, config = build("relu2", dtype, **how, **(dropping if capacity_factor else {}), z_loss_coeff=1.0)
    assert_equals_the_reference(layer, config, dtype)


@pytest.mark.parametrize(("capacity_factor", "backend"), [(0.0, "grouped"), (0.5, "bmm"), (1.0, "loop")])
def test_gated_experts_equal_the_reference(capacity_factor: float, backend: str) -> None:
    layer, config = build(
        "swiglu", torch.float32, capacity_factor=capacity_factor, expert_backend=backend, z_loss_coeff=1.0
    )
    assert_equals_the_reference(layer, config, torch.float32, "swiglu")


RULES = {
    "raw gates": {"top_k": 4, "norm_topk_prob": False},
    "raw sigmoid gates": {"top_k": 4, "score_func": "sigmoid", "norm_topk_prob": False},
    "scaled gates": {"top_k": 2, "routed_scaling_factor": 2.5},
    "scaled raw gate": {"top_k": 1, "routed_scaling_factor": 2.5, "score_func": "sigmoid"},
    "bias": {"top_k": 2, "balance": "bias", "aux_loss_coeff": 0.1},
    "bias on sigmoids": {"top_k": 2, "balance": "bias", "aux_loss_coeff": 0.1, "score_func": "sigmoid"},
    "one group of four": {"top_k": 2, "num_groups": 4, "top_k_groups": 1},
    "two groups of four": {"top_k": 4, "num_groups": 4, "top_k_groups": 2},
    "two groups of two": {"top_k": 6, "num_groups": 2, "top_k_groups": 2},
    "one group of two": {"top_k": 3, "num_groups": 2, "top_k_groups": 1, "score_func": "sigmoid"},
    "groups by biased scores": {
        "top_k": 4,
        "num_groups": 4,
        "top_k_groups": 2,
        "balance": "bias",
        "aux_loss_coeff": 0.1,
        "score_func": "sigmoid",
        "routed_scaling_factor": 2.5,
    },
    "load forced": {"top_k": 2, "force_balanced": True},
}


@pytest.mark.parametrize("dropping", [{"capacity_factor": 0.0}, {"capacity_factor": 0.5, "drop_policy": "probability"}])
@pytest.mark.parametrize("rule", RULES)
def test_every_routing_rule_equals_the_reference(rule: str, dropping: dict[str, object]) -> None:
    loop = {"expert_backend": "loop", "z_loss_coeff": 1.0}
    layer, config = build("relu2", torch.float64, **RULES[rule], **dropping, **loop)
    bias_E = layer.deepspeed_moe.gate.selection_bias
    if bias_E is not None:
        bias_E.copy_(torch.randn(E, generator=torch.Generator().manual_seed(4)) * 0.1)
    assert_equals_the_reference(layer, config, torch.float64)


@pytest.mark.parametrize("rule", RULES)
def test_every_routing_rule_spreads_equal_scores_evenly(rule: str) -> None:
    """A zero gate, as at step 0: whatever the rule, every expert gets the same number of tokens."""
    layer, config = build("relu2", torch.float64, **RULES[rule], capacity_factor=1.0)
    torch.nn.init.zeros_(layer.deepspeed_moe.gate.wg.weight)
    _, stats = layer(torch.randn(1, T, D, dtype=torch.float64))
    assert stats.tokens_per_expert_E.tolist() == [T * config.top_k / E] * E
    assert stats.aux_loss.item() == pytest.approx(1.0, abs=1e-12)
    assert stats.entropy.item() == pytest.approx(math.log(E))
    assert int(stats.dropped) == 0


def test_a_bias_changes_who_is_chosen_and_no_gate() -> None:
    layer, _ = build(top_k=2, capacity_factor=0.0, expert_backend="loop", balance="bias", norm_topk_prob=False)
    gate = layer.deepspeed_moe.gate
    x_TD = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    gate.selection_bias[3] = 10.0
    routing = gate(x_TD)
    assert routing.stats.tokens_per_expert_E[3] == T
    scores_TE = torch.softmax(x_TD @ gate.wg.weight.t(), dim=-1)
    chosen = {(token, expert) for token, expert in kept_routes(layer, x_TD) if expert == 3}
    assert len(chosen) == T
    torch.testing.assert_close(routing.gates_TK[:, 0], scores_TE[:, 3])  # first of all, and weighed as without the bias


def test_forced_balance_ignores_scores_and_keeps_their_gates() -> None:
    layer, _ = build(top_k=1, capacity_factor=1.0, force_balanced=True)
    prefer_expert_two(layer)
    x_TD = torch.ones(T, D, dtype=torch.float64)
    routing = layer.deepspeed_moe.gate(x_TD)
    assert routing.stats.tokens_per_expert_E.tolist() == [T // E] * E
    scores_E = torch.softmax(x_TD[0] @ layer.deepspeed_moe.gate.wg.weight.t(), dim=-1)
    torch.testing.assert_close(routing.gates_TK.flatten(), scores_E[torch.arange(T) % E])


def test_forced_balance_ignores_a_selection_bias() -> None:
    layer, _ = build(top_k=2, capacity_factor=1.0, force_balanced=True, balance="bias")
    layer.deepspeed_moe.gate.selection_bias[3] = 10.0
    _, stats = layer(torch.randn(1, T, D, dtype=torch.float64))
    assert stats.tokens_per_expert_E.tolist() == [T * 2 // E] * E


def test_very_negative_logits_of_sigmoids_give_no_nan() -> None:
    layer, _ = build(dtype=torch.float32, top_k=2, capacity_factor=0.0, score_func="sigmoid", z_loss_coeff=1.0)
    torch.nn.init.constant_(layer.deepspeed_moe.gate.wg.weight, -100.0)
    y, stats = layer(torch.ones(1, T, D))
    (y.sum() + stats.aux_loss + stats.z_loss).backward()
    assert y.isfinite().all()
    assert y.abs().max() > 0
    assert layer.deepspeed_moe.gate.wg.weight.grad.isfinite().all()


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("rule", [{"balance": "bias"}, {"force_balanced": True}], ids=["bias", "load forced"])
def test_gates_are_finite_where_the_scores_of_all_chosen_experts_underflow(
    rule: dict[str, object], score_func: str
) -> None:
    """Expert 0 would get it all; chosen are others, whose scores are 0 in fp32 and have a sum of 0."""
    layer, _ = build(dtype=torch.float32, top_k=2, capacity_factor=0.0, score_func=score_func, **rule)
    gate = layer.deepspeed_moe.gate
    with torch.no_grad():
        gate.wg.weight.fill_(-100.0)[0] = 100.0
        if gate.selection_bias is not None:
            gate.selection_bias[2:4] = 3.0
    routing = gate(torch.ones(T, D))
    assert routing.stats.tokens_per_expert_E[2:4].tolist() == [T if "balance" in rule else T * 2 // E] * 2
    assert routing.gates_TK.isfinite().all()
    routing.gates_TK[:, 0].sum().backward()
    assert gate.wg.weight.grad.isfinite().all()


@pytest.mark.parametrize("common", [0.0, 1e4, -1e8, 1e38])
def test_the_entropy_of_a_router_is_that_of_its_probabilities_however_large_its_logits(common: float) -> None:
    layer, _ = build(dtype=torch.float32, top_k=2, capacity_factor=0.0)
    gate = layer.deepspeed_moe.gate
    with torch.no_grad():
        gate.wg.weight.zero_()
        gate.wg.weight[:4, 0] = common
        gate.wg.weight[4:, 0] = common if common <= 0 else 0.0
    entropy = gate(torch.ones(T, D)).stats.entropy.item()
    assert entropy == pytest.approx(math.log(E if common <= 0 else 4), rel=1e-6)


@torch.no_grad()
def prefer_expert_two(layer: MoELayer) -> None:
    """With top_k 1, tokens of ones then all go to expert 2."""
    layer.deepspeed_moe.gate.wg.weight.zero_()
    layer.deepspeed_moe.gate.wg.weight[2] = 1.0


def test_dropless_keeps_every_route_even_when_all_choose_one_expert() -> None:
    layer, _ = build(dtype=torch.float32, top_k=1, capacity_factor=0.0)
    prefer_expert_two(layer)
    _, stats = layer(torch.ones(1, T, D))
    assert stats.tokens_per_expert_E.tolist() == [0, 0, T, *[0] * (E - 3)]
    assert int(stats.dropped) == 0


@pytest.mark.parametrize(("capacity_factor", "backend"), [(1.0, "bmm"), (1.0, "loop"), (0.0, "grouped"), (0.0, "loop")])
def test_experts_without_tokens_give_zero_gradients_and_no_nan(capacity_factor: float, backend: str) -> None:
    layer, _ = build(dtype=torch.float32, top_k=1, capacity_factor=capacity_factor, expert_backend=backend)
    prefer_expert_two(layer)
    y, _ = layer(torch.ones(1, T, D))
    y.sum().backward()
    for grad in gradients_of(layer)[1:]:
        assert grad[[0, 1, *range(3, E)]].abs().max() == 0
        assert grad[2].abs().max() > 0
        assert grad.isfinite().all()


def test_rows_without_a_token_are_zeros_for_the_experts_and_in_their_output() -> None:
    layer, _ = build(top_k=1, capacity_factor=1.0)
    prefer_expert_two(layer)
    x_TD = torch.ones(T, D, dtype=torch.float64)
    plan = layer.deepspeed_moe.gate(x_TD).plan
    rows_ECD = dispatch(x_TD, plan).view(E, -1, D)
    for each in (rows_ECD, layer.deepspeed_moe.experts(rows_ECD)):
        assert each[[0, 1, *range(3, E)]].abs().max() == 0
        assert each[2].abs().min() > 0


@pytest.mark.parametrize("capacity", [None, 1, 5, 24])
def test_the_two_tables_of_a_plan_invert_each_other_and_lose_no_route(capacity: int | None) -> None:
    K = 3
    expert_TK = torch.rand(T, E, generator=torch.Generator().manual_seed(6)).topk(K).indices
    plan = make_plan(expert_TK, E, capacity)
    rows, routes = plan.route_of_row_N, plan.row_of_route_TK.flatten()
    kept = routes < len(rows)
    assert torch.equal(rows[routes[kept]], torch.arange(T * K)[kept])
    assert int((rows < T * K).sum()) == int(kept.sum()), "a row that holds a route that went elsewhere"
    counts = torch.bincount(expert_TK.flatten(), minlength=E)
    assert torch.equal(plan.tokens_per_expert_E, counts)
    if capacity is None:
        assert kept.all()
        assert torch.equal(expert_TK.flatten()[rows], torch.arange(E).repeat_interleave(counts))
    else:
        assert int(kept.sum()) == int(counts.clamp(max=capacity).sum())
        assert torch.equal(expert_TK.flatten()[kept], routes[kept] // capacity)


def test_among_equal_gates_the_first_tokens_keep_their_rows() -> None:
    expert_TK = torch.rand(T, E, generator=torch.Generator().manual_seed(6)).topk(3).indices
    for by_gates, by_position in zip(
        make_plan(expert_TK, E, 5, torch.ones(T, 3)), make_plan(expert_TK, E, 5), strict=True
    ):
        assert torch.equal(torch.as_tensor(by_gates), torch.as_tensor(by_position))


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
def test_a_router_in_bf16_computes_in_fp32(score_func: str) -> None:
    layer, _ = build(dtype=torch.bfloat16, top_k=2, capacity_factor=0.0, score_func=score_func, z_loss_coeff=1.0)
    gate, x_TD = layer.deepspeed_moe.gate, torch.randn(T, D, generator=torch.Generator().manual_seed(5)).bfloat16()
    routing = gate(x_TD)
    precise = gate.float()(x_TD.float())
    assert routing.gates_TK.dtype == routing.stats.z_loss.dtype == torch.float32
    assert torch.equal(routing.gates_TK, precise.gates_TK)
    assert torch.equal(routing.plan.route_of_row_N, precise.plan.route_of_row_N)
    assert torch.equal(routing.stats.z_loss, precise.stats.z_loss)


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 1), (8, 2), (6, 3), (64, 6)])
def test_equal_scores_load_all_experts_evenly(num_experts: int, top_k: int) -> None:
    chosen_TK = choose_top_k(torch.full((192, num_experts), 0.5), top_k)
    assert torch.bincount(chosen_TK.flatten(), minlength=num_experts).unique().tolist() == [192 * top_k // num_experts]
    assert all(len(set(row)) == top_k for row in chosen_TK.tolist())


def test_different_scores_are_chosen_as_topk_does() -> None:
    scores_TE = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(choose_top_k(scores_TE, 3), scores_TE.topk(3).indices)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_loss_reaches_the_router(top_k: int) -> None:
    layer, _ = build(top_k=top_k)
    y, _ = layer(torch.randn(1, T, D, dtype=torch.float64))
    y.square().sum().backward()
    assert layer.deepspeed_moe.gate.wg.weight.grad.abs().max() > 1e-3


def test_evaluation_uses_its_own_capacity() -> None:
    layer, _ = build(dtype=torch.float32, top_k=2, capacity_factor=0.25, eval_capacity_factor=0.0, min_capacity=1)
    x = torch.randn(1, T, D)
    assert int(layer(x)[1].dropped) > 0
    assert int(layer.eval()(x)[1].dropped) == 0


# --- memory that nobody initialised -----------------------------------------------------------------------------------


@pytest.fixture
def poisoned() -> Iterator[None]:
    """All memory that torch hands out uninitialised holds NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def in_the_middle_of_nan(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, in memory that holds NaN before and behind them."""
    room = torch.full((tensor.shape[0] + 16, *tensor.shape[1:]), float("nan"), dtype=tensor.dtype)
    room[8:-8] = tensor.detach()
    return room[8:-8].requires_grad_()


# torch's own tolerances of each type, for sums of up to 24 products of about 1.
ROUNDED = {torch.float32: {"rtol": 1.3e-6, "atol": 1e-5}, torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2}}


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("counts", [[5, 0, 17, 2], [0, 0, 24, 0], [24, 0, 0, 0], [0, 0, 0, 24], [0, 0, 0, 0]], ids=str)
def test_no_nan_around_the_rows_of_a_grouped_product_leaks_into_it(
    poisoned: None, counts: list[int], dtype: torch.dtype
) -> None:
    """Rows past the last end stay uninitialised in torch's grouped GEMM: there must be none."""
    generator = torch.Generator().manual_seed(7)
    N, L = sum(counts), len(counts)
    rows = in_the_middle_of_nan(torch.randn(N, D, generator=generator).to(dtype))
    weight = in_the_middle_of_nan(torch.randn(L, F, D, generator=generator).to(dtype))
    grad = in_the_middle_of_nan(torch.randn(N, F, generator=generator).to(dtype)).detach()
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    outputs = grouped_linear(rows, weight, ends)
    outputs.backward(grad)

    precise = [each.detach().double().requires_grad_() for each in (rows, weight)]
    parts = zip(precise[0].split(counts), precise[1], strict=True)
    expected = torch.cat([part @ matrix.t() for part, matrix in parts])
    expected.backward(grad.double())
    pairs = ((outputs, expected), (rows.grad, precise[0].grad), (weight.grad, precise[1].grad))
    for ours, theirs in pairs:
        assert ours.isfinite().all()
        torch.testing.assert_close(ours.double(), theirs, **ROUNDED[dtype])


@pytest.mark.parametrize(("capacity_factor", "backend"), [(0.0, "grouped"), (0.0, "loop"), (0.5, "bmm"), (4.0, "bmm")])
def test_a_layer_reads_no_memory_that_nobody_wrote(poisoned: None, capacity_factor: float, backend: str) -> None:
    how = {"capacity_factor": capacity_factor, "expert_backend": backend, "z_loss_coeff": 1.0}
    layer, config = build("relu2", torch.float32, **how)
    assert_equals_the_reference(layer, config, torch.float32)


# --- shared experts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_shared_experts_add_what_each_of_them_says_to_every_token(activation: str) -> None:
    """A block whose attention is silent: x + routed(norm(x)) + the sum of the shared experts of norm(x)."""
    moe = MoEConfig(num_experts=E, ffn_hidden_size=F, num_shared_experts=3, capacity_factor=0.0, expert_backend="loop")
    config = ModelConfig(num_layers=1, hidden_size=D, num_attention_heads=2, seq_len=T, vocab_size=9, moe=moe)
    block = GPT(config.model_copy(update={"activation": activation})).blocks[0].double()
    generator = torch.Generator().manual_seed(8)
    for parameter in block.mlp.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.5, generator=generator)
    shared = block.shared_mlp
    torch.nn.init.normal_(shared.w2.weight, 0.0, 0.5, generator=generator)
    x_BSD = torch.randn(1, T, D, dtype=torch.float64, generator=generator)
    cos_SR, sin_SR = rotary_tables(T, D // 2, 10000.0)
    y_BSD, _ = block(x_BSD, torch.zeros(1, T, dtype=torch.int64), (cos_SR.double(), sin_SR.double()))
    grad = torch.randn(1, T, D, dtype=torch.float64, generator=generator)
    y_BSD.backward(grad)

    input_BSD = block.mlp_norm(x_BSD).detach()
    gates = 2 if activation == "swiglu" else 1  # the rows of w1 are those of all gates, then of all that is gated
    w1 = shared.w1.weight.detach().view(gates, 3, F, D).unbind(1)
    w2 = shared.w2.weight.detach().view(D, 3, F).unbind(1)
    experts = [[m.clone().requires_grad_() for m in (a.reshape(gates * F, D), b)] for a, b in zip(w1, w2, strict=True)]
    said = torch.stack([sum(reference.mlp(x_D, *expert, activation) for expert in experts) for x_D in input_BSD[0]])
    torch.testing.assert_close(y_BSD, x_BSD + block.mlp(input_BSD)[0] + said)
    said.backward(grad[0])
    for number, (w1_FD, w2_DF) in enumerate(experts):
        ours = shared.w1.weight.grad.view(gates, 3, F, D)[:, number].reshape(gates * F, D)
        torch.testing.assert_close(ours, w1_FD.grad)
        torch.testing.assert_close(shared.w2.weight.grad.view(D, 3, F)[:, number], w2_DF.grad)


def test_shared_experts_are_outside_of_the_routed_layer() -> None:
    """What is inside of it DeepSpeed takes for routed: it would save it by expert, and average it over fewer ranks."""
    moe = MoEConfig(num_experts=E, ffn_hidden_size=F, num_shared_experts=1)
    model = GPT(ModelConfig(num_layers=2, hidden_size=D, num_attention_heads=2, seq_len=T, vocab_size=9, moe=moe))
    shared = {name: parameter for name, parameter in model.named_parameters() if "shared_mlp" in name}
    assert len(shared) == 4
    assert not any(is_moe_param(parameter) or "deepspeed_moe" in name for name, parameter in shared.items())
