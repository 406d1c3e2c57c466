"""Several sources in one order of samples: which source each sample comes from, and which of that source's it is.

With the shares 1/4 for A and 3/4 for B the positions 0, 1, 2 ... fall into strata of four. The rarer source has one
place in each stratum, drawn by lot; the other source has the places that are left:

    stratum      0           1           2
    position     0  1  2  3  4  5  6  7  8  9 10 11
    source       B  B  A  B  A  B  B  B  B  B  B  A
    its sample   0  1  0  2  1  3  4  5  6  7  8  2

Three sources are two such splits: the rarest against the others, then the positions of the others, counted 0, 1, 2 ...
again. All is arithmetic on one position, without a table, so a run continues anywhere in its data at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from model.data import Samples, hash64

_KEYS_OF_LOTS = 2**63  # hashed with the seed; the epochs that `permute` hashes with it stay below


def shares_of(weights: Sequence[float]) -> list[Fraction]:
    """Weights over their sum, exactly, each taken as the decimal number that it was written as: 0.1 is a tenth."""
    exact = [Fraction(repr(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]


def seed_of_source(seed: int, source: int) -> int:
    """What a source shuffles with: the first with the run's own seed, as when alone; the others with hashes of it."""
    return seed if source == 0 else hash64(seed, source)


class BlendedSamples:
    """Samples of several sources, each source in its own order 0, 1, 2 ... and in proportion to its share.

    A split gives the rarest of the remaining sources the fraction a/b <= 1/2 of the remaining positions. Stratum j is
    all positions n with floor(n a/b) = j, and holds sample j of that source. So ahead of position n the source has had
    floor(n a/b) samples or one more: less than one away from its share. Over all splits, with S >= 2 sources, the
    samples that a source has had are less than S - 1 away from its share of those consumed.
    """

    def __init__(self, sources: Sequence[Samples], shares: Sequence[Fraction], seed: int) -> None:
        assert len(sources) == len(shares)
        assert sum(shares) == 1
        self.sources = sources
        *rarer, self._commonest = sorted(range(len(shares)), key=lambda source: shares[source])
        self._splits: list[tuple[int, int, int, int]] = []  # source, a, b, key of its lots
        left = Fraction(1)
        for number, source in enumerate(rarer):
            fraction = shares[source] / left
            key = hash64(seed, _KEYS_OF_LOTS + number)
            self._splits.append((source, fraction.numerator, fraction.denominator, key))
            left -= shares[source]

    def locate(self, position: int) -> tuple[int, int]:
        """(source, which of its samples) of the sample at `position`, in Python's integers, which do not overflow."""
        for source, a, b, key in self._splits:
            stratum = position * a // b
            begin, end = -(-stratum * b // a), -(-(stratum + 1) * b // a)
            place = begin + hash64(key, stratum) % (end - begin)
            if place == position:
                return source, stratum
            position -= stratum + (place < position)
        return self._commonest, position

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """int64 [len(numbers), seq_len + 1]: the tokens of these samples."""
        source, sample = np.array([self.locate(int(number)) for number in numbers]).T
        by_source = np.concatenate([self.sources[each].read(sample[source == each]) for each in np.unique(source)])
        return by_source[np.argsort(np.argsort(source, kind="stable"))]
