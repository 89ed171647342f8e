"""Who writes what and where boxes meet: pure arithmetic on parts of tensors, without torch.

A box is a part of a whole tensor: its offset and its shape. Every process that asks gets the same answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import xxhash

Box = tuple[tuple[int, ...], tuple[int, ...]]

SHARED_BYTES = 2**24
"""A box is cut so that the processes that have it share its writing, but not into pieces smaller than this."""


def pieces(name: str, box: Box, nbytes: int, copies: int, copy: int, file_bytes: int) -> list[Box]:
    """What number `copy` of the `copies` processes that hold this box of tensor `name` writes of it.

    The box is cut along its rows, into equal runs; they are dealt out in turn, beginning at a copy that the name and
    the offset pick, so that small boxes spread over all. None is larger than `file_bytes`, unless one row is.
    """
    offset, size = box
    if 0 in size:
        return []
    rows = size[0] if size else 1
    count = min(rows, max(1, -(-nbytes // file_bytes), min(copies, nbytes // SHARED_BYTES)))
    first = xxhash.xxh3_64_intdigest(f"{name} {offset}".encode())
    mine = [number for number in range(count) if (first + number) % copies == copy]
    if not size:
        return [box for _ in mine]
    edges = [rows * number // count for number in range(count + 1)]
    return [((offset[0] + edges[n], *offset[1:]), (edges[n + 1] - edges[n], *size[1:])) for n in mine]


def overlap(one: Box, other: Box) -> Box | None:
    """The part that two boxes of the same tensor have in common; None if there is none."""
    starts = tuple(map(max, zip(one[0], other[0], strict=True)))
    stops = (min(a + m, b + n) for a, m, b, n in zip(*one, *other, strict=True))
    size = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
    return (starts, size) if all(extent > 0 for extent in size) else None


def within(part: Box, box: Box) -> tuple[slice, ...]:
    """The slices that cut `part` out of an array that holds `box`."""
    return tuple(slice(a - b, a - b + n) for a, n, b in zip(*part, box[0], strict=True))


def group_by_size(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in their order, cut into groups of at most `limit` in sum; one that is larger stands alone."""
    groups: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not groups or filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def share_by_size(sizes: Mapping[str, int], rank: int, ranks: int) -> list[str]:
    """The names that fall to one of `ranks` ranks: dealt out from the largest, so that all get about as much."""
    dealt = sorted(sizes, key=lambda name: (-sizes[name], name))
    return list(itertools.islice(dealt, rank, None, ranks))
