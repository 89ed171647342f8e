"""Which rank writes and verifies what, and where boxes meet: pure arithmetic on parts of tensors, without torch.

A box is a part of a whole tensor: its offset and its shape. Every process that asks gets the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import xxhash

from titanlite.plan.memory import part_count

Box = tuple[tuple[int, ...], tuple[int, ...]]


def boxes_to_write(name: str, box: Box, nbytes: int, copies: int, copy: int, file_bytes: int) -> list[Box]:
    """What number `copy` of the `copies` processes that hold this box of tensor `name` writes of it.

    The box is cut along its rows, into equal runs; they are dealt out in turn, beginning at a copy that the name and
    the offset pick, so that small boxes spread over all. None is larger than `file_bytes`, unless one row is.
    """
    offset, size = box
    if 0 in size:
        return []
    rows = size[0] if size else 1
    count = part_count(rows, nbytes, copies, file_bytes)
    first = xxhash.xxh3_64_intdigest(f"{name} {offset}".encode())
    mine = [number for number in range(count) if (first + number) % copies == copy]
    if not size:
        return [box for _ in mine]
    edges = [rows * number // count for number in range(count + 1)]
    return [((offset[0] + edges[n], *offset[1:]), (edges[n + 1] - edges[n], *size[1:])) for n in mine]


def whole_box(shape: Sequence[int]) -> Box:
    """All of a tensor."""
    return (0,) * len(shape), tuple(shape)


def overlap(one: Box, other: Box) -> Box | None:
    """The part that two boxes of the same tensor have in common; None if there is none."""
    starts = tuple(map(max, zip(one[0], other[0], strict=True)))
    stops = (min(a + m, b + n) for a, m, b, n in zip(*one, *other, strict=True))
    size = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
    return (starts, size) if all(extent > 0 for extent in size) else None


def within(part: Box, box: Box) -> tuple[slice, ...]:
    """The slices that cut `part` out of an array that holds `box`."""
    return tuple(slice(a - b, a - b + n) for a, n, b in zip(*part, box[0], strict=True))


def row_blocks(box: Box, itemsize: int, limit: int) -> Iterator[Box]:
    """Boxes of whole rows that make up `box` in order, each of at most `limit` bytes if a row is."""
    offset, size = box
    if 0 in size:
        return
    if not size:
        yield box
        return
    step = max(1, limit // (itemsize * math.prod(size[1:])))
    for first in range(0, size[0], step):
        yield (offset[0] + first, *offset[1:]), (min(step, size[0] - first), *size[1:])


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


def assign_files(sizes: Mapping[str, int], wanted: Sequence[Mapping[str, int]]) -> list[list[str]]:
    """The files that each rank reads whole, from how many bytes of each every rank wants.

    From the largest on, each goes where it adds least: to a rank that has few by then, or that wants most of it anyway.
    """
    holders: dict[str, list[int]] = {file: [] for file in sizes}
    for rank, files in enumerate(wanted):
        for file in files:
            holders[file].append(rank)
    loads = [0] * len(wanted)
    shares: list[list[str]] = [[] for _ in wanted]
    for file in sorted(sizes, key=lambda file: (-sizes[file], file)):
        candidates = [min(range(len(loads)), key=loads.__getitem__), *holders[file]]
        rank = min(candidates, key=lambda rank: (loads[rank] - wanted[rank].get(file, 0), rank))
        shares[rank].append(file)
        loads[rank] += sizes[file]
    return shares
