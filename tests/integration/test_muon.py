"""Muon under ZeRO-1 and 2, with experts shared or replicated, equals Muon and AdamW written out in one process.

Each expert is orthogonalised on its own, gradients are those of all ranks and micro-steps, and parameters that AdamW
updates are not orthogonalised. After three steps weights agree to 1e-5; an update is about lr / sqrt(width) = 4e-3.
Neither optimizer feels the scale of a gradient; test_expert_parallelism.py and test_zero_and_memory.py compare norms.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_expert_parallelism import batch, tiny_model, wake_up

from model.config import ModelConfig
from model.gpt import GPT, global_name, named_matrices
from model.optim import Assignment, assign, build_optimizer, set_lr
from ranks import RankPool
from reference import adamw_step, muon_step

STEPS = 3
FACTORS = (1.0, 0.7, 0.4)  # of a schedule
PARAMS = {
    "muon_lr": 0.02,
    "adam_lr": 2e-3,
    "momentum": 0.9,
    "betas": [0.8, 0.95],
    "eps": 1e-6,  # far above rounding in gradients near zero, whose sign AdamW's first steps would follow
    "weight_decay": 0.5,
}
SECTION: dict[str, Any] = {"type": "Muon", "params": PARAMS}


def train_on_ranks(config: ModelConfig, ep_size: int, zero: dict[str, Any], router_optimizer: str) -> dict[str, Any]:
    import deepspeed
    import torch.distributed as dist

    # Newton-Schulz in fp32 whatever the processor, so that only the order of sums is left to differ.
    type(deepspeed.get_accelerator()).is_fp16_supported = lambda _: False  # type: ignore[method-assign]
    rank, world_size = dist.get_rank(), dist.get_world_size()
    assert config.moe is not None
    num_local = config.moe.num_experts // ep_size
    model = GPT(config, ep_size, rank % ep_size, seed=3)
    wake_up(model, rank % ep_size, num_local)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, SECTION, router_optimizer),
        config={
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.0,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    for step in range(STEPS):
        set_lr(engine.optimizer, FACTORS[step])
        for micro_step in range(8 // (2 * world_size)):
            first = (micro_step * world_size + rank) * 2
            tokens = batch(step)[first : first + 2]
            loss, _ = engine(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
            engine.backward(loss)
            engine.step()
    weights = {
        global_name(name, rank % ep_size, num_local): parameter.detach().clone()
        for name, parameter in named_matrices(engine.module)
    }
    engine.destroy()
    return weights


def train_in_one_process(config: ModelConfig, router_optimizer: str) -> dict[str, torch.Tensor]:
    """The joined batch, and both optimizers by their formulas."""
    assert config.moe is not None
    model = GPT(config, seed=3)
    wake_up(model, 0, config.moe.num_experts)
    rows = {row.name: row for row in assign(model, SECTION, router_optimizer)}
    state: dict[str, Any] = {}
    for step in range(STEPS):
        tokens = batch(step)
        model.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:])[0].backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            stacked = parameter.ndim == 3  # of experts: each matrix by the formula on its own
            weights, grads = (t if stacked else t.unsqueeze(0) for t in (parameter.data, parameter.grad))
            for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
                key = f"{name}.{i}"
                updated, state[key] = one_step(rows[name], weight, grad, state.get(key), step)
                weight.copy_(updated)
    return {name: parameter.detach() for name, parameter in named_matrices(model)}


def one_step(
    row: Assignment, weight: torch.Tensor, grad: torch.Tensor, state: Any, step: int
) -> tuple[torch.Tensor, Any]:
    settings = {"lr": FACTORS[step] * row.lr, "weight_decay": row.weight_decay}
    zero = torch.zeros_like(grad)
    if row.optimizer == "muon":
        return muon_step(weight, grad, zero if state is None else state, **settings, beta=0.9)
    moments = (zero, zero) if state is None else state
    return adamw_step(weight, grad, moments, step + 1, **settings, betas=(0.8, 0.95), eps=1e-6)


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("zero", "ep_size", "router_optimizer"),
    [
        ({"stage": 1}, 1, "muon"),
        ({"stage": 1}, 2, "adamw"),
        ({"stage": 1, **OFFLOAD}, 2, "muon"),
        ({"stage": 2}, 1, "adamw"),
        ({"stage": 2}, 2, "muon"),
        ({"stage": 2, **OFFLOAD}, 1, "muon"),
    ],
)
def test_muon_under_zero_equals_its_formula(
    two_ranks: RankPool, zero: dict[str, Any], ep_size: int, router_optimizer: str
) -> None:
    config = tiny_model(capacity_factor=0.0)
    expected = train_in_one_process(config, router_optimizer)
    answers = two_ranks.run(train_on_ranks, config, ep_size, zero, router_optimizer)
    for name, weight in expected.items():
        found = [answer[name] for answer in answers if name in answer]
        assert found, name
        for ours in found:
            torch.testing.assert_close(ours, weight, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
