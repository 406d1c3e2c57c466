"""Expert parallelism changes where experts live, never what the model computes.

Two ranks with ep_size 1 and 2, four with 2 and 4, under ZeRO-1 and 2, against one process on the joined batch: losses,
gradient norms, and every parameter after two clipped AdamW steps.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launch.run_config import REPO_ROOT, load_run
from model.config import FP8Config, ModelConfig
from model.fp8_weights import refresh_fp8
from model.gpt import GPT, global_name, named_matrices
from model.optim import build_optimizer
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
    config: ModelConfig, ep_size: int, zero_stage: int, fp8: dict[str, Any] | None = None
) -> dict[str, Any]:
    """On every rank: two steps through the DeepSpeed engine, on this rank's half of the batch."""
    import deepspeed
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    assert config.moe is not None
    num_local = config.moe.num_experts // ep_size
    model = GPT(config, ep_size, rank % ep_size, seed=3)
    wake_up(model, rank % ep_size, num_local)
    convert(model, fp8)
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
    weights = {
        global_name(name, rank % ep_size, num_local): parameter.detach().clone()
        for name, parameter in named_matrices(engine.module)
    }
    engine.destroy()
    return {"losses": losses, "norms": norms, "weights": weights}


def train_in_one_process(config: ModelConfig, fp8: dict[str, Any] | None = None) -> dict[str, Any]:
    """The same without ranks, engine or ZeRO: the joined batch, torch's own clipping and AdamW."""
    assert config.moe is not None
    model = GPT(config, seed=3)
    wake_up(model, 0, config.moe.num_experts)
    convert(model, fp8)
    optimizer = build_optimizer(model, {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.1}})
    losses, norms = [], []
    for step in range(STEPS):
        refresh_fp8(model)
        tokens = batch(step)
        loss, _ = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        losses.append(loss.item())
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
