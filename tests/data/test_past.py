"""What a checkpoint keeps of the order of samples: it tells pasts apart, and leaves what is to come free to change."""

from __future__ import annotations

from itertools import count

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.corpus.tokenizers import open_tokenizer
from titanlite.data.mixture import build_schedule
from titanlite.data.sources import Source, Texts
from titanlite.data.splits import Split

BYTES = open_tokenizer("bytes")
WINDOWS = {"a": 7, "b": 40, "c": 300}
SOURCES = [Source(n, (Texts(np.zeros(8 * w + 1, np.uint16), 256),), BYTES, 8, False) for n, w in WINDOWS.items()]
COUNTED = [Source(n, (Texts(np.arange(8 * w + 1, dtype=np.uint16) % 251, 256),), BYTES, 8, False)
           for n, w in WINDOWS.items()]  # fmt: skip

weights = st.tuples(*[st.sampled_from([0.0, 0.1, 1.0, 2.5])] * 3).filter(any)
limits = st.tuples(*[st.none() | st.integers(1, 400)] * 3)
plans = st.tuples(st.lists(st.integers(1, 900), max_size=2, unique=True).map(sorted), st.lists(weights, min_size=3,
                  max_size=3), limits)  # fmt: skip
Plan = tuple[list[int], list[tuple[float, ...]], tuple[int | None, ...]]


def split(plan: Plan, seed: int = 0, texts: list[Source] = SOURCES) -> Split:
    ends, weights, most = plan
    stages = [(until, each) for until, each in zip([*ends, None], weights, strict=False)]
    return Split(tuple(texts), build_schedule(stages, most), seed)


def read(plan: Plan, samples: int) -> list[tuple[str, int]]:
    places = map(split(plan).place, range(samples))
    return [(source.name, window) for source, window in places]


@settings(deadline=None, max_examples=40)
@given(one=plans, other=plans, data=st.data())
def test_equal_pasts_are_those_that_read_the_same(one: Plan, other: Plan, data: st.DataObject) -> None:
    """Up to where two plans part, if they do, and just beyond."""
    ends = [plan.end for plan in (split(one).schedule, split(other).schedule) if plan.end is not None]
    longest = min([1000, *ends])
    pairs = zip(read(one, longest), read(other, longest), strict=True)
    parting = next((number for number, (mine, others) in enumerate(pairs) if mine != others), longest)
    for samples in {0, parting, data.draw(st.integers(0, longest)), longest}:
        if samples > parting:
            assert split(one).past(samples) != split(other).past(samples)
    if other[0] and other[0][0] < longest:  # one that goes its own way from its second stage on
        later: Plan = (other[0][:1], [other[1][0], one[1][-1]], (None, None, None))
        same: Plan = ([], [other[1][0]], (None, None, None))
        for samples in (0, 1, other[0][0]):
            assert read(later, samples) == read(same, samples)
            assert split(later).past(samples) == split(same).past(samples)


def test_a_source_counts_once_it_is_read() -> None:
    plan: Plan = ([100], [(1.0, 1.0, 0.0), (1.0, 1.0, 1.0)], (None, None, None))
    texts = [*SOURCES[:2], COUNTED[2]]
    assert split(plan).past(100) == split(plan, texts=texts).past(100)
    first = next(samples for samples in count(101) if "text/c" in split(plan).past(samples))
    assert split(plan).place(first - 1)[0].name == "c"
    assert split(plan).past(first) != split(plan, texts=texts).past(first)


def test_the_seed_decides_the_order() -> None:
    plan: Plan = ([], [(1.0, 1.0, 1.0)], (None, None, None))
    assert split(plan).past(5) != split(plan, seed=1).past(5)


def test_the_past_is_the_same_in_any_version() -> None:
    """Checkpoints of older ones hold it. The least share that there is is one in a million."""
    plan: Plan = ([500], [(1.0, 1e-9, 0.0), (1e-6, 2.5, 1.0)], (None, None, None))
    orders = [split(plan).past(samples)["order"] for samples in (0, 500, 2000)]
    assert orders == ["ff21e3fbc275f205", "d8963a9e7e1b9c92", "61f6df8c162712b4"]
