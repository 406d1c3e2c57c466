"""Expert parallelism changes where experts live, never what the model computes.

Two ranks with ep_size 1 and 2, four with 1, 2 and 4, under ZeRO-1 and 2, against one process on the joined batch:
losses, gradient norms, and every parameter after two clipped AdamW steps; and of every routing rule, every gradient,
clipped, as one step of plain gradient descent shows it. What belongs to a rank's micro-batch (auxiliary loss
and capacity) the one process takes micro-batch by micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from launch.run_config import REPO_ROOT, load_run
from model.config import FP8Config, ModelConfig
from model.fp8_weights import refresh_fp8
from model.gpt import GPT, global_name, named_matrices
from model.optim import assign, build_optimizer, parameter_groups
from model.router import routers_of
from model.stats import StepStats
from ranks import RankPool

LR, CLIP, STEPS = 1e-2, 0.05, 2  # the clip is far below the norm, so that every step is clipped


def tiny_model(**moe: object) -> ModelConfig:
    run = load_run(REPO_ROOT / "ds_configs" / "moe_tiny.json")
    assert run.model.moe is not None
    return run.model.model_copy(update={"moe": run.model.moe.model_copy(update={"aux_loss_coeff": 0.0, **moe})})


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, 512, (8, 33), generator=torch.Generator().manual_seed(step))


@torch.no_grad()
def wake_up(model: GPT, ep_rank: int, num_local: int) -> None:
    """Replace the zeros of a fresh model (gates, output projections) by values that depend on the global name alone."""
    for name, parameter in named_matrices(model):
        if not parameter.any():
            seed = sum(global_name(name, ep_rank, num_local).encode())
            parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(seed))


def convert(model: GPT, fp8: dict[str, Any] | None) -> None:
    """run.fp8, if it is asked for."""
    if fp8 is not None:
        from model.fp8 import apply_fp8

        apply_fp8(model, FP8Config(enabled=True, **fp8), emulate=True, compiled=False)


def train_on_ranks(
    config: ModelConfig,
    ep_size: int,
    zero_stage: int,
    fp8: dict[str, Any] | None = None,
    prepare: Callable[[GPT], None] = lambda model: None,
) -> dict[str, Any]:
    """On every rank: two steps through the DeepSpeed engine, on this rank's half of the batch."""
    import deepspeed
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    assert config.moe is not None
    num_local = config.moe.num_experts // ep_size
    model = GPT(config, ep_size, rank % ep_size, seed=3)
    wake_up(model, rank % ep_size, num_local)
    prepare(model)
    convert(model, fp8)

    def weights() -> dict[str, torch.Tensor]:
        return {
            global_name(name, rank % ep_size, num_local): parameter.detach().clone()
            for name, parameter in named_matrices(model)
        }

    before = weights()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.1}}),
        config={
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": CLIP,
            "zero_optimization": {"stage": zero_stage},
        },
    )
    losses, norms, micro_steps = [], [], 8 // (2 * world_size)
    for step in range(STEPS):
        refresh_fp8(engine.module)
        loss_sum = torch.zeros(())
        for micro_step in range(micro_steps):
            first = (micro_step * world_size + rank) * 2
            tokens = batch(step)[first : first + 2]
            loss, _ = engine(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
            engine.backward(loss)
            engine.step()
            loss_sum += loss.detach() / micro_steps
        dist.all_reduce(loss_sum)
        losses.append(loss_sum.item() / world_size)
        norms.append(float(engine.get_global_grad_norm()))
    found = {"losses": losses, "norms": norms, "before": before, "weights": weights()}
    engine.destroy()
    return found


def train_in_one_process(
    config: ModelConfig,
    fp8: dict[str, Any] | None = None,
    prepare: Callable[[GPT], None] = lambda model: None,
    parts: int = 1,
) -> dict[str, Any]:
    """The same without ranks, engine or ZeRO: the joined batch (in parts), torch's own clipping and AdamW."""
    assert config.moe is not None
    model = GPT(config, seed=3)
    wake_up(model, 0, config.moe.num_experts)
    prepare(model)
    convert(model, fp8)
    optimizer = build_optimizer(model, {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.1}})
    losses, norms = [], []
    for step in range(STEPS):
        refresh_fp8(model)
        optimizer.zero_grad()
        loss_sum = 0.0
        for tokens in batch(step).chunk(parts):
            loss, _ = model(tokens[:, :-1], tokens[:, 1:])
            (loss / parts).backward()
            loss_sum += loss.item() / parts
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        losses.append(loss_sum)
    weights = {name: parameter.detach() for name, parameter in named_matrices(model)}
    return {"losses": losses, "norms": norms, "weights": weights}


@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("top_k", [1, 2])
def test_two_ranks_equal_one_process(two_ranks: RankPool, top_k: int, ep_size: int, zero_stage: int) -> None:
    check_against_one_process(two_ranks, top_k, ep_size, zero_stage)


@pytest.mark.parametrize("ep_size", [2, 4])
def test_four_ranks_equal_one_process(four_ranks: RankPool, ep_size: int) -> None:
    """With ep_size 2 every expert lives on two ranks, whose gradients are averaged."""
    check_against_one_process(four_ranks, top_k=2, ep_size=ep_size, zero_stage=1)


def check_against_one_process(ranks: RankPool, top_k: int, ep_size: int, zero_stage: int) -> None:
    config = tiny_model(top_k=top_k, capacity_factor=0.0)
    expected = train_in_one_process(config)
    answers = ranks.run(train_on_ranks, config, ep_size, zero_stage)
    for answer in answers:
        assert answer["losses"] == pytest.approx(expected["losses"], abs=1e-5)
        assert answer["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert expected["norms"][0] > 2 * CLIP, "nothing was clipped, so the test would not see a wrong norm"
    assert_weights_agree([answer["weights"] for answer in answers], expected["weights"])


def assert_weights_agree(found_on_ranks: list[dict[str, torch.Tensor]], expected: dict[str, torch.Tensor]) -> None:
    """Every weight, on every rank that holds it.

    AdamW's first steps move by about lr whatever the gradient: a wrong sign, a lost expert or shard shows as 1e-2.
    """
    for name, weight in expected.items():
        found = [weights[name] for weights in found_on_ranks if name in weights]
        assert found, name
        for ours in found:
            torch.testing.assert_close(
                ours, weight, rtol=1e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_fixed_capacity_is_each_ranks_own(two_ranks: RankPool) -> None:
    """With capacity per rank, ep_size still changes nothing: the same routes are dropped wherever the experts live."""
    config = tiny_model(capacity_factor=0.5, min_capacity=1)
    alone = two_ranks.run(train_on_ranks, config, 1, 1)
    shared = two_ranks.run(train_on_ranks, config, 2, 1)
    assert shared[0]["losses"] == pytest.approx(alone[0]["losses"], abs=1e-5)
    assert shared[0]["norms"] == pytest.approx(alone[0]["norms"], rel=1e-4)


# --- every gradient, of every routing rule ----------------------------------------------------------------------------

STRIDE = 100.0  # the learning rate: updates of about 0.01 stand out from the rounding of weights
SGD = {"type": "AdamW", "params": {"lr": STRIDE, "weight_decay": 0.0}}  # how parameters are grouped; SGD updates them
LOSSES = {"aux_loss_coeff": 0.5, "z_loss_coeff": 0.1}  # of a weight that shows
RULES = {
    "dropless": {"capacity_factor": 0.0, "expert_backend": "grouped", **LOSSES},
    "capacity of each rank": {"capacity_factor": 0.5, "min_capacity": 1, **LOSSES},
    "DeepSeek-V3's": {
        "capacity_factor": 0.5,
        "min_capacity": 1,
        "drop_policy": "probability",
        "score_func": "sigmoid",
        "num_groups": 2,
        "top_k_groups": 1,
        "num_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "balance": "bias",
        "aux_loss_scope": "sequence",
        **LOSSES,
    },
    "auxiliary loss over the global batch": {
        "capacity_factor": 0.0,
        "expert_backend": "grouped",
        "aux_loss_scope": "global_batch",
        **LOSSES,
    },
    "top-1, raw": {"capacity_factor": 0.0, "expert_backend": "grouped", "top_k": 1, "norm_topk_prob": False, **LOSSES},
}


def set_biases(model: GPT) -> None:
    """Selection biases that change who is chosen, the same on every rank."""
    for layer, router in enumerate(routers_of(model)):
        if router.selection_bias is not None:
            generator = torch.Generator().manual_seed(layer)
            router.selection_bias.copy_(torch.randn(router.num_experts, generator=generator) * 0.2)


def descend_on_ranks(config: ModelConfig, ep_size: int, zero_stage: int) -> dict[str, Any]:
    """On every rank: one clipped step of gradient descent."""
    import deepspeed
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    assert config.moe is not None
    num_local, micro_steps = config.moe.num_experts // ep_size, 8 // (2 * world_size)
    model = GPT(config, ep_size, rank % ep_size, seed=3)
    wake_up(model, rank % ep_size, num_local)
    set_biases(model)
    before = {name: parameter.detach().clone() for name, parameter in named_matrices(model)}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(parameter_groups(model, assign(model, SGD))),
        config={
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": CLIP,
            "zero_optimization": {"stage": zero_stage},
            "zero_allow_untested_optimizer": True,
        },
    )
    losses = []
    stats = StepStats(len(config.moe_layers), config.moe.num_experts, "cpu")
    for micro_step in range(micro_steps):
        first = (micro_step * world_size + rank) * 2
        tokens = batch(0)[first : first + 2]
        loss, micro_stats = engine(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), stats.tokens_per_expert_ME)
        engine.backward(loss)
        engine.step()
        stats.add(micro_stats)
        losses.append(loss.item())
    updates = {
        global_name(name, rank % ep_size, num_local): before[name] - parameter.detach()
        for name, parameter in named_matrices(engine.module)
    }
    found = {"losses": losses, "norm": float(engine.get_global_grad_norm()), "updates": updates}
    return {**found, "totals": stats.reduce(), "engine": engine.destroy()}


def descend_in_one_process(config: ModelConfig, world_size: int) -> dict[str, Any]:
    """The same, micro-batch by micro-batch; those that ranks would take at the same time know each other's load."""
    assert config.moe is not None
    model = GPT(config, seed=3)
    wake_up(model, 0, config.moe.num_experts)
    set_biases(model)
    losses: list[list[float]] = [[] for _ in range(world_size)]
    loads = [torch.zeros(len(config.moe_layers), config.moe.num_experts)]
    for micro_step in range(8 // (2 * world_size)):
        parts = [batch(0)[(micro_step * world_size + rank) * 2 :][:2] for rank in range(world_size)]
        with torch.no_grad():
            own = [model(tokens[:, :-1], tokens[:, 1:])[1].tokens_per_expert_ME for tokens in parts]
        for rank, tokens in enumerate(parts):
            elsewhere = torch.stack([*loads, *own[:rank], *own[rank + 1 :]]).sum(0)
            loss, _ = model(tokens[:, :-1], tokens[:, 1:], elsewhere)
            (loss / 4).backward()  # 4 micro-batches of 2 sequences, wherever they are taken
            losses[rank].append(loss.item())
        loads += own
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
    for parameter in model.parameters():
        parameter.data = STRIDE * parameter.grad
    updates = {name: parameter.detach() for name, parameter in named_matrices(model)}
    return {"losses": losses, "norm": norm, "updates": updates, "load": torch.stack(loads).sum(0)}


@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_every_gradient_on_two_ranks_is_that_of_one_process(
    two_ranks: RankPool, rule: str, ep_size: int, zero_stage: int
) -> None:
    check_every_gradient(two_ranks, 2, rule, ep_size, zero_stage)


@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize("rule", RULES)
def test_every_gradient_on_four_ranks_is_that_of_one_process(
    four_ranks: RankPool, rule: str, ep_size: int, zero_stage: int
) -> None:
    """With ep_size 2 every expert lives on two ranks, whose gradients are averaged."""
    check_every_gradient(four_ranks, 4, rule, ep_size, zero_stage)


def check_every_gradient(ranks: RankPool, world_size: int, rule: str, ep_size: int, zero_stage: int) -> None:
    config = tiny_model(**RULES[rule])
    expected = descend_in_one_process(config, world_size)
    assert expected["norm"] > 2 * CLIP, "nothing is clipped, so the test would not see a wrong norm"
    answers = ranks.run(descend_on_ranks, config, ep_size, zero_stage)
    for rank, answer in enumerate(answers):
        assert answer["losses"] == pytest.approx(expected["losses"][rank], abs=1e-5)
        assert answer["norm"] == pytest.approx(expected["norm"], rel=1e-4)
        assert torch.equal(answer["totals"].tokens_per_expert_ME.float(), expected["load"])
    for name, update in expected["updates"].items():
        found = [answer["updates"][name] for answer in answers if name in answer["updates"]]
        assert len(found) == (world_size // ep_size if "deepspeed_experts" in name else world_size), name
        # A weight (embeddings go up to 4) minus its update is rounded to 2.4e-7, and sums are taken in another order.
        for ours in found:
            torch.testing.assert_close(
                ours, update, rtol=1e-3, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("backend", ["grouped", "loop", "bmm"])
def test_a_rank_whose_experts_nobody_chose_neither_hangs_nor_drifts(two_ranks: RankPool, backend: str) -> None:
    """All tokens go to experts 0 and 1, which the first rank holds; the second one still takes part in every step."""
    rule = {"capacity_factor": 1.0 if backend == "bmm" else 0.0, "expert_backend": backend, "balance": "bias"}
    config = tiny_model(**rule, aux_loss_coeff=0.0)
    answers = two_ranks.run(train_with_idle_experts, config)
    expected = train_with_idle_experts_in_one_process(config)
    assert_weights_agree([answer["weights"] for answer in answers], expected)
    for name, weight in answers[1]["weights"].items():
        if "deepspeed_experts.2." in name or "deepspeed_experts.3." in name:
            # AdamW's decay, and no other move: two steps of lr 0.01 times weight_decay 0.1.
            torch.testing.assert_close(weight, answers[1]["before"][name] * (1 - LR * 0.1) ** STEPS)


def prefer_the_first_two(model: GPT) -> None:
    for router in routers_of(model):
        assert router.selection_bias is not None
        router.selection_bias.copy_(torch.tensor([10.0, 10.0, 0.0, 0.0]))


def train_with_idle_experts(config: ModelConfig) -> dict[str, Any]:
    return train_on_ranks(config, 2, 1, prepare=prefer_the_first_two)


def train_with_idle_experts_in_one_process(config: ModelConfig) -> dict[str, torch.Tensor]:
    """With a capacity micro-batch by micro-batch, since each has its own."""
    return train_in_one_process(config, prepare=prefer_the_first_two, parts=4)["weights"]
