"""Which source sample i of a mixture comes from, and which of that source's samples it is, in O(1) time.

The schedule goes in blocks of `BLOCK` samples. Of a source with weight w (weights sum to 1) each block has
floor(BLOCK w) samples, always in the same places, and perhaps one more: the places that are left over, fewer than there
are sources, go to other sources in each block. A source that gets one in two blocks running gets the same one. So *any*
`BLOCK` samples running, wherever they begin, hold floor(BLOCK w) or ceil(BLOCK w) of a source.

Who gets a place that is left over repeats after `CYCLE` blocks: weights count in parts of BLOCK x CYCLE, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import floor

import numpy as np
import numpy.typing as npt

BLOCK = 1000
CYCLE = 1000
_STRIDE = 619
"""Coprime to `CYCLE`, and nearly its golden section: multiples of it, taken modulo CYCLE, are spread evenly."""


Table = npt.NDArray[np.int16]


@dataclass(frozen=True, eq=False)
class Mixture:
    """A schedule, as tables; made by `mixture`. Sources are numbers from 0."""

    shares: tuple[int, ...]
    """Samples of each source in a cycle."""
    places: tuple[int, ...]
    """[BLOCK]: the source that always has a place of the block, or -1 - j for the j-th place left over."""
    before: Table
    """[BLOCK, sources]: how many of the places before one always are the source's."""
    spare: Table
    """[CYCLE, left over]: the source that has each place left over, by block of the first cycle."""
    earlier: Table
    """[CYCLE, sources]: how many places left over the source has in the blocks of the cycle before one."""
    turns: tuple[tuple[tuple[int, ...], int], ...]
    """[left over]: from one cycle to the next, each place's sources go to another, so that those which have one in the
    last block and in the first keep theirs. The places that they come round to, and where in these each place is."""

    def __call__(self, sample: int) -> tuple[int, int]:
        """(source, number among the source's samples) of sample `sample` of the mixture, all from 0."""
        if len(self.shares) == 1:
            return 0, sample
        cycle, block, place = _position(sample)
        source = self.places[place]
        if source < 0:
            source = int(self.spare[block, self._turned(-1 - source, -cycle)])
        return source, self.count(source, sample)

    def count(self, source: int, samples: int) -> int:
        """How many of the first `samples` samples are of a source."""
        cycle, block, place = _position(samples)
        share = self.shares[source]
        count = cycle * share + block * (share // CYCLE)
        count += int(self.before[place, source]) + int(self.earlier[block, source])
        if source in (spare := self.spare[block].tolist()):
            count += -1 - self._turned(spare.index(source), cycle) in self.places[:place]
        return count

    def counts(self, samples: int) -> tuple[int, ...]:
        """How many of the first `samples` samples are of each source."""
        return tuple(self.count(source, samples) for source in range(len(self.shares)))

    def _turned(self, left_over: int, cycles: int) -> int:
        """The place left over that has the sources of this one so many cycles later."""
        places, at = self.turns[left_over]
        return places[(at + cycles) % len(places)]


@lru_cache(maxsize=64)
def mixture(weights: tuple[float, ...]) -> Mixture:
    """The schedule of sources with these weights, finite and above 0; they need not sum to 1.

    Shares are rounded to parts of BLOCK x CYCLE, none to nothing.
    """
    assert 0 < len(weights) < BLOCK and all(weight > 0 for weight in weights)
    shares = _apportioned([Fraction(weight) for weight in weights], BLOCK * CYCLE)
    always, sometimes = zip(*(divmod(share, CYCLE) for share in shares), strict=True)
    left_over = BLOCK - sum(always)
    places = _spread([*always, *[1] * left_over])
    places = [each if each < len(weights) else len(weights) - 1 - each for each in places]
    chosen = _chosen(sometimes, left_over)
    has = np.zeros((CYCLE, len(weights)), np.bool_)
    np.put_along_axis(has, chosen, True, axis=1)
    spare = _settled(chosen, has)
    return Mixture(
        shares=tuple(shares),
        places=tuple(places),
        before=_counts_before(np.array(places)[:, np.newaxis] == np.arange(len(weights))),
        spare=spare,
        earlier=_counts_before(has),
        turns=_rounds(_turn(spare[0].tolist(), spare[-1].tolist())),
    )


def _position(sample: int) -> tuple[int, int, int]:
    blocks, place = divmod(sample, BLOCK)
    return *divmod(blocks, CYCLE), place


def _apportioned(weights: Sequence[Fraction], total: int) -> list[int]:
    """Whole numbers that sum to `total`, in the proportions of `weights`, by largest remainders; none is 0."""
    scale = total / sum(weights)
    shares = [max(1, floor(weight * scale)) for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda k: shares[k] - weights[k] * scale)
    for k in by_remainder[: max(0, total - sum(shares))]:
        shares[k] += 1
    shares[shares.index(max(shares))] -= max(0, sum(shares) - total)  # what raised others to 1
    return shares


def _spread(counts: Sequence[int]) -> list[int]:
    """Each k counts[k] times, at distances as even as the others allow."""
    # Fractions whose terms are so small are equal, and less, just where they are so as floats.
    turns = [((2 * turn + 1) / (2 * count), k) for k, count in enumerate(counts) for turn in range(count)]
    return [k for _, k in sorted(turns)]


def _chosen(shares: Sequence[int], count: int) -> Table:
    """[CYCLE, count]: the sources of each block, in their order. They are laid end to end, each as long as its share
    (below CYCLE; all together `count` CYCLEs), and those are chosen that contain the block's offset + a multiple of
    CYCLE (systematic sampling, Madow 1949). Of all CYCLE offsets a source is chosen by as many as its share says.
    """
    offsets = np.arange(CYCLE) * _STRIDE % CYCLE
    marks = offsets[:, np.newaxis] + CYCLE * np.arange(count)
    chosen: Table = np.searchsorted(np.cumsum(shares), marks, side="right").astype(np.int16)
    return chosen


def _settled(chosen: Table, has: npt.NDArray[np.bool_]) -> Table:
    """Each block's sources reordered, so that one which is in two blocks running has the same place in both. `has`,
    [CYCLE, sources]: whether a block has a source.
    """
    settled: Table = chosen.copy()
    for block in range(1, CYCLE):
        last, now = settled[block - 1], chosen[block]
        settled[block] = last
        settled[block, ~has[block, last]] = now[~has[block - 1, now]]
    return settled


def _turn(first: Sequence[int], last: Sequence[int]) -> tuple[int, ...]:
    """For each place of `first`, one of `last`: that of the same source where there is one."""
    others = iter([place for place, source in enumerate(last) if source not in first])
    return tuple(last.index(source) if source in last else next(others) for source in first)


def _rounds(permutation: Sequence[int]) -> tuple[tuple[tuple[int, ...], int], ...]:
    """The cycle of each place, and where in it the place is."""
    found: dict[int, tuple[tuple[int, ...], int]] = {}
    for first in range(len(permutation)):
        if first not in found:
            cycle = [first]
            while (after := permutation[cycle[-1]]) != first:
                cycle.append(after)
            places = tuple(cycle)
            found |= {place: (places, at) for at, place in enumerate(places)}
    return tuple(found[place] for place in range(len(permutation)))


def _counts_before(has: npt.NDArray[np.bool_]) -> Table:
    """[rows, sources]: how many of the rows before one have the source."""
    counts: Table = np.cumsum(has, axis=0, dtype=np.int16) - has
    return counts
