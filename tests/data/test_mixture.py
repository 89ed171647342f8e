"""Mixtures: any thousand samples hold each source's share to within one, and numbers within a source have no gaps; and
schedules of them over stages, against a walk from the first sample on.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from math import ceil, floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.data.mixture import BLOCK, CYCLE, apportion, build_mixture, build_schedule

weights = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=12).map(tuple)
beginnings = st.sampled_from([0, 1, CYCLE * BLOCK - 1500, 2 * CYCLE * BLOCK - 700, 10**12]) | st.integers(0, 10**15)


@settings(max_examples=15, deadline=None)
@given(weights=weights, first=beginnings)
def test_any_thousand_samples_have_the_mixtures_shares(weights: tuple[float, ...], first: int) -> None:
    schedule = build_mixture(apportion(weights))
    sources = np.array([schedule(first + i)[0] for i in range(2 * BLOCK)])
    for source, share in enumerate(schedule.shares):
        within = np.convolve(sources == source, np.ones(BLOCK), "valid")
        assert floor(share / CYCLE) <= within.min() and within.max() <= ceil(share / CYCLE)


@settings(max_examples=15, deadline=None)
@given(weights=weights, first=beginnings)
def test_a_sources_samples_follow_each_other(weights: tuple[float, ...], first: int) -> None:
    schedule = build_mixture(apportion(weights))
    counts = schedule.counts(first).tolist()
    assert sum(counts) == first
    for sample in range(first, first + 1200):
        source, number = schedule(sample)
        assert number == counts[source]
        counts[source] += 1
    assert counts == schedule.counts(first + 1200).tolist()


@settings(deadline=None, max_examples=30)
@given(weights=weights)
def test_shares_are_those_asked_for(weights: tuple[float, ...]) -> None:
    schedule, total = build_mixture(apportion(weights)), BLOCK * CYCLE
    assert sum(schedule.shares) == total and min(schedule.shares) >= 1
    assert schedule.counts(total).tolist() == schedule.shares.tolist()
    raised = sum(weight / sum(weights) * total < 1 for weight in weights)
    for share, weight in zip(schedule.shares, weights, strict=True):
        assert abs(share - weight / sum(weights) * total) <= 1 + raised


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.7, 0.2, 0.1)])
def test_short_stretches_are_mixed_too(weights: tuple[float, ...]) -> None:
    schedule = build_mixture(apportion(weights))
    for sample in range(0, 5000, 7):
        sources = [schedule(sample + i)[0] for i in range(20)]
        for source, weight in enumerate(weights):
            assert abs(sources.count(source) - 20 * weight) <= 2


SAMPLES = sorted(
    {
        *range(0, 2100, 3),
        *(cycle * CYCLE * BLOCK + place for cycle in (1, 2, 3, 7, 1000, 10**9) for place in range(-40, 1100, 19)),
        *(i * i * i * 977 for i in range(0, 3000, 10)),
    }
)
"""The first, those around the ends of cycles, and some far out."""


@pytest.mark.parametrize(
    ("weights", "stored"),
    [
        ((3.0,), "7db20fdae3781264"),
        ((0.7, 0.2, 0.1), "267e927b268e568a"),
        ((1e-6, 1.0, 2.5), "a2195b9af00e8aac"),
        ((0.123, 4.56, 7.891, 0.0011, 3.3), "85bef20c5c01e600"),
        (tuple(1.0 / (k + 1) for k in range(37)), "b79b099a22d4a1e8"),
        (tuple(1.0 + k * k % 97 / 8 for k in range(400)), "2939d205af3f82ae"),
    ],
    ids=lambda value: f"{len(value)} sources" if isinstance(value, tuple) else "",
)
def test_which_sample_goes_where_is_the_same_in_any_version(weights: tuple[float, ...], stored: str) -> None:
    """Runs go on under newer ones."""
    schedule = build_mixture(apportion(weights))
    found = [*map(schedule, SAMPLES), *(tuple(schedule.counts(number).tolist()) for number in SAMPLES[::9])]
    assert hashlib.sha256(repr(found).encode()).hexdigest()[:16] == stored


# Schedules.

SOURCES = 3
stage_weights = st.tuples(*[st.sampled_from([0.0, 0.1, 1.0, 2.5])] * SOURCES).filter(any)
limits = st.tuples(*[st.none() | st.integers(1, 900)] * SOURCES)


@settings(deadline=None, max_examples=25)
@given(ends=st.lists(st.integers(1, 2500), max_size=3, unique=True).map(sorted), data=st.data(), most=limits)
def test_sources_follow_their_stages_up_to_their_limits(
    ends: list[int], data: st.DataObject, most: tuple[int | None, ...]
) -> None:
    stages = [(until, data.draw(stage_weights)) for until in [*ends, None]]
    plan = build_schedule(stages, most)
    counts: Counter[int] = Counter()
    for sample in range(3500 if plan.end is None else min(plan.end, 3500)):
        if sample % 97 == 0:
            assert plan.counts(sample) == [counts[source] for source in range(SOURCES)]
        source, number = plan(sample)
        assert number == counts[source]
        counts[source] += 1
        limit = most[source]
        assert limit is None or counts[source] <= limit
        stage = next(stage for until, stage in stages if until is None or sample < until)
        assert stage[source] > 0
    if plan.end is not None and plan.end < 3500:
        stage = next(stage for until, stage in stages if until is None or plan.end < until)
        assert all(counts[s] == most[s] for s in range(SOURCES) if stage[s])


def test_a_source_that_is_used_up_leaves_its_part_to_the_others() -> None:
    plan = build_schedule([(None, (0.5, 0.3, 0.2))], (None, 60, None))
    part = build_mixture(apportion((0.5, 0.3, 0.2)))
    last = next(sample for sample in range(1000) if part(sample) == (1, 59))
    assert [plan(sample) for sample in range(last + 1)] == [part(sample) for sample in range(last + 1)]
    later = Counter(plan(sample)[0] for sample in range(last + 1, last + 7001))
    assert abs(later[0] - 5000) <= 1 and not later[1]
    assert plan.end is None
    assert build_schedule([(None, (1.0,))], (7,)).end == 7


def test_a_schedule_is_the_same_in_any_version() -> None:
    """Over three stages, in which two sources are used up; runs go on under newer versions."""
    stages = [(700, (1.0, 2.5, 0.1)), (2400, (0.0, 1.0, 1.0)), (None, (3.0, 0.5, 0.2))]
    plan = build_schedule(stages, (None, 900, 4000))
    found = [
        *map(plan, range(0, 40_000, 7)),
        *map(plan.counts, range(0, 40_000, 501)),
        *([(first, (*shares,), (*shares.values(),)) for first, shares in plan.before(end)] for end in (700, 30_000)),
    ]
    assert hashlib.sha256(repr(found).encode()).hexdigest()[:16] == "7e7b53e84681e962"
