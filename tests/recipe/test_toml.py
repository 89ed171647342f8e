"""The locator against an independent truth: each value is a number that occurs once, so its line can be searched."""

from __future__ import annotations

import itertools
import string
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.recipe.toml import TomlSyntaxError, find_line, format_toml, format_value, parse_toml, parse_value

EVERYTHING = '''# a comment with [brackets] = 1
title = """
several lines = 0, a quote " and two "" and [not.a.table]
and two more at the end"""""
literal = \'\'\'
# no comment
\'\'\'
"quoted key" = "a # b"  # comment

[a]
plain = 1979-05-27 07:32:00
dotted.inner.deep = { x = [1, 2], "y z" = { w = true } }
list = [
    "one",   # "two"
    [ 3,
      4 ],
    { five = 5 },
]

[[a.tables]]
first = 1
[a.tables.below]
second = 2
[[a.tables]]
third = 3
[[a.tables.nested]]
fourth = 4
[ b . 'c.d' ]
last = '\\'
'''


def test_lines_of_every_kind_of_key() -> None:
    expected = {
        ("title",): 2,
        ("literal",): 5,
        ("quoted key",): 8,
        ("a",): 10,
        ("a", "plain"): 11,
        ("a", "dotted", "inner"): 12,
        ("a", "dotted", "inner", "deep", "x", 1): 12,
        ("a", "dotted", "inner", "deep", "y z", "w"): 12,
        ("a", "list", 0): 14,
        ("a", "list", 1, 0): 15,
        ("a", "list", 1, 1): 15,
        ("a", "list", 2, "five"): 17,
        ("a", "tables", 0): 20,
        ("a", "tables", 0, "below", "second"): 23,
        ("a", "tables", 1, "third"): 25,
        ("a", "tables", 1, "nested", 0, "fourth"): 27,
        ("b", "c.d"): 28,
        ("b", "c.d", "last"): 29,
    }
    assert {path: find_line(EVERYTHING, [*map(str, path)]) for path in expected} == expected


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _leaves(item, (*path, key))]
    if isinstance(value, list):
        return [leaf for index, item in enumerate(value) for leaf in _leaves(item, (*path, index))]
    return [(path, value)]


def test_every_value_of_a_document_has_its_line() -> None:
    assert all(find_line(EVERYTHING, [*map(str, path)]) > 0 for path, _ in _leaves(parse_toml(EVERYTHING)))


KEYS = st.one_of(
    st.text(string.ascii_letters + string.digits + "_-", min_size=1, max_size=4),
    st.text(st.characters(blacklist_categories=["Cs"]), max_size=4),
)
BLANKS = st.sampled_from(["", "\n", "  # [x] = 'y'\n", "\n\n"])


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, dict[int, int]]:
    """A TOML text, and the line on which each of its (unique) numbers stands."""
    numbers = itertools.count(1_000_001)
    text = ""
    lines: dict[int, int] = {}

    def value(depth: int, inline: bool) -> str:
        kind = draw(st.sampled_from(["number", "array", "table"] if depth else ["number"]))
        if kind == "number":
            return str(next(numbers))
        if kind == "array":
            gap, before = ("", "") if inline else (draw(BLANKS), draw(BLANKS))
            comma = f"{before},{gap} "
            return "[" + gap + comma.join(value(depth - 1, True) for _ in range(draw(st.integers(0, 3)))) + before + "]"
        names = draw(st.lists(KEYS, unique=True, max_size=3))
        return "{" + ", ".join(f"{format_value(name)} = {value(depth - 1, True)}" for name in names) + "}"

    for table in draw(st.lists(KEYS, unique=True, max_size=4)):
        header = draw(st.sampled_from(["[{}]", "[[{}]]", "[ {} . sub ]"])).format(format_value(table))
        text += draw(BLANKS) + header + "\n"
        for key in draw(st.lists(KEYS, unique=True, max_size=3)):
            quote = draw(st.sampled_from(['"""', "'''"]))
            text += f"{format_value('text ' + key)} = {quote}\n[no.table]\nno = 1 {quote}\n"
            text += draw(BLANKS) + f"{format_value(key)} = {value(2, False)}\n"
    for line, content in enumerate(text.split("\n"), 1):
        for candidate in range(1_000_001, next(numbers)):
            if str(candidate) in content:
                lines[candidate] = line
    return text, lines


@settings(max_examples=150, deadline=None)
@given(documents())
def test_each_number_is_found_on_its_line(document: tuple[str, dict[int, int]]) -> None:
    text, lines = document
    for path, value in _leaves(parse_toml(text)):
        if isinstance(value, int):
            assert find_line(text, [*map(str, path)]) == lines[value], (path, text)


SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(blacklist_categories=["Cs"])),
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=5)
TABLES = st.recursive(
    st.dictionaries(KEYS, VALUES, max_size=4),
    lambda inner: st.dictionaries(KEYS, st.one_of(inner, VALUES), max_size=4),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(TABLES)
def test_written_toml_reads_back(values: dict[str, Any]) -> None:
    assert parse_toml(format_toml(values)) == values


@settings(max_examples=100, deadline=None)
@given(VALUES)
def test_written_values_read_back(value: Any) -> None:
    assert parse_value(format_value(value)) == value


@pytest.mark.parametrize("text", ["1\nb = 2", "", "one", "1 2", "[1"])
def test_not_one_value(text: str) -> None:
    with pytest.raises(ValueError):
        parse_value(text)


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [("a = 1\nb = oops\n", 2, 5), ("[a\n", 1, 3), ("a = 1\n\na = 2\n", 3, 6)],
)
def test_syntax_errors_name_line_and_column(text: str, line: int, column: int) -> None:
    with pytest.raises(TomlSyntaxError) as caught:
        parse_toml(text)
    assert caught.value.line == line and f"column {column})" in str(caught.value)
