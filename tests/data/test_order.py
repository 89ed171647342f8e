"""The order of samples: bijective, keyed, spread evenly, and fixed for good."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.data.order import sample_position

KEYS = {"seed": st.integers(0, 2**63 - 1), "source": st.text(max_size=8), "epoch": st.integers(0, 10**6)}


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 700), **KEYS)
def test_an_epoch_visits_each_place_once(n: int, seed: int, source: str, epoch: int) -> None:
    visited = [sample_position(epoch * n + index, n, seed, source) for index in range(n)]
    assert sorted(visited) == list(range(n))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 2**62), index=st.integers(0, 2**62), **KEYS)
def test_any_size_is_in_range_and_random_access(n: int, index: int, seed: int, source: str, epoch: int) -> None:
    assert 0 <= sample_position(epoch * n + index % n, n, seed, source) < n


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, "a", 0), (1, "a", 0)),
        ((0, "a", 0), (0, "b", 0)),
        ((0, "a", 0), (0, "a", 1)),
        ((1, "a", 11), (11, "a", 1)),
        ((1, "2/a", 3), (1, "a", 2)),
    ],
    ids=["seed", "source", "epoch", "digits", "slash"],
)
def test_each_part_of_the_key_matters(one: tuple[int, str, int], other: tuple[int, str, int]) -> None:
    n = 1000
    orders = [
        [sample_position(epoch * n + i, n, seed, source) for i in range(n)] for seed, source, epoch in (one, other)
    ]
    agreements = sum(a == b for a, b in zip(*orders, strict=True))
    assert agreements < 10  # 1 expected of independent orders


@pytest.mark.parametrize("n", [2, 3, 5, 8, 12])
def test_every_place_is_equally_likely(n: int) -> None:
    """Chi-square over 4,000 keys of three samples' places, against its 99.99 % quantile (Wilson-Hilferty)."""
    keys = 4000
    degrees = n - 1
    limit = degrees * (1 - 2 / (9 * degrees) + 3.72 * (2 / (9 * degrees)) ** 0.5) ** 3
    for index in {0, n // 2, n - 1}:
        counts = Counter(sample_position(index, n, seed, "corpus") for seed in range(keys))
        assert sum((counts[place] - keys / n) ** 2 / (keys / n) for place in range(n)) < limit


def test_all_orders_of_few_places_occur_equally_often() -> None:
    counts = Counter(tuple(sample_position(i, 4, seed, "corpus") for i in range(4)) for seed in range(4800))
    assert len(counts) == 24
    assert all(130 < count < 270 for count in counts.values())  # 200 each; 5 standard deviations are 70


def test_neighbours_are_scattered() -> None:
    """In a random order of n places the mean distance of neighbours is n / 3, and 2 in n of them touch."""
    n = 10_007
    order = [sample_position(i, n, 3, "corpus") for i in range(n)]
    distances = [abs(a - b) for a, b in pairwise(order)]
    assert sum(distances) / (n - 1) == pytest.approx(n / 3, rel=0.02)
    assert distances.count(1) < 12


def test_the_order_is_fixed_for_good() -> None:
    """A release that changed these would silently reorder the data of every run that is resumed."""
    assert [sample_position(i, 10, 0, "corpus") for i in range(20)] == list(map(int, "26104735980527981643"))
    assert sample_position(123_456_789_012, 250_000_000, 42, "corpus") == 183_874_311
