"""Which source each sample of a run comes from, over stages with weights of their own and sources that are used up.

A chain of mixtures: one ends where its stage does, or where a source has been read as often as it may be. All of it
follows from weights and sizes, so there is nothing to save. Samples, sources and their samples are counted from 0.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from titanlite.data.mixture import BLOCK, CYCLE, Mixture, mixture


@dataclass(frozen=True)
class Stage:
    """Weights up to a sample."""

    until: int | None
    """Samples of the run after which the next stage begins; None: this one is the last."""
    weights: tuple[float, ...]
    """One a source; 0: it has no part."""


@dataclass(frozen=True)
class _Stretch:
    """A part of the run with one mixture."""

    first: int
    """Its first sample."""
    sources: tuple[int, ...]
    """Those in the mixture."""
    weights: tuple[float, ...]
    """Of these."""
    shares: tuple[int, ...]
    """Theirs in the mixture."""
    before: tuple[int, ...]
    """Samples of every source that came earlier."""

    @property
    def mixture(self) -> Mixture:
        """Its tables are large where there are many sources, so those of a few stretches are kept."""
        return mixture(self.weights)

    def counts(self, samples: int) -> list[int]:
        """Samples of every source among the run's first `samples`, which end in this stretch."""
        counts = list(self.before)
        for source, count in zip(self.sources, self.mixture.counts(samples - self.first), strict=True):
            counts[source] += count
        return counts


@dataclass(frozen=True)
class Schedule:
    """Made by `schedule`."""

    stretches: tuple[_Stretch, ...]
    end: int | None
    """Samples that there are; None: no end, sources are read again and again."""

    def __call__(self, sample: int) -> tuple[int, int]:
        """(source, number among the source's samples) of sample `sample`, which must be before the end."""
        assert self.end is None or sample < self.end
        stretch = self._stretch(sample)
        chosen, number = stretch.mixture(sample - stretch.first)
        source = stretch.sources[chosen]
        return source, stretch.before[source] + number

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` samples are of each source."""
        return self._stretch(samples).counts(samples)

    def before(self, samples: int) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
        """All that decides the first `samples` samples: where each mixture begins, its sources and their shares."""
        return [(each.first, each.sources, each.shares) for each in self.stretches if each.first < samples]

    def _stretch(self, sample: int) -> _Stretch:
        return self.stretches[bisect_right(self.stretches, sample, key=lambda each: each.first) - 1]


def schedule(stages: Sequence[Stage], most: Sequence[int | None]) -> Schedule:
    """The schedule of sources that may have so many samples each (`most`; None: any number).

    The last stage has no `until`, and those of the others rise. Where a source is used up, the others share its part
    by their weights. The run ends where a stage has no source left.
    """
    assert stages[-1].until is None
    stretches: list[_Stretch] = []
    first, counts = 0, [0] * len(most)
    for stage in stages:
        while stage.until is None or first < stage.until:
            sources = tuple(
                source
                for source, (weight, limit) in enumerate(zip(stage.weights, most, strict=True))
                if weight and (limit is None or counts[source] < limit)
            )
            if not sources:
                return Schedule(tuple(stretches), first)
            weights = tuple(stage.weights[source] for source in sources)
            part = mixture(weights)
            stretch = _Stretch(first, sources, weights, part.shares, tuple(counts))
            stretches.append(stretch)
            left = {at: limit - counts[s] for at, s in enumerate(sources) if (limit := most[s]) is not None}
            cycles = {at: (samples - 1) // part.shares[at] for at, samples in left.items()}
            soonest = min(cycles.values(), default=0)
            ends = [first + _length(part, at, left[at], soonest) for at in left if cycles[at] == soonest]
            if stage.until is not None:
                ends.append(stage.until)
            if not ends:
                return Schedule(tuple(stretches), None)
            first = min(ends)
            counts = stretch.counts(first)
    raise AssertionError("the last stage has no end")


def _length(part: Mixture, source: int, samples: int, cycles: int) -> int:
    """The shortest beginning of a mixture that has so many samples of a source, by bisection; it has so many whole
    cycles.
    """
    low, high = cycles * CYCLE * BLOCK, (cycles + 1) * CYCLE * BLOCK
    while low < high:
        middle = (low + high) // 2
        if part.count(source, middle) < samples:
            low = middle + 1
        else:
            high = middle
    return low
