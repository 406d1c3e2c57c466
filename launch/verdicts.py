"""A gate and two legs become a verdict: better, worse, not distinguishable or invalid; and whether the gate is passed.

The verdict says whether a leg differs from the baseline by more than noise (launch/noise.py). The gate says whether the
bound that was written before the first run is kept: `at_least` and `at_most` by the whole interval, `no_worse_than` by
the mean, since its bound allows for the noise itself. Without repeats the noise is not known, and nothing is decided.

The sigma of a bound is the noise of the other legs' runs: repeats of a leg that lie far apart would widen its own
bound, and of two repeats one might be as bad as can be.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Literal

from launch.metrics import Bound, Gate, Metric
from launch.noise import Noise, half_width, pooled_noise

Outcome = Literal["better", "worse", "not distinguishable", "invalid"]
GateState = Literal["passed", "failed", "undecided"]


WILD = 2.0  # times the noise of the other legs: more than that, and two legs do not share it


@dataclass(frozen=True)
class Sample:
    """What one run measured: the value of a metric, the seed, and the relative error within the run, if known."""

    value: float
    seed: int
    error_within: float | None = None


@dataclass(frozen=True)
class Comparison:
    """A leg's mean beside the baseline's. Ratios (speed, memory) and their intervals are shares: 0.03 is 3% more.
    Quality is in its own unit. low and high are None where the noise is not known."""

    metric: Metric
    mean: float
    baseline_mean: float
    difference: float
    low: float | None
    high: float | None
    sigma: float | None  # of one run, as a bound means it

    @property
    def percent(self) -> float | None:
        """Of the baseline."""
        if self.metric.is_ratio:
            return 100 * self.difference
        return 100 * self.difference / self.baseline_mean if self.baseline_mean else None


@dataclass(frozen=True)
class Verdict:
    """One leg at one gate; outcome and gate state are None while runs of it are still to come."""

    gate: Gate
    leg: str
    outcome: Outcome | None
    state: GateState | None
    reason: str
    comparison: Comparison | None = None


def means_by_seed(metric: Metric, samples: list[Sample]) -> list[float]:
    """The values that count as independent, on the scale on which they are compared."""
    scaled = [math.log(each.value) if metric.is_ratio else each.value for each in samples]
    if metric.kind != "quality":
        return scaled
    seeds = dict.fromkeys(each.seed for each in samples)
    return [statistics.fmean(x for x, each in zip(scaled, samples, strict=True) if each.seed == seed) for seed in seeds]


def noise_of(metric: Metric, legs: dict[str, list[Sample]], leg: str, baseline: str) -> Noise | None:
    """Noise of one run on the scale of comparison, as launch/noise.py says."""
    values = {name: means_by_seed(metric, samples) for name, samples in legs.items()}
    noise = pooled_noise(list(values.values()))
    own = pooled_noise([values[leg], values[baseline]] if leg != baseline else [values[leg]])
    others = pooled_noise([each for name, each in values.items() if name not in (leg, baseline)])
    if own is not None and others is not None and own.sigma > WILD * others.sigma:
        noise = own
    return no_less_than_within(noise, metric, [*legs[leg], *legs[baseline]])


def noise_of_bound(metric: Metric, legs: dict[str, list[Sample]], leg: str, baseline: str) -> Noise | None:
    """Noise of one run of the other legs, the baseline among them: the sigma of the leg's bound."""
    noise = pooled_noise([means_by_seed(metric, samples) for name, samples in legs.items() if name != leg])
    return no_less_than_within(noise, metric, legs[baseline])


def noise_floor(metric: Metric, legs: dict[str, list[Sample]]) -> Noise | None:
    """Noise of one run of any leg: what a report tells of the suite as a whole."""
    pooled = pooled_noise([means_by_seed(metric, samples) for samples in legs.values()])
    return no_less_than_within(pooled, metric, [sample for samples in legs.values() for sample in samples])


def no_less_than_within(noise: Noise | None, metric: Metric, samples: list[Sample]) -> Noise | None:
    """The noise, or what the times of steps within these runs say if that is more."""
    errors = [each.error_within for each in samples if each.error_within is not None]
    if noise is None or not metric.from_step_times or not errors:
        return noise
    return Noise(max(noise.sigma, math.sqrt(statistics.fmean(error**2 for error in errors))), noise.freedom)


def compare(metric: Metric, legs: dict[str, list[Sample]], leg: str, baseline: str) -> Comparison:
    """`legs` holds the samples of all legs of the suite: they share the noise. Those of `leg` and `baseline` exist."""
    ours, base = means_by_seed(metric, legs[leg]), means_by_seed(metric, legs[baseline])
    noise, floor = noise_of(metric, legs, leg, baseline), noise_of_bound(metric, legs, leg, baseline)
    difference = statistics.fmean(ours) - statistics.fmean(base)
    half = None
    if noise is not None:
        half = half_width(noise, len(ours), len(base), comparisons=max(1, sum(map(bool, legs.values())) - 1))
    back = math.exp if metric.is_ratio else float
    as_share = math.expm1 if metric.is_ratio else float
    return Comparison(
        metric=metric,
        mean=back(statistics.fmean(ours)),
        baseline_mean=back(statistics.fmean(base)),
        difference=as_share(difference),
        low=as_share(difference - half) if half is not None else None,
        high=as_share(difference + half) if half is not None else None,
        sigma=as_share(floor.sigma) if floor is not None else None,
    )


def outcome_of(comparison: Comparison) -> Outcome:
    """Better or worse only if the whole interval lies on one side of no difference."""
    if comparison.low is None or comparison.high is None or comparison.low <= 0 <= comparison.high:
        return "not distinguishable"
    return "better" if (comparison.low > 0) == comparison.metric.higher_is_better else "worse"


def state_of(gate: Gate, comparison: Comparison) -> GateState:
    """Whether the bound is kept; undecided where the interval holds it, or where the noise is not known."""
    limit = limit_of(gate.bound, comparison)
    if limit is None or comparison.low is None or comparison.high is None:
        return "undecided"
    if gate.rule == "no_worse_than":
        kept = comparison.difference >= limit if gate.metric.higher_is_better else comparison.difference <= limit
        return "passed" if kept else "failed"
    inner, outer = (comparison.low, comparison.high) if gate.rule == "at_least" else (-comparison.high, -comparison.low)
    limit = limit if gate.rule == "at_least" else -limit
    return "passed" if inner >= limit else "failed" if outer < limit else "undecided"


def limit_of(bound: Bound, comparison: Comparison) -> float | None:
    """The bound as a difference to the baseline, in the unit of `comparison.difference`."""
    if bound.sigmas and comparison.sigma is None:
        return None
    sigma = bound.sigmas * (comparison.sigma or 0.0)
    base = comparison.baseline_mean
    if comparison.metric.is_ratio:
        return bound.factor * (1 + sigma) + bound.offset / base - 1
    return (bound.factor - 1) * base + sigma + bound.offset


def judge(gate: Gate, legs: dict[str, list[Sample]], leg: str, baseline: str, invalid: str | None) -> Verdict:
    """The verdict on a leg all of whose runs have ended. `invalid` says why it cannot be compared, if so."""
    if invalid is not None:
        return Verdict(gate, leg, "invalid", "failed", invalid)
    comparison = compare(gate.metric, legs, leg, baseline)
    reason = ""
    if comparison.low is None:
        seeds = " with seeds of their own" if gate.metric.kind == "quality" else ""
        reason = f"no repeats{seeds}: the noise is not known"
    return Verdict(gate, leg, outcome_of(comparison), state_of(gate, comparison), reason, comparison)
