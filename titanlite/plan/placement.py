"""Which part of a parameter a rank holds, by arithmetic alone: tensor parallel parts, then rows for FSDP. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from titanlite.models.spec import ShardingRule, Style, is_named_by
from titanlite.plan.layout import ceil_div

Shape = tuple[int, ...]
Slices = tuple[Shape, Shape]  # offset in the whole tensor, and shape

SHARD_DIMENSION: Mapping[Style, int] = {"vocab": 0, "column": 0, "row": 1}  # of its weight; other styles cut none


@dataclass(frozen=True)
class Placement:
    """How tensor parallelism cuts a parameter: one dimension, between units."""

    dimension: int
    size: int  # of that dimension, in whole
    unit: int  # divides `size`

    @property
    def units(self) -> int:
        return self.size // self.unit

    def local_range(self, group: GroupRank) -> tuple[int, int]:
        """(first, size) of a rank's part of the dimension; the first ranks may have one unit more."""
        units, rest = divmod(self.units, group.size)
        return (group.rank * units + min(group.rank, rest)) * self.unit, (units + (group.rank < rest)) * self.unit


class GroupRank(NamedTuple):
    rank: int
    size: int


ALONE = GroupRank(0, 1)


def local_slices(shape: Shape, placement: Placement | None, tp: GroupRank, shard: GroupRank = ALONE) -> Slices:
    """What a rank holds of a parameter: its tensor parallel part if there is a `placement`, and of that ceil(rows /
    ranks) leading rows, as FSDP2 shards: the last ranks may have fewer, or none.
    """
    offset, size = [0] * len(shape), list(shape)
    if placement is not None:
        offset[placement.dimension], size[placement.dimension] = placement.local_range(tp)
    rows = ceil_div(size[0], shard.size)
    first = min(shard.rank * rows, size[0])
    offset[0], size[0] = offset[0] + first, min(rows, size[0] - first)
    return tuple(offset), tuple(size)


def find_placements(shapes: Mapping[str, Shape], plan: Sequence[ShardingRule]) -> dict[str, Placement]:
    """How the plan's tp rules cut the parameters of these names and shapes; without those that they leave whole."""
    rules = [rule for rule in plan if rule.style in SHARD_DIMENSION]

    @cache
    def find_rule(module: str) -> ShardingRule | None:
        return next((rule for rule in rules if is_named_by((rule.pattern,), module)), None)

    found: dict[str, Placement] = {}
    for name, shape in shapes.items():
        if (rule := find_rule(pattern_of(name).rpartition(".")[0])) is not None:
            dimension = SHARD_DIMENSION[rule.style]
            found[name] = Placement(dimension, shape[dimension], rule.unit)
    return found


def pattern_of(name: str) -> str:
    """A name with numbers left open: `layers.3.ffn.up.weight` is `layers.*.ffn.up.weight`."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
