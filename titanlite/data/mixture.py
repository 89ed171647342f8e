"""Which source each sample of a run comes from, and which of that source's samples it is, without a walk to it.

Samples of a mixture go in blocks of `BLOCK`. Of a source with weight w (weights sum to 1) each has floor(BLOCK w),
always in the same places, and perhaps one more: the spare places, fewer than there are sources, go to other sources in
each block. A source that gets one in two blocks running gets the same one. So *any* `BLOCK` samples running, wherever
they begin, hold floor(BLOCK w) or ceil(BLOCK w) of a source. Who gets a spare place repeats after `CYCLE` blocks:
weights count in parts of BLOCK x CYCLE, exactly.

A run is a chain of mixtures: one ends where its stage does, or where a source has been read as often as it may be. All
of it follows from weights and sizes: nothing is saved. Samples, sources and their samples are counted from 0.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
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
Permutation = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Mixture:
    """Made by `build_mixture`."""

    shares: tuple[int, ...]
    """Samples of each source in a cycle."""
    places: tuple[int, ...]
    """[BLOCK]: the source that always has a place of the block, or -1 - j for the j-th spare place."""
    before: Table
    """[BLOCK, sources]: how many of the places before one always are the source's."""
    spare: Table
    """[CYCLE, spare places]: the source that has each, by block of the first cycle."""
    earlier: Table
    """[CYCLE, sources]: how many spare places the source has in the blocks of the cycle before one."""
    turn: Permutation
    """[spare places]: the place that the sources of each go to from one cycle to the next."""

    def __call__(self, sample: int) -> tuple[int, int]:
        """(source, number among the source's samples) of sample `sample` of the mixture."""
        if len(self.shares) == 1:
            return 0, sample
        cycle, block, place = _position(sample)
        source = self.places[place]
        if source < 0:
            source = int(self.spare[block, _power(np.argsort(self.turn), cycle)[-1 - source]])
        return source, self.count(source, sample)

    def count(self, source: int, samples: int) -> int:
        """How many of the first `samples` samples are of a source."""
        cycle, block, place = _position(samples)
        share = self.shares[source]
        count = cycle * share + block * (share // CYCLE)
        count += int(self.before[place, source]) + int(self.earlier[block, source])
        if source in (spare := self.spare[block].tolist()):
            count += -1 - _power(self.turn, cycle)[spare.index(source)] in self.places[:place]
        return count

    def counts(self, samples: int) -> tuple[int, ...]:
        """How many of the first `samples` samples are of each source."""
        return tuple(self.count(source, samples) for source in range(len(self.shares)))


@lru_cache(maxsize=64)
def build_mixture(weights: tuple[float, ...]) -> Mixture:
    """The mixture of sources with these weights, finite and above 0; they need not sum to 1.

    Shares are rounded to parts of BLOCK x CYCLE, none to nothing.
    """
    sources = len(weights)
    assert 0 < sources < BLOCK and all(weight > 0 for weight in weights)
    shares = _apportion([Fraction(weight) for weight in weights], BLOCK * CYCLE)
    always, sometimes = zip(*(divmod(share, CYCLE) for share in shares), strict=True)
    places = _spread([*always, *[1] * (BLOCK - sum(always))])
    places = [each if each < sources else sources - 1 - each for each in places]
    spare = _assign_spare_places(sometimes)
    return Mixture(
        shares=tuple(shares),
        places=tuple(places),
        before=_counts_before(np.array(places)[:, np.newaxis] == np.arange(sources)),
        spare=spare[:CYCLE],
        earlier=_counts_before(_members(spare[:CYCLE], sources)),
        turn=np.argsort(spare[CYCLE]),  # block 0 has its sources in their order
    )


def _position(sample: int) -> tuple[int, int, int]:
    blocks, place = divmod(sample, BLOCK)
    return *divmod(blocks, CYCLE), place


def _apportion(weights: Sequence[Fraction], total: int) -> list[int]:
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


def _assign_spare_places(shares: Sequence[int]) -> Table:
    """[CYCLE + 1, spare places]: the source that has each spare place, by block up to the next cycle's first.

    The sources are laid end to end, each as long as its share (below CYCLE; all together CYCLE x spare places), and
    those are chosen that contain the block's offset + a multiple of CYCLE (systematic sampling, Madow 1949). Of all
    CYCLE offsets a source is chosen by as many as its share is.
    """
    offsets = np.arange(CYCLE + 1) * _STRIDE % CYCLE
    marks = offsets[:, np.newaxis] + np.arange(0, sum(shares), CYCLE)
    chosen: Table = np.searchsorted(np.cumsum(shares), marks, side="right").astype(np.int16)
    has = _members(chosen, len(shares))
    spare: Table = chosen.copy()
    for block in range(1, CYCLE + 1):  # a source that is in two blocks running keeps its place
        last, now = spare[block - 1], chosen[block]
        spare[block] = last
        spare[block, ~has[block, last]] = now[~has[block - 1, now]]
    return spare


def _members(rows: Table, sources: int) -> npt.NDArray[np.bool_]:
    """[rows, sources]: whether a row holds a source."""
    has = np.zeros((len(rows), sources), np.bool_)
    np.put_along_axis(has, rows, True, axis=1)
    return has


def _counts_before(has: npt.NDArray[np.bool_]) -> Table:
    """[rows, sources]: how many of the rows before one have the source."""
    counts: Table = np.cumsum(has, axis=0, dtype=np.int16) - has
    return counts


def _power(permutation: Permutation, times: int) -> Permutation:
    """The permutation applied `times` times, by squaring."""
    result: Permutation = np.arange(len(permutation))
    while times:
        if times & 1:
            result = permutation[result]
        permutation, times = permutation[permutation], times >> 1
    return result


@dataclass(frozen=True)
class _Segment:
    """A part of the run with one mixture."""

    first: int
    """Its first sample."""
    sources: tuple[int, ...]
    """Those in the mixture."""
    weights: tuple[float, ...]
    shares: tuple[int, ...]
    """Of these, in a cycle of the mixture."""
    before: tuple[int, ...]
    """Samples of every source that came earlier."""

    @property
    def mixture(self) -> Mixture:
        """Its tables are large where there are many sources, so those of a few segments are kept."""
        return build_mixture(self.weights)

    def counts(self, samples: int) -> list[int]:
        """Samples of every source among the run's first `samples`, which end in this segment."""
        counts = list(self.before)
        for source, count in zip(self.sources, self.mixture.counts(samples - self.first), strict=True):
            counts[source] += count
        return counts


@dataclass(frozen=True)
class MixtureSchedule:
    """Made by `build_schedule`."""

    segments: tuple[_Segment, ...]
    end: int | None
    """Samples that there are; None: no end, sources are read again and again."""

    def __call__(self, sample: int) -> tuple[int, int]:
        """(source, number among the source's samples) of sample `sample`, which must be before the end."""
        assert self.end is None or sample < self.end
        segment = self._segment(sample)
        chosen, number = segment.mixture(sample - segment.first)
        source = segment.sources[chosen]
        return source, segment.before[source] + number

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` samples are of each source."""
        return self._segment(samples).counts(samples)

    def before(self, samples: int) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
        """All that decides the first `samples` samples: where each mixture begins, its sources and their shares."""
        return [(each.first, each.sources, each.shares) for each in self.segments if each.first < samples]

    def _segment(self, sample: int) -> _Segment:
        return self.segments[bisect_right(self.segments, sample, key=lambda each: each.first) - 1]


def build_schedule(
    stages: Sequence[tuple[int | None, Sequence[float]]], limits: Sequence[int | None]
) -> MixtureSchedule:
    """The schedule of sources that have at most `limits` samples (None: any number).

    Of each stage, the sample that the next one begins with (None for the last), and a weight for each source (0: no
    part). Where a source is used up, the others share its part. The run ends where a stage has no source left.
    """
    segments: list[_Segment] = []
    first, counts = 0, [0] * len(limits)
    for until, weights in stages:
        while until is None or first < until:
            left = [None if limit is None else limit - count for limit, count in zip(limits, counts, strict=True)]
            sources = tuple(source for source, weight in enumerate(weights) if weight and left[source] != 0)
            if not sources:
                return MixtureSchedule(tuple(segments), first)
            mixture = build_mixture(chosen := tuple(weights[source] for source in sources))
            segments.append(_Segment(first, sources, chosen, mixture.shares, tuple(counts)))
            limited = {at: samples for at, source in enumerate(sources) if (samples := left[source]) is not None}
            cycles = {at: (samples - 1) // mixture.shares[at] for at, samples in limited.items()}
            soonest = min(cycles.values(), default=0)  # the search takes long, where many sources are limited
            ends = [first + _length(mixture, at, limited[at], soonest) for at in limited if cycles[at] == soonest]
            if until is not None:
                ends.append(until)
            if not ends:
                return MixtureSchedule(tuple(segments), None)
            first = min(ends)
            counts = segments[-1].counts(first)
    raise AssertionError("the last stage has no end")


def _length(mixture: Mixture, source: int, samples: int, cycles: int) -> int:
    """The shortest beginning of a mixture with `samples` of a source; it has `cycles` whole cycles."""
    low = cycles * CYCLE * BLOCK
    return low + bisect_left(range(CYCLE * BLOCK), samples, key=lambda length: mixture.count(source, low + length))
