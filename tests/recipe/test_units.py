from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.recipe.sections import parse_count
from titanlite.text import format_bytes, format_count


@pytest.mark.parametrize(
    ("text", "count"),
    [("7", 7), ("2_000_000", 2_000_000), ("100B", 10**11), ("2.5M", 2_500_000), ("1.001K", 1001), ("3 T", 3 * 10**12)],
)
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "B", "1.5", "1.0001K", "-3", "1e9", "2.5m", "1,000", "_1", "²"])
def test_not_a_count(text: str) -> None:
    with pytest.raises(ValueError):
        parse_count(text)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**15), st.sampled_from([("K", 3), ("M", 6), ("B", 9), ("T", 12)]))
def test_a_count_with_all_its_decimals_is_exact(count: int, unit: tuple[str, int]) -> None:
    letter, zeros = unit
    whole, fraction = divmod(count, 10**zeros)
    assert parse_count(f"{whole}.{fraction:0{zeros}d}{letter}") == count


def test_formats() -> None:
    assert [format_count(value) for value in (812, 1_900_000, 1e11)] == ["812", "1.90M", "100.00B"]
    assert [format_bytes(value) for value in (12, 3 * 2**30, 1536)] == ["12 B", "3.00 GiB", "1.50 KiB"]
