"""Which source each sample of a run comes from, and which of that source's samples it is, without a walk to it.

Samples of a mixture go in blocks of `BLOCK`. Of a source with weight w (weights sum to 1) each has floor(BLOCK w),
always in the same places, and perhaps one more: the spare places in the block's middle, fewer than there are sources,
go to other sources in each block. A source that gets one in two blocks running gets the same one. So *any* `BLOCK`
samples running, wherever they begin, hold floor(BLOCK w) or ceil(BLOCK w) of a source. Who gets a spare place repeats
after `CYCLE` blocks: weights count in parts of BLOCK x CYCLE, exactly.

A run is a chain of mixtures: one ends where its stage does, or where a source has been read as often as it may be. All
of it follows from weights and sizes: nothing is saved. Samples, sources and their samples are counted from 0.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import floor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

BLOCK = 1000
CYCLE = 1000
_STRIDE = 619  # coprime to `CYCLE`, nearly its golden section: multiples of it, modulo CYCLE, are spread evenly

Shares = tuple[int, ...]  # samples of each source in a cycle
Counts = npt.NDArray[np.int64]  # [sources]
Table = npt.NDArray[np.int16]
Permutation = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Mixture:
    """Made by `build_mixture`."""

    only: int | None  # the source that has all samples, if one does
    shares: Counts  # in a cycle
    places: Table  # [BLOCK]: the source that always has a place of the block; of a spare place, to be filled in
    spare_places: Permutation
    spare: Table  # [CYCLE, spare places]: the source that has each, by block of the first cycle
    earlier: Table  # [CYCLE, sources]: how many spare places the source has in the blocks of the cycle before one
    turn: Permutation  # [spare places]: the place that the sources of each go to from one cycle to the next

    def __call__(self, sample: int) -> tuple[int, int]:
        """(source, number among the source's samples) of sample `sample` of the mixture."""
        if self.only is not None:
            return self.only, sample
        cycle, block, place = _position(sample)
        sources = _fill_block(self, cycle, block)
        source = int(sources[place])
        return source, int(self._before(cycle, block, source)) + int(np.count_nonzero(sources[:place] == source))

    def counts(self, samples: int) -> Counts:
        """How many of the first `samples` samples are of each source."""
        cycle, block, place = _position(samples)
        begun = np.bincount(_fill_block(self, cycle, block)[:place], minlength=len(self.shares))
        return self._before(cycle, block, slice(None)) + begun

    def _before(self, cycle: int, block: int, of: int | slice) -> Counts:
        """Samples of these sources in the blocks before one."""
        return cycle * self.shares[of] + block * (self.shares[of] // CYCLE) + self.earlier[block, of]


@lru_cache(maxsize=64)  # of samples that follow each other, most are of one block
def _fill_block(mixture: Mixture, cycle: int, block: int) -> Table:
    """[BLOCK]: the sources of a block's samples."""
    sources: Table = mixture.places.copy()
    turn, turned = mixture.turn, np.arange(len(mixture.turn))
    while cycle:  # `turn` is taken `cycle` times, by squaring
        turned = turn[turned] if cycle & 1 else turned
        turn, cycle = turn[turn], cycle >> 1
    sources[mixture.spare_places[turned]] = mixture.spare[block]
    return sources


@lru_cache(maxsize=64)  # tables are large where there are many sources: those of a few mixtures are kept
def build_mixture(shares: Shares) -> Mixture:
    """The mixture of sources with these shares, as `apportion` makes them."""
    always, sometimes = zip(*(divmod(share, CYCLE) for share in shares), strict=True)
    # Each source at distances as even as the others allow; a spare place where something that a block has once goes:
    # right into the middle, one after the other. Fractions whose terms are so small are equal, and less, as floats are.
    counts = enumerate([*always, *[1] * (BLOCK - sum(always))])
    turns = sorted(((2 * turn + 1) / (2 * count), k) for k, count in counts for turn in range(count))
    places = np.array([k for _, k in turns], np.int16)
    spare, has = _assign_spare_places(sometimes)
    return Mixture(
        only=shares.index(BLOCK * CYCLE) if BLOCK * CYCLE in shares else None,
        shares=np.array(shares),
        places=places,
        spare_places=np.flatnonzero(places >= len(shares)),
        spare=spare[:CYCLE],
        earlier=np.cumsum(has[:CYCLE], axis=0, dtype=np.int16) - has[:CYCLE],
        turn=np.argsort(spare[CYCLE]),  # block 0 has its sources in their order
    )


def apportion(weights: Sequence[float]) -> Shares:
    """Samples of each source in a cycle, by largest remainders: of a weight above 0 at least one, of 0 none."""
    assert sum(weight > 0 for weight in weights) < BLOCK and min(weights) >= 0
    exact = [Fraction(weight) for weight in weights]
    scale = BLOCK * CYCLE / sum(exact)
    shares = [max(int(weight > 0), floor(weight * scale)) for weight in exact]  # ints: `Split.past` prints them
    by_remainder = sorted(range(len(exact)), key=lambda k: shares[k] - exact[k] * scale)
    for k in by_remainder[: max(0, BLOCK * CYCLE - sum(shares))]:
        shares[k] += 1
    shares[shares.index(max(shares))] -= max(0, sum(shares) - BLOCK * CYCLE)  # what raised others to 1
    return tuple(shares)


def _position(sample: int) -> tuple[int, int, int]:
    blocks, place = divmod(sample, BLOCK)
    return *divmod(blocks, CYCLE), place


def _assign_spare_places(shares: Sequence[int]) -> tuple[Table, npt.NDArray[np.bool_]]:
    """[CYCLE + 1, spare places]: the source that has each spare place, by block up to the next cycle's first; and
    [CYCLE + 1, sources]: whether a block has a source in one of them.

    The sources are laid end to end, each as long as its share (below CYCLE; all together CYCLE x spare places), and
    those are chosen that contain the block's offset + a multiple of CYCLE (systematic sampling, Madow 1949). Of all
    CYCLE offsets a source is chosen by as many as its share is.
    """
    offsets = np.arange(CYCLE + 1) * _STRIDE % CYCLE
    marks = offsets[:, np.newaxis] + np.arange(0, sum(shares), CYCLE)
    chosen: Table = np.searchsorted(np.cumsum(shares), marks, side="right").astype(np.int16)
    has = np.zeros((CYCLE + 1, len(shares)), np.bool_)
    np.put_along_axis(has, chosen, True, axis=1)
    spare: Table = chosen.copy()
    for block in range(1, CYCLE + 1):  # a source that is in two blocks running keeps its place
        last, now = spare[block - 1], chosen[block]
        spare[block] = last
        spare[block, ~has[block, last]] = now[~has[block - 1, now]]
    return spare, has


class _Segment(NamedTuple):
    """A part of the run with one mixture."""

    first: int  # its first sample
    shares: Shares
    before: Counts  # samples of each source that came earlier


@dataclass(frozen=True, eq=False)
class MixtureSchedule:
    """Made by `build_schedule`."""

    segments: tuple[_Segment, ...]
    end: int | None  # samples that there are; None: no end, sources are read again and again

    def __call__(self, sample: int) -> tuple[int, int]:
        """(source, number among the source's samples) of sample `sample`, which must be before the end."""
        assert self.end is None or sample < self.end
        first, shares, before = self._segment(sample)
        source, number = build_mixture(shares)(sample - first)
        return source, int(before[source]) + number

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` samples are of each source."""
        first, shares, before = self._segment(samples)
        counts: list[int] = (before + build_mixture(shares).counts(samples - first)).tolist()
        return counts

    def before(self, samples: int) -> list[tuple[int, dict[int, int]]]:
        """All that decides the first `samples` samples: where each mixture begins, and its sources' shares."""
        parts = [each for each in self.segments if each.first < samples]
        return [(each.first, {k: share for k, share in enumerate(each.shares) if share}) for each in parts]

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
    first, counts = 0, np.zeros(len(limits), np.int64)
    for until, weights in stages:
        while until is None or first < until:
            read = counts.tolist()
            left = {k: limit - read[k] for k, limit in enumerate(limits) if limit is not None and weights[k]}
            weights = [weight * (left.get(k) != 0) for k, weight in enumerate(weights)]
            if not any(weights):
                return MixtureSchedule(tuple(segments), first)
            segments.append(_Segment(first, apportion(weights), counts))
            mixture = build_mixture(segments[-1].shares)
            ends = [] if until is None else [until]
            if limited := {k: samples for k, samples in left.items() if samples}:
                ends.append(first + _samples_until_used_up(mixture, limited))
            if not ends:
                return MixtureSchedule(tuple(segments), None)
            counts = counts + mixture.counts(min(ends) - first)
            first = min(ends)
    raise AssertionError("the last stage has no end")


def _samples_until_used_up(mixture: Mixture, left: Mapping[int, int]) -> int:
    """The shortest beginning of a mixture that has as many samples of one of these sources as are left of it."""
    sources, samples = np.array([*left]), np.array([*left.values()])
    begun = CYCLE * BLOCK * int(((samples - 1) // mixture.shares[sources]).min())  # no cycle before uses one up

    def is_one_used_up(more: int) -> bool:
        return bool((mixture.counts(begun + more)[sources] >= samples).any())

    return begun + bisect_left(range(CYCLE * BLOCK), True, key=is_one_used_up)
