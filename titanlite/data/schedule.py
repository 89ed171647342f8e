"""Which source each sample of a run comes from, over stages with weights of their own and sources that are used up.

A chain of mixtures: one ends where its stage does, or where a source has been read as often as it may be. All of it
follows from weights and sizes, so there is nothing to save. Samples, sources and their samples are counted from 0.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from titanlite.data.mixture import BLOCK, CYCLE, Mixture, build_mixture


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
    """The schedule of sources that may have so many samples each (None: any number).

    Of each stage, the sample that the next one begins with (None for the last), and a weight for each source (0: it has
    no part). Where a source is used up, the others share its part by their weights. The run ends where a stage has no
    source left.
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
    """The shortest beginning of a mixture that has so many samples of a source; it has so many whole cycles."""
    low = cycles * CYCLE * BLOCK
    return low + bisect_left(range(CYCLE * BLOCK), samples, key=lambda length: mixture.count(source, low + length))
