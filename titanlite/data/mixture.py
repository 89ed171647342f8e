"""Which source sample i of a mixture comes from, and which of that source's samples it is, in O(1) time.

The schedule goes in blocks of `BLOCK` samples. Of a source with weight w (weights sum to 1) each block has
floor(BLOCK w) samples, always in the same places, and perhaps one more: the places that are left over, fewer than there
are sources, go to other sources in each block. A source that gets one in two blocks running gets the same one. So *any*
`BLOCK` samples running, wherever they begin, hold floor(BLOCK w) or ceil(BLOCK w) of a source.

Who gets a place that is left over repeats after `CYCLE` blocks: weights count in parts of BLOCK x CYCLE, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from math import floor

BLOCK = 1000
CYCLE = 1000
_STRIDE = 619
"""Coprime to `CYCLE`, and nearly its golden section: multiples of it, taken modulo CYCLE, are spread evenly."""


@dataclass(frozen=True)
class Mixture:
    """A schedule, as tables; made by `mixture`. Sources are numbers from 0."""

    shares: tuple[int, ...]
    """Samples of each source in a cycle."""
    places: tuple[int, ...]
    """[BLOCK]: the source that always has a place of the block, or -1 - j for the j-th place left over."""
    before: tuple[tuple[int, ...], ...]
    """[sources][BLOCK]: how many of the places before one always are the source's."""
    spare: tuple[tuple[int, ...], ...]
    """[CYCLE][left over]: the source that has each place left over, by block of the first cycle."""
    earlier: tuple[tuple[int, ...], ...]
    """[sources][CYCLE]: how many places left over the source has in the blocks of the cycle before one."""
    turn: tuple[int, ...]
    """[left over]: from one cycle to the next, the place that takes each one's sources, so that those which have one
    in the last block and in the first keep theirs."""

    def __call__(self, sample: int) -> tuple[int, int]:
        """(source, number among the source's samples) of sample `sample` of the mixture, all from 0."""
        cycle, block, place = _position(sample)
        source = self.places[place]
        if source < 0:
            source = self._spares(cycle, block)[-1 - source]
        return source, self._before(cycle, block, place, source)

    def counts(self, samples: int) -> tuple[int, ...]:
        """How many of the first `samples` samples are of each source."""
        position = _position(samples)
        return tuple(self._before(*position, source) for source in range(len(self.shares)))

    def _before(self, cycle: int, block: int, place: int, source: int) -> int:
        share = self.shares[source]
        count = cycle * share + block * (share // CYCLE) + self.before[source][place] + self.earlier[source][block]
        spares = self._spares(cycle, block)
        if source in spares:
            count += self.places.index(-1 - spares.index(source)) < place
        return count

    def _spares(self, cycle: int, block: int) -> list[int]:
        """The sources of the places left over."""
        spares = list(self.spare[block])
        for place, source in zip(_repeated(self.turn, cycle), self.spare[block], strict=True):
            spares[place] = source
        return spares


@lru_cache(maxsize=64)
def mixture(weights: tuple[float, ...]) -> Mixture:
    """The schedule of sources with these weights, finite and above 0; they need not sum to 1.

    Shares are rounded to parts of BLOCK x CYCLE, none to nothing.
    """
    assert 0 < len(weights) < BLOCK and all(weight > 0 for weight in weights)
    sources = range(len(weights))
    shares = _apportioned([Fraction(weight) for weight in weights], BLOCK * CYCLE)
    always, sometimes = zip(*(divmod(share, CYCLE) for share in shares), strict=True)
    left_over = BLOCK - sum(always)
    places = _spread([*always, *[1] * left_over])
    places = [each if each < len(weights) else len(weights) - 1 - each for each in places]
    spare = list(_settled([_chosen(sometimes, block * _STRIDE % CYCLE) for block in range(CYCLE)]))
    return Mixture(
        shares=tuple(shares),
        places=tuple(places),
        before=tuple(_counts_before([each == source for each in places]) for source in sources),
        spare=tuple(map(tuple, spare)),
        earlier=tuple(_counts_before([source in block for block in spare]) for source in sources),
        turn=_turn(spare[0], spare[-1]),
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
    turns = [(Fraction(2 * turn + 1, 2 * count), k) for k, count in enumerate(counts) for turn in range(count)]
    return [k for _, k in sorted(turns)]


def _chosen(shares: Sequence[int], offset: int) -> list[int]:
    """Sources laid end to end, each as long as its share (below CYCLE): those that contain `offset` + a multiple of
    CYCLE (systematic sampling, Madow 1949). Of all CYCLE offsets a source is chosen by as many as its share says.
    """
    ends = list(accumulate(shares))
    marks = range(offset, ends[-1], CYCLE)
    return [next(k for k, end in enumerate(ends) if mark < end) for mark in marks]


def _settled(blocks: Sequence[list[int]]) -> Iterator[list[int]]:
    """Each block's sources reordered, so that one which is in two blocks running has the same place in both."""
    last: list[int] = []
    for block in blocks:
        fresh = iter([source for source in block if source not in last])
        last = [each if each in block else next(fresh) for each in last] if last else block
        yield last


def _turn(first: Sequence[int], last: Sequence[int]) -> tuple[int, ...]:
    """For each place of `first`, one of `last`: that of the same source where there is one."""
    others = iter([place for place, source in enumerate(last) if source not in first])
    return tuple(last.index(source) if source in last else next(others) for source in first)


def _repeated(permutation: Sequence[int], times: int) -> list[int]:
    """Where `times` applications of `permutation` take each place."""
    result, power = list(range(len(permutation))), permutation
    while times:
        if times & 1:
            result = [power[place] for place in result]
        power, times = [power[place] for place in power], times >> 1
    return result


def _counts_before(flags: Sequence[bool]) -> tuple[int, ...]:
    return tuple(accumulate(flags, initial=0))[:-1]
