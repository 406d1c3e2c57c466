"""Interleaved rounds: who is measured when, and what the samples of several rounds say. Plain arithmetic.

A round measures everything once. Ratios of two things are taken within a round, so that what slows the machine for a
while slows both.
"""

from __future__ import annotations

import statistics


def order_of_round(number: int, count: int) -> list[int]:
    """The order of `count` things in a round, after Williams (1949).

    Over `count` rounds each is in every place once and, if `count` is even, follows every other exactly once; if it is
    odd, twice in twice as many rounds.
    """
    zigzag = [(place + 1) // 2 if place % 2 else (count - place // 2) % count for place in range(count)]
    order = [(each + number) % count for each in zigzag]
    return order[::-1] if count % 2 and number % 2 else order


def interquartile_range(values: list[float]) -> float:
    """Distance of the quartiles, interpolated between the values; at least two of them."""
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
