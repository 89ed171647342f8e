"""Which part of a parameter a rank holds, by arithmetic alone: tensor parallel shares, then rows for FSDP.

Pure functions, without torch; `tensor.py`, `zero.py` and `shards.py` act on them, `check` describes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from titanlite.models.spec import ShardingRule, Style, is_named_by
from titanlite.parallel.layout import ceil_div

Shape = tuple[int, ...]
Box = tuple[Shape, Shape]
"""Offset in the whole tensor, and size."""

CUT_DIMENSION: Mapping[Style, int] = {"vocab": 0, "column": 0, "row": 1}
"""Which dimension of a module's weight its style cuts; the other styles cut no weight."""


@dataclass(frozen=True)
class Slicing:
    """How one dimension of a parameter is dealt out to the ranks of the tp group."""

    dimension: int
    whole: int
    """Its size."""
    unit: int
    """Divides `whole`."""

    @property
    def units(self) -> int:
        """How many parts there are to deal out."""
        return self.whole // self.unit

    def share(self, ranks: int, rank: int) -> tuple[int, int]:
        """(first, size) of a rank's share, cut between units; the first ranks may have one unit more."""
        units, rest = divmod(self.units, ranks)
        return (rank * units + min(rank, rest)) * self.unit, (units + (rank < rest)) * self.unit


@dataclass(frozen=True)
class Share:
    """One of `ranks` that share something."""

    ranks: int
    rank: int


def box(shape: Shape, slicing: Slicing | None, tp: Share, cut: Share) -> Box:
    """What the rank with these coordinates holds of a parameter.

    Its tensor parallel share if there is a `slicing`, and of that ceil(rows / ranks) leading rows, as FSDP2 cuts: the
    last ranks may have fewer, or none.
    """
    offset, size = [0] * len(shape), list(shape)
    if slicing is not None:
        offset[slicing.dimension], size[slicing.dimension] = slicing.share(tp.ranks, tp.rank)
    rows = ceil_div(size[0], cut.ranks)
    first = min(cut.rank * rows, size[0])
    offset[0], size[0] = offset[0] + first, min(rows, size[0] - first)
    return tuple(offset), tuple(size)


def slicings(shapes: Mapping[str, Shape], plan: Sequence[ShardingRule]) -> dict[str, Slicing]:
    """How the plan's tp rules cut the parameters of these names and shapes; without those that they leave whole."""
    rules = [rule for rule in plan if rule.style in CUT_DIMENSION]
    by_pattern = {pattern: _rule_of(pattern, rules) for pattern in map(pattern_of, shapes)}
    found: dict[str, Slicing] = {}
    for name, shape in shapes.items():
        rule = by_pattern[pattern_of(name)]
        if rule is not None:
            dimension = CUT_DIMENSION[rule.style]
            found[name] = Slicing(dimension, shape[dimension], rule.unit)
    return found


def _rule_of(parameter: str, rules: Sequence[ShardingRule]) -> ShardingRule | None:
    module = parameter.rpartition(".")[0]
    return next((rule for rule in rules if is_named_by((rule.pattern,), module)), None)


def pattern_of(name: str) -> str:
    """A name with numbers left open: `layers.3.ffn.up.weight` is `layers.*.ffn.up.weight`."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
