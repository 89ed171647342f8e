"""Schedules of sources over stages, against a walk from the first sample on."""

from __future__ import annotations

import hashlib
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.data.mixture import build_mixture
from titanlite.data.schedule import build_schedule

SOURCES = 3
weights = st.tuples(*[st.sampled_from([0.0, 0.1, 1.0, 2.5])] * SOURCES).filter(any)
limits = st.tuples(*[st.none() | st.integers(1, 900)] * SOURCES)


@settings(deadline=None, max_examples=25)
@given(ends=st.lists(st.integers(1, 2500), max_size=3, unique=True).map(sorted), data=st.data(), most=limits)
def test_sources_follow_their_stages_up_to_their_limits(
    ends: list[int], data: st.DataObject, most: tuple[int | None, ...]
) -> None:
    stages = [(until, data.draw(weights)) for until in [*ends, None]]
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
    part = build_mixture((0.5, 0.3, 0.2))
    last = next(sample for sample in range(1000) if part(sample) == (1, 59))
    assert [plan(sample) for sample in range(last + 1)] == [part(sample) for sample in range(last + 1)]
    later = Counter(plan(sample)[0] for sample in range(last + 1, last + 7001))
    assert abs(later[0] - 5000) <= 1 and not later[1]
    assert plan.end is None
    assert build_schedule([(None, (1.0,))], (7,)).end == 7


def test_which_sample_goes_where_is_the_same_in_any_version() -> None:
    """Over three stages, in which two sources are used up; runs go on under newer versions."""
    stages = [(700, (1.0, 2.5, 0.1)), (2400, (0.0, 1.0, 1.0)), (None, (3.0, 0.5, 0.2))]
    plan = build_schedule(stages, (None, 900, 4000))
    found = [
        *map(plan, range(0, 40_000, 7)),
        *map(plan.counts, range(0, 40_000, 501)),
        *map(plan.before, (700, 30_000)),
    ]
    assert hashlib.sha256(repr(found).encode()).hexdigest()[:16] == "7e7b53e84681e962"
