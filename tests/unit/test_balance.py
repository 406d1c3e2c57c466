"""What evens out the load: auxiliary and z-loss, their gradients and what they belong to; the selection bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_moe_layer import D, E, T, build

from launch.run_config import REPO_ROOT, load_run
from model.config import ModelConfig
from model.gpt import GPT, Stats
from model.router import Router, routers_of, selection_bias_ME, update_selection_bias
from model.stats import StepStats

TINY = REPO_ROOT / "ds_configs" / "moe_tiny.json"
SCOPES = ["micro_batch", "sequence", "global_batch"]


def gate(**moe: object) -> Router:
    layer, _ = build(**moe)
    return layer.deepspeed_moe.gate


def tokens_TD(seed: int = 0, tokens: int = T) -> torch.Tensor:
    return torch.randn(tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- theory -----------------------------------------------------------------------------------------------------------


def test_the_gradient_of_the_auxiliary_loss_is_that_of_its_formula() -> None:
    """d aux / d logit_te = E/K * p_te * (f_e - sum_j f_j p_tj) / T: f is counted, so it has no gradient."""
    router, x_TD = gate(top_k=2, capacity_factor=0.5), tokens_TD()
    stats = router(x_TD).stats
    stats.aux_loss.backward()
    with torch.no_grad():
        probs_TE = torch.softmax(x_TD @ router.wg.weight.t(), dim=-1)
        f_E = stats.tokens_per_expert_E / T
        grad_TE = E / 2 * probs_TE * (f_E - (probs_TE * f_E).sum(-1, keepdim=True)) / T
    torch.testing.assert_close(router.wg.weight.grad, grad_TE.t() @ x_TD)


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
def test_the_gradient_of_the_z_loss_is_that_of_its_formula(score_func: str) -> None:
    """d z / d logit_te = 2 * logsumexp_t * softmax(logits_t)_e / T, whatever makes scores of logits."""
    router, x_TD = gate(top_k=2, z_loss_coeff=1.0, score_func=score_func), tokens_TD()
    router(x_TD).stats.z_loss.backward()
    with torch.no_grad():
        logits_TE = x_TD @ router.wg.weight.t()
        grad_TE = 2 * logits_TE.logsumexp(-1, keepdim=True) * torch.softmax(logits_TE, dim=-1) / T
    torch.testing.assert_close(router.wg.weight.grad, grad_TE.t() @ x_TD)


def model_config(*settings: str) -> ModelConfig:
    return load_run(TINY, list(settings)).model


def awake(config: ModelConfig) -> GPT:
    """A tiny model whose gates and output projections, fresh zeros, are random; in fp64."""
    model = GPT(config, seed=3).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, 0.0, 0.2, generator=generator)
    return model


def batch(seed: int = 0, sequences: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 512, (sequences, 33), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def router_gradients(*settings: str) -> list[torch.Tensor]:
    """Of the gate of every layer, after one micro-batch."""
    model = awake(model_config(*settings))
    model(*batch())[0].backward()
    return [router.wg.weight.grad for router in routers_of(model)]


@pytest.mark.parametrize("key", ["aux_loss_coeff", "z_loss_coeff"])
@pytest.mark.parametrize("scope", SCOPES)
def test_the_routers_gradient_moves_in_proportion_to_the_coefficient(key: str, scope: str) -> None:
    scope = f"run.model.moe.aux_loss_scope={scope}"
    none, once, twice = (router_gradients(scope, f"run.model.moe.{key}={weight}") for weight in (1e-9, 0.1, 0.2))
    for without, one, two in zip(none, once, twice, strict=True):
        assert (one - without).norm() > 1e-3 * without.norm()
        torch.testing.assert_close(two - without, 2 * (one - without), rtol=1e-6, atol=1e-9)


def test_without_a_coefficient_nothing_but_the_cross_entropy_reaches_the_router() -> None:
    plain = router_gradients("run.model.moe.balance=none")
    zero = router_gradients("run.model.moe.aux_loss_coeff=0.0")
    for ours, expected in zip(zero, plain, strict=True):
        assert expected.abs().max() > 0
        assert torch.equal(ours, expected)


# --- what a loss belongs to -------------------------------------------------------------------------------------------


def step_of(model: GPT, micro_batches: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    """Losses and gradients of one optimizer step, as train.py takes it."""
    config = model.config
    assert config.moe is not None
    stats = StepStats(len(config.moe_layers), config.moe.num_experts, "cpu")
    losses, aux = [], []
    for each in micro_batches:
        loss, micro_stats = model(*each, stats.tokens_per_expert_ME)
        (loss / len(micro_batches)).backward()
        stats.add(micro_stats)
        losses.append(loss.item())
        aux.append(micro_stats.aux_loss_M)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"losses": losses, "aux": torch.stack(aux), "gradients": gradients, "load": stats.tokens_per_expert_ME}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("rule", [(), ("balance=bias", "score_func=sigmoid")], ids=["softmax", "bias and sigmoid"])
def test_several_identical_micro_batches_equal_one(scope: str, rule: tuple[str, ...]) -> None:
    settings = [*rule, f"aux_loss_scope={scope}", "aux_loss_coeff=0.5", "z_loss_coeff=0.1", "capacity_factor=0.5"]
    config = model_config(*(f"run.model.moe.{setting}" for setting in settings))
    one, four = step_of(awake(config), [batch()]), step_of(awake(config), [batch()] * 4)
    assert four["losses"] == pytest.approx(one["losses"] * 4, rel=1e-12)
    assert torch.equal(four["load"], 4 * one["load"])
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(four["gradients"][name], gradient)


def test_over_the_global_batch_micro_batches_that_complement_each_other_are_balanced() -> None:
    """Two micro-batches, each of which goes to other experts: uneven each on its own, even together."""
    complementary = [torch.eye(D, dtype=torch.float64)[[0, 1, 2, 3]], torch.eye(D, dtype=torch.float64)[[4, 5, 6, 7]]]
    found = {}
    for scope in ("micro_batch", "global_batch"):
        router = gate(top_k=1, aux_loss_scope=scope)
        with torch.no_grad():
            router.wg.weight.copy_(5 * torch.eye(D, dtype=torch.float64))  # token e prefers expert e
        earlier_E, found[scope] = torch.zeros(E), []
        for x_TD in complementary:
            stats = router(x_TD, 1, earlier_E).stats
            earlier_E = earlier_E + stats.tokens_per_expert_E
            found[scope].append(stats.aux_loss.item())
    assert found["micro_batch"][0] == pytest.approx(found["micro_batch"][1])
    assert found["micro_batch"][0] > 1.5
    assert found["global_batch"] == [pytest.approx(found["micro_batch"][0]), pytest.approx(1.0)]


def test_a_sequences_auxiliary_loss_is_the_mean_of_those_of_its_sequences() -> None:
    router, x_TD = gate(top_k=2, aux_loss_scope="sequence"), tokens_TD()
    whole = router(x_TD, num_sequences=3).stats.aux_loss
    thirds = [gate(top_k=2)(part_TD).stats.aux_loss for part_TD in x_TD.chunk(3)]
    torch.testing.assert_close(whole, torch.stack(thirds).mean())
    assert abs(whole - gate(top_k=2)(x_TD).stats.aux_loss) > 1e-3, "as one sequence it is another number"


def test_a_models_auxiliary_loss_by_sequence_is_that_of_its_sequences_alone() -> None:
    dropless = ("run.model.moe.capacity_factor=0.0", "run.model.moe.expert_backend=loop")
    model = awake(model_config("run.model.moe.aux_loss_scope=sequence", *dropless))
    tokens, targets = batch(sequences=3)
    alone = [model(*each)[1].aux_loss_M for each in zip(tokens.split(1), targets.split(1), strict=True)]
    torch.testing.assert_close(model(tokens, targets)[1].aux_loss_M, torch.stack(alone).mean(0))


def test_the_loss_is_cross_entropy_plus_the_weighted_sums_over_layers() -> None:
    loss, stats = awake(model_config("run.model.moe.aux_loss_coeff=0.5", "run.model.moe.z_loss_coeff=0.25"))(*batch())
    assert len(stats.aux_loss_M.unique()) == len(stats.z_loss_M.unique()) == 2
    torch.testing.assert_close(loss, stats.cross_entropy + 0.5 * stats.aux_loss_M.sum() + 0.25 * stats.z_loss_M.sum())


def test_evaluation_asks_no_other_rank_for_its_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks may have different numbers of validation batches."""

    def fail(*_: object) -> None:
        raise AssertionError("the load was summed over ranks")

    monkeypatch.setattr("model.router.sum_over_ranks", fail)
    router = gate(top_k=2, aux_loss_scope="global_batch")
    router.eval()(tokens_TD())
    with pytest.raises(AssertionError):
        router.train()(tokens_TD())


# --- the bias ---------------------------------------------------------------------------------------------------------


def biased_model() -> GPT:
    return GPT(model_config("run.model.moe.balance=bias", "run.model.moe.bias_update_rate=0.25"), seed=3)


def test_a_bias_rises_where_the_load_is_below_the_mean_and_falls_above_it() -> None:
    model = biased_model()
    update_selection_bias(model, torch.tensor([[1.0, 5.0, 2.0, 4.0], [3.0, 3.0, 3.0, 3.0]]))
    bias_ME = selection_bias_ME(model)
    assert bias_ME is not None
    assert bias_ME.tolist() == [[0.25, -0.25, 0.25, -0.25], [0.0] * 4]
    update_selection_bias(model, torch.tensor([[3.0, 5.0, 3.0, 1.0], [9.0, 1.0, 1.0, 1.0]]))
    bias_ME = selection_bias_ME(model)
    assert bias_ME is not None
    assert bias_ME.tolist() == [[0.25, -0.5, 0.25, 0.0], [-0.25, 0.25, 0.25, 0.25]]


def test_a_bias_moves_by_the_rate_however_near_the_mean_a_load_is() -> None:
    model = biased_model()
    update_selection_bias(model, torch.tensor([[100.0, 100.0, 100.0, 101.0], [0.0, 0.0, 0.0, 401.0]]))
    bias_ME = selection_bias_ME(model)
    assert bias_ME is not None
    assert bias_ME.tolist() == [[0.25, 0.25, 0.25, -0.25]] * 2


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [{}, {"num_groups": 4, "top_k_groups": 2}], ids=["no groups", "groups"])
def test_a_bias_that_all_experts_share_changes_nothing(groups: dict[str, int], score_func: str) -> None:
    """Biases drift together; scores below zero keep their order."""
    router = gate(top_k=4, capacity_factor=0.0, expert_backend="loop", balance="bias", score_func=score_func, **groups)
    plan = router(tokens_TD()).plan
    router.selection_bias.fill_(-2.0)
    assert torch.equal(router(tokens_TD()).plan.route_of_row_N, plan.route_of_row_N)


@pytest.mark.parametrize("training", [True, False])
def test_no_forward_or_backward_pass_moves_a_bias(training: bool) -> None:
    model = biased_model().train(training)
    update_selection_bias(model, torch.tensor([[1.0, 5.0, 2.0, 4.0], [4.0, 3.0, 2.0, 1.0]]))
    before = selection_bias_ME(model)
    for _ in range(2):
        model(*batch())[0].backward()
    assert before is not None
    assert torch.equal(before, selection_bias_ME(model))
    assert all("selection_bias" not in name for name, _ in model.named_parameters()), "no optimizer moves it either"


def test_a_bias_stays_in_fp32_when_the_model_is_cast() -> None:
    model = biased_model()
    for router in routers_of(model):
        router.selection_bias.fill_(1.001)  # 1.0 in bf16
    for cast in (torch.bfloat16, torch.float64):
        model.to(cast)
        bias_ME = selection_bias_ME(model)
        assert bias_ME is not None
        assert bias_ME.dtype == torch.float32
        assert bias_ME.unique().tolist() == [pytest.approx(1.001, abs=1e-7)]


def test_a_bias_is_part_of_the_state_and_comes_back() -> None:
    trained, fresh = biased_model(), biased_model()
    update_selection_bias(trained, torch.tensor([[1.0, 5.0, 2.0, 4.0], [4.0, 3.0, 2.0, 1.0]]))
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(selection_bias_ME(fresh), selection_bias_ME(trained))


def test_a_model_that_is_balanced_otherwise_has_no_bias_and_is_left_alone() -> None:
    model = GPT(model_config(), seed=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    update_selection_bias(model, torch.tensor([[1.0, 5.0, 2.0, 4.0], [4.0, 3.0, 2.0, 1.0]]))
    assert selection_bias_ME(model) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_statistics_of_a_forward_pass_are_detached() -> None:
    _, stats = awake(model_config("run.model.moe.z_loss_coeff=0.1"))(*batch())
    assert isinstance(stats, Stats)
    assert not any(value.requires_grad for value in stats)
