"""How far a difference can be trusted: pooled noise, the block bootstrap, Student's interval."""

import math
import random
import statistics

import pytest

from launch.noise import (
    Noise,
    bootstrap_means,
    half_width,
    interval_of_mean,
    pooled_noise,
    relative_error_of_mean,
    student_t,
)


def test_noise_is_pooled_over_legs_whatever_their_means() -> None:
    noise = pooled_noise([[1.0, 3.0], [101.0, 103.0, 102.0]])
    assert noise == Noise(math.sqrt((1 + 1 + 1 + 1 + 0) / 3), 3)


@pytest.mark.parametrize("groups", [[], [[]], [[1.0], [2.0]], [[1.0], []]])
def test_without_two_repeats_of_any_leg_the_noise_is_not_known(groups: list[list[float]]) -> None:
    assert pooled_noise(groups) is None


def test_the_quantile_is_students_and_bonferronis() -> None:
    assert student_t(4, 1) == pytest.approx(2.7764, abs=1e-4)  # printed tables: 97.5% with 4 degrees of freedom
    assert student_t(4, 5) == pytest.approx(4.6041, abs=1e-4)  # 99.5%
    assert half_width(Noise(2.0, 4), 2, 3) == pytest.approx(2.7764 * 2.0 * math.sqrt(1 / 2 + 1 / 3), rel=1e-4)


def test_the_interval_of_a_difference_holds_the_truth_as_often_as_it_says() -> None:
    """Five legs of three repeats that do not differ: at most 5% of suites may call any of them different."""
    draws, wrong, suites = random.Random(1), 0, 1000
    for _ in range(suites):
        legs = [[draws.gauss(10, 1) for _ in range(3)] for _ in range(5)]
        noise = pooled_noise(legs)
        assert noise is not None
        means = [statistics.fmean(leg) for leg in legs]
        wrong += any(abs(mean - means[0]) > half_width(noise, 3, 3, comparisons=4) for mean in means[1:])
    assert 0.01 < wrong / suites < 0.06  # Bonferroni keeps a little below 5%; sampling error of 1,000 suites is 0.7%


def correlated(draws: random.Random, count: int, memory: float) -> list[float]:
    """Times of steps that stay slow or fast for a while: an AR(1) process around 100."""
    state, values = 0.0, []
    for _ in range(count):
        state = memory * state + draws.gauss(0, 1) * math.sqrt(1 - memory**2)
        values.append(100 + state)
    return values


def test_blocks_see_that_neighbouring_steps_are_alike() -> None:
    draws = random.Random(0)
    series = [correlated(draws, 50, 0.7) for _ in range(200)]
    true_error = statistics.pstdev([statistics.fmean(values) for values in series])
    by_blocks = statistics.fmean(statistics.pstdev(bootstrap_means(values)) for values in series)
    by_steps = statistics.fmean(statistics.pstdev(bootstrap_means(values, block=1)) for values in series)
    assert by_steps < 0.6 * true_error  # single steps promise twice the precision that there is
    assert 0.65 * true_error < by_blocks < 1.2 * true_error


@pytest.mark.parametrize(("count", "memory"), [(50, 0.0), (50, 0.5), (12, 0.0)])
def test_the_interval_of_a_mean_holds_the_truth_as_often_as_it_says(count: int, memory: float) -> None:
    draws, series = random.Random(2), 200
    intervals = [interval_of_mean(correlated(draws, count, memory)) or (0, 0) for _ in range(series)]
    held = sum(low <= 100 <= high for low, high in intervals)
    assert 0.92 < held / series < 1


def test_slow_steps_at_both_ends_are_drawn_as_often_as_others() -> None:
    low, high = interval_of_mean([1000.0] + [100.0] * 48 + [1000.0]) or (0, 0)
    assert low < 136 < high  # their mean


def test_an_interval_of_times_stays_above_the_shortest() -> None:
    assert (interval_of_mean([1000.0] + [1.0] * 49) or (0, 0))[0] == 1.0


def test_the_same_times_have_the_same_interval_and_a_wider_spread_a_wider_one() -> None:
    steady, wild = [100.0 + i % 3 for i in range(50)], [100.0 + 10 * (i % 7) for i in range(50)]
    assert interval_of_mean(steady) == interval_of_mean(list(steady))
    low, high = interval_of_mean(steady) or (0, 0)
    assert low <= statistics.fmean(steady) <= high
    wide_low, wide_high = interval_of_mean(wild) or (0, 0)
    assert wide_high - wide_low > high - low


def test_a_handful_of_steps_has_no_interval() -> None:
    assert interval_of_mean([1.0] * 7) is None
    assert relative_error_of_mean([1.0] * 7) is None
    assert relative_error_of_mean([2.0] * 8) == 0.0
