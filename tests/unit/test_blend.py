"""Which source a sample of a blend comes from, and which of that source's samples it is."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from model.blend import BlendedSamples, seed_of_source, shares_of
from model.data import ShuffledSamples, TrainBatches

S = 3  # seq_len
WEIGHTS = [
    [1.0],
    [1.0, 1.0],
    [0.7, 0.3],
    [0.5, 0.25, 0.25],
    [1.0, 1.0, 1.0, 1.0, 1.0],
    [5.0, 1.0, 80.0, 0.1],
    [0.123456789012345, 0.876543210987654],
]


class Numbers:
    """Samples that say whose they are: S + 1 times 1000 * source + number."""

    def __init__(self, source: int) -> None:
        self.source = source

    def read(self, numbers: np.ndarray) -> np.ndarray:
        assert numbers.dtype == np.int64
        return np.repeat(1000 * self.source + numbers[:, None], S + 1, axis=1)


class Counting:
    """The tokens first, first + 1, ...: a token says where it stands."""

    def __init__(self, first: int, num_tokens: int) -> None:
        self.first, self.num_tokens = first, num_tokens

    def tokens(self, start: int, length: int) -> np.ndarray:
        return np.arange(self.first + start, self.first + start + length)


def blend(weights: list[float], seed: int = 7) -> BlendedSamples:
    return BlendedSamples([Numbers(source) for source in range(len(weights))], shares_of(weights), seed)


def test_weights_are_taken_as_the_decimals_they_are_written_as() -> None:
    assert shares_of([0.1, 0.2]) == [Fraction(1, 3), Fraction(2, 3)]
    assert shares_of([1e-9, 3.0]) == [Fraction(1, 3_000_000_001), Fraction(3_000_000_000, 3_000_000_001)]
    assert shares_of([7.0]) == [1]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("seed", [0, 1337])
def test_every_source_is_read_in_its_own_order_without_gap_or_repetition(weights: list[float], seed: int) -> None:
    located = [blend(weights, seed).locate(position) for position in range(3000)]
    for source in range(len(weights)):
        mine = [sample for found, sample in located if found == source]
        assert mine == list(range(len(mine)))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("seed", [0, 1337])
def test_at_no_point_is_a_source_further_from_its_share_than_promised(weights: list[float], seed: int) -> None:
    """Less than S - 1 samples with S sources, exactly its share with one."""
    samples, shares = blend(weights, seed), shares_of(weights)
    had = [0] * len(weights)
    for position in range(3000):
        had[samples.locate(position)[0]] += 1
        for count, share in zip(had, shares, strict=True):
            off = abs(count - (position + 1) * share)
            assert off < len(weights) - 1 or off == 0


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("start", [10**6, 2**40, 2**62])
def test_the_order_goes_on_exactly_far_into_a_run(weights: list[float], start: int) -> None:
    """A stretch in the middle: every source's samples are consecutive and begin where its share says."""
    samples, shares = blend(weights), shares_of(weights)
    located = [samples.locate(position) for position in range(start, start + 500)]
    for source, share in enumerate(shares):
        mine = [sample for found, sample in located if found == source]
        assert mine == list(range(mine[0], mine[0] + len(mine))) if mine else share * 500 < len(weights)
        assert not mine or abs(mine[0] - start * share) < len(weights) + 1


def test_equal_sources_take_turns_in_either_order() -> None:
    """A fixed pattern would send one source to the even ranks and the other to the odd ones."""
    located = [blend([1.0, 1.0]).locate(position)[0] for position in range(2000)]
    pairs = list(zip(located[::2], located[1::2], strict=True))
    assert set(pairs) == {(0, 1), (1, 0)}
    assert 430 < pairs.count((0, 1)) < 570  # 500 expected, standard deviation 16


def test_a_rare_source_comes_up_anywhere_in_its_stratum() -> None:
    places = [place % 10 for place in range(10_000) if blend([0.9, 0.1]).locate(place)[0] == 1]
    assert len(places) == 1000
    assert all(60 < places.count(place) < 140 for place in range(10))  # 100 expected, standard deviation 9


def test_the_order_of_a_blend_never_changes() -> None:
    """Golden values: a run that resumes with a newer moelab must go on with the data that it has not seen."""
    samples = blend([0.7, 0.2, 0.1], seed=42)
    sources, numbers = zip(*map(samples.locate, range(12)), strict=True)
    assert sources == (0, 0, 0, 1, 2, 0, 0, 0, 0, 1, 0, 0)
    assert numbers == (0, 1, 2, 0, 0, 3, 4, 5, 6, 1, 7, 8)
    assert samples.locate(2**40) == (0, 769658139443)
    assert [seed_of_source(42, source) for source in range(3)] == [42, 17532488217563185893, 8238092213399105094]


def test_the_order_depends_on_the_seed() -> None:
    orders = {tuple(blend([0.5, 0.3, 0.2], seed).locate(n)[0] for n in range(50)) for seed in range(5)}
    assert len(orders) == 5


def test_samples_come_back_in_the_order_they_were_asked_for() -> None:
    samples = blend([0.5, 0.3, 0.2])
    numbers = np.array([40, 3, 17, 4, 0, 2**61])
    expected = [1000 * source + sample for source, sample in map(samples.locate, numbers.tolist())]
    rows = samples.read(numbers)
    assert rows.shape == (6, S + 1)
    assert rows[:, 0].tolist() == rows[:, S].tolist() == expected


def test_a_blend_of_one_source_is_that_source_alone() -> None:
    alone = ShuffledSamples(Counting(0, 100), seq_len=S, seed=seed_of_source(5, 0))
    numbers = np.arange(200)
    assert BlendedSamples([alone], shares_of([3.0]), 5).read(numbers).tolist() == alone.read(numbers).tolist()
    assert alone.seed == 5


def test_sources_of_one_size_are_shuffled_in_different_orders() -> None:
    orders = [
        ShuffledSamples(Counting(0, 100), seq_len=S, seed=seed_of_source(5, source)).read(np.arange(33)).tolist()
        for source in range(3)
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_what_all_ranks_read_of_a_blend_does_not_depend_on_their_number(world_size: int) -> None:
    parts = [ShuffledSamples(Counting(1000 * n, 50 * (n + 1)), seq_len=S, seed=seed_of_source(0, n)) for n in range(3)]
    samples = BlendedSamples(parts, shares_of([0.5, 0.3, 0.2]), 0)
    ranks = [
        TrainBatches(samples, micro_batch_size=8 // world_size, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    for first in (0, 8, 160):  # from anywhere, as after a resume
        rows = [row for each in ranks for row in each.micro_batch(first)[0].tolist()]
        assert rows == samples.read(np.arange(first, first + 8))[:, :-1].tolist()
