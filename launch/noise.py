"""How far a difference between legs can be trusted: noise of a run from its repeats, interval of a mean.

A figure of a run has a value x. Figures compared as ratios are taken as logarithms, so that noise is a share of the
value and a leg twice as fast may have twice the noise in tok/s; the others as they are.

    between runs    sigma^2 = sum over legs and repeats of (x - mean of the leg)^2 / sum over legs of (repeats - 1)
                    pooled over the legs of the suite, since two repeats of one leg alone say very little; over leg and
                    baseline alone where they are more than twice as noisy as the others, lest these hide a wild leg
    within a run    standard error of the mean time of a step, by a block bootstrap of the last 50 steps: steps in a row
                    are alike, so blocks of them are drawn, not single ones (Kuensch 1989, Ann. Statist. 17); around a
                    circle, so that the first and last steps are drawn as often as others (Politis and Romano 1992)

    noise           the larger of these: repeats that agree by chance are no more exact than their own steps
    interval        difference of the two means +- t * noise * sqrt(1/n + 1/m), t of Student's distribution; 95% for all
                    legs of a gate together (Bonferroni): of twenty legs that change nothing, one would win otherwise

The interval supposes legs about equally noisy. Simulated, with two or three repeats of two to six legs that do not
differ: 3 to 5% of suites call one different; 7 to 11% with one leg 5 times as noisy as the others; 15% at the worst.
"""

from __future__ import annotations

import functools
import math
import random
import statistics
from dataclasses import dataclass

CONFIDENCE = 0.95
RESAMPLES = 2000
BLOCK_STEPS = 10  # of a block: longer than the few steps over which a machine stays slow or fast
FEWEST_STEPS = 8  # that an interval can come from: of fewer, blocks would be single steps


@dataclass(frozen=True)
class Noise:
    """Standard deviation of one run's value, and the degrees of freedom behind it."""

    sigma: float
    freedom: int


def pooled_noise(groups: list[list[float]]) -> Noise | None:
    """From the repeats of several legs, a list of values each; None without two repeats of any."""
    freedom = sum(len(group) - 1 for group in groups if group)
    if freedom == 0:
        return None
    squares = sum((value - statistics.fmean(group)) ** 2 for group in groups if group for value in group)
    return Noise(math.sqrt(squares / freedom), freedom)


def block_of(values: list[float], block: int) -> int:
    return max(1, min(block, len(values) // 4))


def bootstrap_means(values: list[float], block: int = BLOCK_STEPS, resamples: int = RESAMPLES) -> list[float]:
    """Sorted means of resamples of a series, drawn in blocks of neighbours; the same ones every time."""
    block = block_of(values, block)
    draws = random.Random(0)
    circle = values + values[: block - 1]
    sums = [sum(circle[start : start + block]) for start in range(len(values))]
    blocks = max(1, round(len(values) / block))
    return sorted(sum(draws.choices(sums, k=blocks)) / (blocks * block) for _ in range(resamples))


def correction(values: list[float]) -> float:
    """What the bootstrap's spread is multiplied by: blocks vary around a mean that they are part of themselves, so that
    its square is too small by block / n."""
    return math.sqrt(len(values) / (len(values) - block_of(values, BLOCK_STEPS)))


def interval_of_mean(values: list[float]) -> tuple[float, float] | None:
    """95% of the block bootstrap's means, widened as Student's quantile is for so few blocks, but no lower than the
    lowest value; None for fewer than FEWEST_STEPS values."""
    if len(values) < FEWEST_STEPS:
        return None
    means, mean = bootstrap_means(values), statistics.fmean(values)
    tail = (1 - CONFIDENCE) / 2
    blocks = round(len(values) / block_of(values, BLOCK_STEPS))
    widened = correction(values) * student_t(blocks - 1, 1) / statistics.NormalDist().inv_cdf(1 - tail)
    low, high = means[int(tail * len(means))], means[math.ceil((1 - tail) * len(means)) - 1]
    return max(min(values), mean + widened * (low - mean)), mean + widened * (high - mean)


def relative_error_of_mean(values: list[float]) -> float | None:
    """Standard error of the mean over the mean, by the block bootstrap; None where it has too few values."""
    if len(values) < FEWEST_STEPS:
        return None
    return correction(values) * statistics.pstdev(bootstrap_means(values)) / statistics.fmean(values)


def half_width(noise: Noise, n: int, m: float, comparisons: int = 1) -> float:
    """Half the interval of the difference between the means of n and m runs; m infinite: of one mean alone."""
    return student_t(noise.freedom, comparisons) * noise.sigma * math.sqrt(1 / n + 1 / m)


@functools.cache
def student_t(freedom: int, comparisons: int) -> float:
    """Two-sided quantile of Student's distribution, at CONFIDENCE for so many comparisons together."""
    from scipy.stats import t  # half a second: only where something is compared

    return float(t.ppf(1 - (1 - CONFIDENCE) / (2 * comparisons), freedom))
