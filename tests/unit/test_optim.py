"""Which parameter gets which group, and the learning rate as a function of the step."""

from __future__ import annotations

from itertools import pairwise

import pytest

from launch.run_config import REPO_ROOT, load_run
from model.gpt import GPT
from model.optim import build_optimizer, lr_factor


def tiny() -> GPT:
    return GPT(load_run(REPO_ROOT / "ds_configs" / "moe_tiny.json", ["run.model.norm_affine=true"]).model)


def test_every_parameter_is_in_exactly_one_group_with_the_right_decay() -> None:
    model = tiny()
    optimizer = build_optimizer(model, {"lr": 1e-3, "weight_decay": 0.1})
    group_of: dict[int, dict[str, object]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in group_of
            group_of[id(parameter)] = group
    for name, parameter in model.named_parameters():
        group = group_of.pop(id(parameter))
        plain = "embedding" in name or "norm" in name
        assert group["weight_decay"] == (0.0 if plain else 0.1), name
        assert bool(group.get("moe")) == ("deepspeed_experts" in name), name
    assert not group_of


def factors(schedule: str, warmup_steps: int = 0, decay_frac: float = 0.2, num_steps: int = 10) -> list[float]:
    return [
        lr_factor(step, num_steps=num_steps, schedule=schedule, warmup_steps=warmup_steps, decay_frac=decay_frac)
        for step in range(num_steps)
    ]


def test_wsd_warms_up_stays_and_decays_linearly() -> None:
    expected = [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.5]
    assert factors("wsd", warmup_steps=2) == pytest.approx(expected)


def test_cosine_falls_over_all_steps_after_the_warm_up() -> None:
    values = factors("cosine", warmup_steps=2)
    assert values[:3] == pytest.approx([0.5, 1, 1])
    assert values[6] == pytest.approx(0.5)
    assert all(later < earlier for earlier, later in pairwise(values[2:]))


def test_constant_only_warms_up() -> None:
    assert factors("constant", warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("schedule", ["constant", "wsd", "cosine"])
def test_no_update_has_a_factor_of_zero(schedule: str) -> None:
    for num_steps in (1, 2, 3, 7):
        assert min(factors(schedule, num_steps=num_steps, decay_frac=1.0)) > 0
