"""From samples to verdicts: what is better, worse, not distinguishable, invalid; which gates are passed."""

import math
from typing import Any

import pytest

from launch.metrics import METRICS, Bound, parse_gate
from launch.noise import Noise, half_width
from launch.verdicts import Sample, compare, judge, means_by_seed, noise_floor, noise_of

SPEED, BITS, MEMORY = METRICS["tail50_tok_per_sec"], METRICS["val/bpb"], METRICS["peak_mem_mib"]


def samples(*values: float, seeds: tuple[int, ...] | None = None, error: float | None = None) -> list[Sample]:
    return [Sample(value, seed, error) for value, seed in zip(values, seeds or range(len(values)), strict=True)]


def verdict(
    metric: str, rule: str, bound: Any, leg: list[Sample], base: list[Sample], invalid: str | None = None
) -> Any:
    return judge(parse_gate(0, metric, rule, bound), {"base": base, "leg": leg}, "leg", "base", invalid)


BASE = samples(1000.0, 1010.0, 990.0)


@pytest.mark.parametrize(
    ("values", "outcome", "state"),
    [
        ((1100.0, 1110.0, 1090.0), "better", "passed"),
        ((1040.0, 1050.0, 1030.0), "better", "undecided"),  # faster for sure, by 1.03x perhaps
        ((1001.0, 1012.0, 992.0), "not distinguishable", "failed"),  # 1.03x is outside the interval
        ((1020.0, 1000.0, 1010.0), "not distinguishable", "undecided"),
        ((800.0, 805.0, 795.0), "worse", "failed"),
    ],
)
def test_a_leg_wins_only_if_its_whole_interval_is_beyond_the_bound(
    values: tuple[float, ...], outcome: str, state: str
) -> None:
    found = verdict("tail50_tok_per_sec", "at_least", "1.03x baseline", samples(*values), BASE)
    assert (found.outcome, found.state) == (outcome, state)


def test_lower_is_better_where_it_is() -> None:
    found = verdict("tail50_dt_ms", "at_most", "0.9x baseline", samples(80.0, 81.0, 79.0), samples(100.0, 101.0, 99.0))
    assert (found.outcome, found.state) == ("better", "passed")
    found = verdict("peak_mem_mib", "at_most", "1.1x baseline", samples(120.0, 120.0), samples(100.0, 100.0))
    assert (found.outcome, found.state) == ("worse", "failed")


def test_memory_that_never_varies_can_be_told_apart() -> None:
    found = verdict("peak_mem_mib", "at_most", "1.1x baseline", samples(105.0, 105.0), samples(100.0, 100.0))
    assert (found.outcome, found.state) == ("worse", "passed")
    found = verdict("peak_mem_mib", "at_most", "1.1x baseline", samples(100.0, 100.0), samples(100.0, 100.0))
    assert (found.outcome, found.state) == ("not distinguishable", "passed")


@pytest.mark.parametrize(("mean", "state"), [(2.0, "passed"), (2.019, "passed"), (2.021, "failed"), (1.5, "passed")])
def test_no_worse_than_allows_for_the_noise_of_a_run(mean: float, state: str) -> None:
    base, leg = samples(1.99, 2.0, 2.01), samples(mean - 0.01, mean, mean + 0.01)  # sigma 0.01
    found = verdict("val/bpb", "no_worse_than", "baseline + 2 sigma", leg, base)
    assert found.state == state


@pytest.mark.parametrize("others", [0, 2, 6])
def test_a_leg_whose_repeats_lie_far_apart_does_not_widen_its_own_bound(others: int) -> None:
    """Half of what two repeats differ by is their sigma, and also what the mean is off by if one of them diverged."""
    legs = {"base": samples(2.0, 2.002), "leg": samples(2.001, 9.0)}
    legs |= {f"other{i}": samples(2.0, 2.001) for i in range(others)}
    found = judge(parse_gate(0, "val/bpb", "no_worse_than", "baseline + 2 sigma"), legs, "leg", "base", None)
    assert (found.outcome, found.state) == ("not distinguishable", "failed")


def test_without_repeats_nothing_is_decided_however_large_the_difference() -> None:
    found = verdict("tail50_tok_per_sec", "at_least", "1.03x baseline", samples(2000.0), samples(1000.0))
    assert (found.outcome, found.state) == ("not distinguishable", "undecided")
    assert found.reason == "no repeats: the noise is not known"
    found = verdict("val/bpb", "no_worse_than", "baseline + 2 sigma", samples(3.0), samples(2.0))
    assert (found.outcome, found.state) == ("not distinguishable", "undecided")
    for bound in ("baseline", 4.0):  # which need no sigma
        found = verdict("val/bpb", "no_worse_than", bound, samples(1.9), samples(2.0))
        assert (found.outcome, found.state) == ("not distinguishable", "undecided")


def test_losses_repeated_with_one_seed_say_nothing_of_their_noise() -> None:
    same = (0, 0, 0)
    leg, base = samples(2.1, 2.1, 2.1, seeds=same), samples(2.0, 2.0, 2.0, seeds=same)
    found = verdict("val/bpb", "no_worse_than", "baseline + 2 sigma", leg, base)
    assert (found.outcome, found.reason) == (
        "not distinguishable",
        "no repeats with seeds of their own: the noise is not known",
    )
    assert means_by_seed(BITS, samples(1.0, 3.0, 5.0, seeds=(0, 0, 1))) == [2.0, 5.0]
    assert len(means_by_seed(SPEED, samples(1.0, 3.0, 5.0, seeds=(0, 0, 1)))) == 3  # speed repeated is measured again


def test_the_more_legs_are_compared_the_wider_is_the_interval_of_each() -> None:
    """Of twenty legs that change nothing one would win otherwise. Legs that measured nothing are not compared."""
    leg, base = samples(100.0, 101.0), samples(103.0, 104.0)
    few: dict[str, list[Sample]] = {"base": base, "leg": leg, "crashed": []}
    sigma = noise_of(SPEED, few, "leg", "base").sigma  # type: ignore[union-attr]
    low = math.log1p(compare(SPEED, few, "leg", "base").low or 0)
    assert math.log(math.sqrt(100 * 101) / math.sqrt(103 * 104)) - low == pytest.approx(4.3027 * sigma, rel=1e-4)
    many = {**few, **{f"leg{i}": leg for i in range(3)}}
    noise = noise_of(SPEED, many, "leg", "base")
    assert noise is not None
    low = math.log1p(compare(SPEED, many, "leg", "base").low or 0)
    assert math.log(math.sqrt(100 * 101) / math.sqrt(103 * 104)) - low == pytest.approx(
        half_width(noise, 2, 2, comparisons=4), rel=1e-6
    )


def test_a_wild_leg_does_not_hide_among_steady_ones() -> None:
    legs = {"base": samples(100.0, 100.1), "leg": samples(100.0, 120.0)}
    alone = noise_of(SPEED, legs, "leg", "base")
    steady = {f"steady{i}": samples(100.0, 100.1) for i in range(8)}
    among = noise_of(SPEED, {**legs, **steady}, "leg", "base")
    assert among.sigma == pytest.approx(alone.sigma)  # type: ignore[union-attr]
    assert among.freedom == alone.freedom == 2  # type: ignore[union-attr]
    assert noise_of(SPEED, {**legs, **steady}, "steady0", "base").freedom == 10  # type: ignore[union-attr]


def test_the_noise_floor_is_of_all_legs_though_the_baseline_is_a_wild_one() -> None:
    legs = {"base": samples(100.0, 120.0), "a": samples(100.0, 101.0), "b": samples(100.0, 101.0)}
    floor = noise_floor(SPEED, legs)
    assert floor is not None
    assert floor.freedom == 3
    within = {name: samples(100.0, 100.0, error=0.07) for name in ("base", "a")}
    assert noise_floor(SPEED, within) == Noise(pytest.approx(0.07), 2)


def test_repeats_that_agree_by_chance_are_no_more_exact_than_their_steps() -> None:
    legs = {"base": samples(100.0, 100.0, error=0.05), "leg": samples(104.0, 104.0, error=0.05)}
    noise = noise_of(SPEED, legs, "leg", "base")
    assert noise is not None
    assert noise.sigma == pytest.approx(0.05)
    assert compare(SPEED, legs, "leg", "base").low < 0 < compare(SPEED, legs, "leg", "base").high  # type: ignore[operator]
    memory = noise_of(MEMORY, legs, "leg", "base")
    assert memory is not None
    assert memory.sigma == 0.0


def test_speeds_are_compared_as_ratios_and_losses_as_differences() -> None:
    speed = compare(SPEED, {"base": samples(100.0, 100.0), "leg": samples(120.0, 120.0)}, "leg", "base")
    assert (speed.difference, speed.percent) == (pytest.approx(0.2), pytest.approx(20.0))
    bits = compare(BITS, {"base": samples(2.0, 2.0), "leg": samples(1.9, 1.9)}, "leg", "base")
    assert (bits.difference, bits.percent) == (pytest.approx(-0.1), pytest.approx(-5.0))
    nothing = compare(METRICS["moe/dead_experts"], {"base": samples(0, 0), "leg": samples(1, 1)}, "leg", "base")
    assert nothing.percent is None


def test_a_bound_may_be_a_number() -> None:
    found = verdict("tail50_mfu", "at_least", 40.0, samples(42.0, 42.1), samples(20.0, 20.1))
    assert found.state == "passed"
    found = verdict("moe/dropped_frac", "at_most", 0.01, samples(0.02, 0.021), samples(0.0, 0.001))
    assert found.state == "failed"


def test_what_is_invalid_has_no_verdict_else_and_fails_its_gate() -> None:
    found = verdict("val/bpb", "no_worse_than", "baseline", samples(1.0, 1.1), samples(2.0, 2.1), "repeat 2 nan")
    assert (found.outcome, found.state, found.reason, found.comparison) == ("invalid", "failed", "repeat 2 nan", None)


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("1.03x baseline", Bound(1.03, 0, 0)),
        ("baseline", Bound(1, 0, 0)),
        ("baseline + 2 sigma", Bound(1, 2, 0)),
        ("1.5x baseline - 0.5 sigma", Bound(1.5, -0.5, 0)),
        (40, Bound(0, 0, 40)),
    ],
)
def test_bounds_read_as_they_are_written(text: Any, bound: Bound) -> None:
    assert parse_gate(0, "tail50_mfu", "at_least", text).bound == bound


def test_the_interval_of_a_ratio_is_one_of_logarithms() -> None:
    found = compare(SPEED, {"base": samples(100.0, 104.0), "leg": samples(200.0, 208.0)}, "leg", "base")
    assert found.low is not None
    assert found.high is not None
    assert (1 + found.low) * (1 + found.high) == pytest.approx((1 + found.difference) ** 2)
    assert math.isclose(found.mean, math.sqrt(200 * 208))
