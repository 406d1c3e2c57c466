"""How far a difference between legs can be trusted: noise of a run from its repeats, interval of a mean.

A figure of a run has a value x. Figures compared as ratios are taken as logarithms, so that noise is a share of the
value and a leg twice as fast may have twice the noise in tok/s; the others as they are.

    between runs    sigma^2 = sum over legs and repeats of (x - mean of the leg)^2 / sum over legs of (repeats - 1)
                    pooled over the legs of the suite, since two repeats of one leg alone say very little; over leg and
                    baseline alone where they are more than twice as noisy as the others, lest these hide a wild leg
    within a run    standard error of the mean time of a step, by a moving-block bootstrap of the last 50 steps: steps
                    in a row are alike, so blocks of them are drawn, not single ones (Kuensch 1989, Ann. Statist. 17)

    noise           the larger of these: repeats that agree by chance are no more exact than their own steps
    interval        difference of the two means +- t * noise * sqrt(1/n + 1/m), t of Student's distribution; 95% for all
                    legs of a gate together (Bonferroni): of twenty legs that change nothing, one would win otherwise
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


def bootstrap_means(values: list[float], block: int = BLOCK_STEPS, resamples: int = RESAMPLES) -> list[float]:
    """Sorted means of resamples of a series, drawn in blocks of neighbours; the same ones every time."""
    block = max(1, min(block, len(values) // 4))
    draws = random.Random(0)
    sums = [sum(values[start : start + block]) for start in range(len(values) - block + 1)]
    blocks = max(1, round(len(values) / block))
    return sorted(sum(draws.choices(sums, k=blocks)) / (blocks * block) for _ in range(resamples))


def interval_of_mean(values: list[float]) -> tuple[float, float] | None:
    """95% of the block bootstrap's means; None for fewer than 8 values, whose blocks would be single steps."""
    if len(values) < 8:
        return None
    means = bootstrap_means(values)
    tail = (1 - CONFIDENCE) / 2
    return means[int(tail * len(means))], means[math.ceil((1 - tail) * len(means)) - 1]


def relative_error_of_mean(values: list[float]) -> float | None:
    """Standard error of the mean over the mean, by the block bootstrap; None where it has too few values."""
    if len(values) < 8:
        return None
    means = bootstrap_means(values)
    return statistics.pstdev(means) / statistics.fmean(means)


def half_width(noise: Noise, n: int, m: float, comparisons: int = 1) -> float:
    """Half the interval of the difference between the means of n and m runs; m infinite: of one mean alone."""
    return student_t(noise.freedom, comparisons) * noise.sigma * math.sqrt(1 / n + 1 / m)


@functools.cache
def student_t(freedom: int, comparisons: int) -> float:
    """Two-sided quantile of Student's distribution, at CONFIDENCE for so many comparisons together."""
    from scipy.stats import t  # half a second: only where something is compared

    return float(t.ppf(1 - (1 - CONFIDENCE) / (2 * comparisons), freedom))
