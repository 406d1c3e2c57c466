"""The learning rate as a function of the step: shapes, corners, and the seed experiment's own formula."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from model.schedule import lr_factor


def factors(schedule: Any, num_steps: int = 10, **settings: Any) -> list[float]:
    defaults = {"warmup_steps": 0, "decay_frac": 0.2}
    return [
        lr_factor(step, num_steps=num_steps, schedule=schedule, **{**defaults, **settings}) for step in range(num_steps)
    ]


def test_wsd_warms_up_stays_and_decays_linearly() -> None:
    assert factors("wsd", warmup_steps=2) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.5])


def test_wsd_decays_as_half_a_cosine() -> None:
    expected = [0.5 * (1 + math.cos(math.pi * done / 4)) for done in range(4)]
    assert factors("wsd", decay_frac=0.4, decay_shape="cosine")[5:] == pytest.approx([1, *expected])


def test_wsd_decays_as_one_minus_the_square_root() -> None:
    expected = [1 - math.sqrt(done / 4) for done in range(4)]
    assert factors("wsd", decay_frac=0.4, decay_shape="1-sqrt")[5:] == pytest.approx([1, *expected])


def test_cosine_falls_over_all_steps_after_the_warm_up() -> None:
    values = factors("cosine", warmup_steps=2)
    assert values[:3] == pytest.approx([0.5, 1, 1])
    assert values[6] == pytest.approx(0.5)
    assert all(later < earlier for earlier, later in pairwise(values[2:]))


def test_linear_falls_by_equal_amounts_after_the_warm_up() -> None:
    assert factors("linear", warmup_steps=2) == pytest.approx([0.5, 1, *(1 - done / 8 for done in range(8))])


def test_constant_only_warms_up() -> None:
    assert factors("constant", warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "linear"])
def test_a_decay_heads_for_the_final_fraction_of_the_peak(schedule: str) -> None:
    plain = factors(schedule, decay_frac=0.5)
    assert factors(schedule, decay_frac=0.5, final_lr_frac=0.1) == pytest.approx([0.1 + 0.9 * f for f in plain])


@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize("num_steps", [1, 7, 1733])
def test_wsd_without_warm_up_is_the_seeds_warmdown(num_steps: int, final: float) -> None:
    """nanochat: constant, and over the last round(warmdown_ratio * num_iterations) steps a line to final_lr_frac."""
    warmdown = round(0.2 * num_steps)

    def seed(step: int) -> float:
        if step <= num_steps - warmdown:
            return 1.0
        progress = (num_steps - step) / warmdown
        return progress * 1.0 + (1 - progress) * final

    expected = [seed(step) for step in range(num_steps)]
    assert factors("wsd", num_steps, decay_frac=0.2, final_lr_frac=final) == pytest.approx(expected)


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("schedule", ["constant", "wsd", "cosine", "linear"])
def test_no_update_has_a_factor_of_zero_or_above_one(schedule: str, shape: str) -> None:
    for num_steps in (1, 2, 3, 7):
        for warmup_steps in (0, 1, num_steps, 100):
            for decay_frac in (0.01, 1.0):
                values = factors(
                    schedule, num_steps, warmup_steps=warmup_steps, decay_frac=decay_frac, decay_shape=shape
                )
                assert all(0 < value <= 1 for value in values), (num_steps, warmup_steps, decay_frac, values)


def test_overlapping_warm_up_and_decay_multiply() -> None:
    assert factors("wsd", 4, warmup_steps=8, decay_frac=0.5) == pytest.approx([1 / 8, 2 / 8, 3 / 8, 4 / 8 * 0.5])


def test_a_run_that_stops_early_follows_the_schedule_of_the_whole() -> None:
    """What a resumed run needs is the step alone."""
    whole = factors("wsd", 100, warmup_steps=5, decay_frac=0.5, decay_shape="1-sqrt")
    assert lr_factor(
        75, num_steps=100, schedule="wsd", warmup_steps=5, decay_frac=0.5, decay_shape="1-sqrt"
    ) == pytest.approx(whole[75])
    assert 0 < whole[75] < 1
