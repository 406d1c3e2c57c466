"""Loss-matched speed: tokens and time until a leg has the loss that the baseline ends with.

Raw tok/s says how fast a leg runs; dropped tokens, FP8 or fewer experts may cost loss that more steps must make good:

    target    the baseline's final loss, of the repeat with the same number: same seed, same order of the data
    tokens    where the leg's curve first is at the target, between two logged points by a straight line
    time      those tokens over the run's tail-50 tok/s: training at its steady speed, without start-up and validation
    speed     the baseline's time to the target over the leg's

The curve is val/bpb where runs validate often enough to have one, else train/loss as a trailing mean over a tenth of
the logged points. With a decaying learning rate the loss falls most at the end, so a leg that is ahead there is ahead
by few tokens: a long constant stretch tells more.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from launch.results import RunResult

ENOUGH_POINTS = 5  # validations after step 0


@dataclass(frozen=True)
class Matched:
    """Where a run has the target loss; tokens is None if it never has, seconds also without a speed."""

    target: float
    tokens: float | None
    seconds: float | None


def tokens_per_step(run: RunResult) -> int:
    return run.config["train_batch_size"] * run.config["run"]["model"]["seq_len"]


def curve_metric(runs: list[RunResult]) -> str:
    """What all the runs can be matched by."""
    validated = [sum(step > 0 for step in run.series("val/bpb")[0]) for run in runs]
    return "val/bpb" if validated and min(validated) >= ENOUGH_POINTS else "train/loss"


def curve(run: RunResult, metric: str) -> tuple[list[float], list[float]]:
    """Tokens, and the loss after them; train/loss smoothed."""
    steps, values = run.series(metric)
    points = [(step * tokens_per_step(run), value) for step, value in zip(steps, values, strict=True) if step > 0]
    window = max(1, len(points) // 10) if metric == "train/loss" else 1
    smoothed = [
        statistics.fmean(value for _, value in points[max(0, end - window) : end]) for end in range(1, len(points) + 1)
    ]
    return [float(tokens) for tokens, _ in points], smoothed


def first_reached(tokens: list[float], losses: list[float], target: float) -> float | None:
    """Tokens at which a curve first is at or below the target."""
    for i, loss in enumerate(losses):
        if loss <= target:
            if i == 0:
                return tokens[i]
            share = (losses[i - 1] - target) / (losses[i - 1] - loss)
            return tokens[i - 1] + share * (tokens[i] - tokens[i - 1])
    return None


def match(run: RunResult, baseline: RunResult, metric: str, timed: bool = True) -> Matched | None:
    """`run` against the final loss of `baseline`; None where either has no curve."""
    _, goal = curve(baseline, metric)
    tokens, losses = curve(run, metric)
    if not goal or not losses:
        return None
    reached = first_reached(tokens, losses, goal[-1])
    speed = run.figure("tail50_tok_per_sec") if timed else None
    return Matched(goal[-1], reached, reached / speed if reached is not None and speed else None)
