"""Numbers, choices and tables as people read them. Knows nothing of recipes."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def format_count(count: float) -> str:
    """A count for people: 1_900_000 is `1.90M`, 812 is `812`."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if abs(count) >= size:
            return f"{count / size:.2f}{unit}"
    return f"{count:g}"


def format_bytes(count: float) -> str:
    """Bytes for people, in binary units: 3_221_225_472 is `3.00 GiB`."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def format_shape(shape: Sequence[int]) -> str:
    """`4096 x 1024`."""
    return " x ".join(map(str, shape))


def pluralize(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`, `3 microbatches`."""
    plural = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{plural}"


def list_some(names: Sequence[str], most: int = 5) -> str:
    """Up to `most` of them, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def join_choices(values: Sequence[int]) -> str:
    """`1`, `1 or 2`, `1, 2 or 4`; of many, the smallest and the largest."""
    shown = [*map(str, values)] if len(values) < 12 else [*map(str, values[:6]), "…", str(values[-1])]
    return " or ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))


def format_table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Lines of columns, the head being one of the rows; columns whose index is in `right` are right-aligned."""
    columns = enumerate(zip(*rows, strict=True))
    formats = [f"{'>' if index in right else '<'}{max(map(len, column))}" for index, column in columns]
    return ["  ".join(map(format, row, formats)).rstrip() for row in rows]


def format_batch(ranks: int, microbatches: int, microbatch: int) -> str:
    """A step's batch: `2 ranks x 3 microbatches of 4`."""
    return f"{pluralize(ranks, 'rank')} x {pluralize(microbatches, 'microbatch')} of {microbatch}"
