"""Tokens and time to the baseline's final loss, on curves whose answer is known."""

from pathlib import Path

import pytest

from launch.loss_matched import curve, curve_metric, first_reached, match
from launch.results import RunResult

STEP_TOKENS = 8 * 32


def run(losses: list[float], tok_per_sec: float | None = 1000.0, bits: list[float] | None = None) -> RunResult:
    """Train losses of steps 1, 2, ...; bits per byte of steps 0, 2, 4, ..."""
    steps = [{"step": i + 1, "train/loss": loss} for i, loss in enumerate(losses)]
    for i, value in enumerate(bits or []):
        steps.append({"step": 2 * i, "val/bpb": value})
    return RunResult(
        "run",
        Path("nowhere"),
        config={"train_batch_size": 8, "run": {"model": {"seq_len": 32}}},
        summary={"tail50_tok_per_sec": tok_per_sec} if tok_per_sec else {},
        steps=sorted(steps, key=lambda line: line["step"]),
    )


def test_a_leg_that_learns_twice_as_fast_per_token_needs_half_the_tokens_and_the_time_follows_its_speed() -> None:
    slow = run([10.0 - step / 2 for step in range(1, 9)])
    fast = run([10.0 - step for step in range(1, 9)], tok_per_sec=500.0)
    base, leg = match(slow, slow, "train/loss"), match(fast, slow, "train/loss")
    assert base is not None
    assert leg is not None
    assert (base.target, base.tokens, base.seconds) == (6.0, 8 * STEP_TOKENS, 8 * STEP_TOKENS / 1000)
    assert (leg.tokens, leg.seconds) == (4 * STEP_TOKENS, 4 * STEP_TOKENS / 500)


def test_between_two_points_the_curve_is_a_straight_line() -> None:
    assert first_reached([100.0, 200.0], [4.0, 2.0], 3.5) == 125.0
    assert first_reached([100.0, 200.0], [4.0, 2.0], 4.0) == 100.0
    assert first_reached([100.0, 200.0, 300.0], [4.0, 2.0, 5.0], 2.0) == 200.0  # the first time counts


def test_a_loss_that_is_never_reached_has_no_tokens_and_no_time() -> None:
    matched = match(run([5.0, 4.0]), run([4.0, 3.0]), "train/loss")
    assert matched is not None
    assert (matched.target, matched.tokens, matched.seconds) == (3.0, None, None)


def test_without_a_speed_or_side_by_side_there_are_tokens_but_no_time() -> None:
    for leg, timed in ((run([4.0, 3.0], tok_per_sec=None), True), (run([4.0, 3.0]), False)):
        matched = match(leg, run([4.0, 3.0]), "train/loss", timed)
        assert matched is not None
        assert (matched.tokens, matched.seconds) == (2 * STEP_TOKENS, None)


def test_a_run_without_a_curve_is_not_matched() -> None:
    assert match(run([]), run([4.0]), "train/loss") is None
    assert match(run([4.0]), run([]), "train/loss") is None


def test_the_training_loss_is_a_trailing_mean_over_a_tenth_of_the_points() -> None:
    tokens, losses = curve(run([float(20 - i) for i in range(20)]), "train/loss")
    assert losses[0] == 20.0
    assert losses[-1] == 1.5  # of 2 and 1
    assert tokens[-1] == 20 * STEP_TOKENS


@pytest.mark.parametrize(("points", "metric"), [(6, "val/bpb"), (5, "train/loss")])
def test_validation_is_the_curve_where_it_has_five_points_after_step_0(points: int, metric: str) -> None:
    runs = [run([3.0] * 12, bits=[2.0] * 8), run([3.0] * 12, bits=[2.0] * points)]
    assert curve_metric(runs) == metric


def test_the_validation_curve_is_not_smoothed() -> None:
    bits = [40.0 - i for i in range(30)]
    assert curve(run([1.0] * 60, bits=bits), "val/bpb") == ([2.0 * i * STEP_TOKENS for i in range(1, 30)], bits[1:])


def test_tokens_are_those_of_the_legs_own_batch() -> None:
    small, large = run([5.0, 4.0, 3.0]), run([5.0, 4.0, 3.0])
    large.config["train_batch_size"] = 16
    matched = match(large, small, "train/loss")
    assert matched is not None
    assert matched.tokens == 2 * 3 * STEP_TOKENS


def test_a_curve_that_rises_again_counts_where_it_first_was_low_enough() -> None:
    """Also the baseline's own: noise may take it to its final loss before its end."""
    noisy = run([5.0, 3.0, 4.0, 3.5])
    matched = match(noisy, noisy, "train/loss")
    assert matched is not None
    assert matched.tokens == 1.75 * STEP_TOKENS
