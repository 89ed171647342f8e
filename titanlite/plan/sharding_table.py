"""A model's sharding plan as a table: what each rank of a tp or cp group has of it, and what they tell each other.

`titanlite check RECIPE --show-plan` prints it. The plan itself is the model's (`ModelSpec.sharding`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from titanlite.models.spec import ShardingRule, Style, spec_of
from titanlite.plan.slicing import SHARD_DIMENSION, GroupRank, find_placements, local_shape, pattern_of
from titanlite.recipe.sections import Recipe
from titanlite.text import format_shape, format_table

_TOLD: dict[Style, str] = {
    "vocab": "rows found: reduce-scatter; backward all-gather",
    "gather": "input: all-gather; backward reduce-scatter",
    "column": "nothing",
    "row": "output: reduce-scatter; backward all-gather",
    "loss": "three numbers a token",
    "attention": "keys and values: all-gather; backward reduce-scatter",
    "mask": "document numbers: all-gather",
}
_RING = "keys and values: passed round; backward also their gradients"

Row = dict[str, Any]


def sharding_table(recipe: Recipe) -> list[Row]:
    """One row a rule of the plan, then one a parameter that no rule cuts, numbers in names left open.

    `over` is the mesh dimension (tp, cp) that it concerns, `told` what its ranks communicate. `whole` and `local` are
    shapes of the weight for the first rank; for what sees more of the sequence than it is given, tokens.
    """
    spec = spec_of(recipe.model.preset)
    config = spec.configure(recipe.model)
    plan, tied = spec.sharding(config), spec.tied(config)
    shapes = {pattern_of(name): shape for name, shape in spec.shapes(config).items()}
    shapes |= {pattern_of(name): shapes[pattern_of(other)] for name, other in tied.items()}
    cuts, tp = find_placements(shapes, plan), GroupRank(0, recipe.parallel.tp)
    rows = []
    for rule in plan:
        weight = f"{rule.pattern}.weight"
        row = {"modules": rule.pattern, "style": rule.style, **_between_ranks(rule, recipe)}
        if rule.style in SHARD_DIMENSION and weight in shapes:
            row |= {"whole": list(shapes[weight]), "local": list(local_shape(shapes[weight], cuts[weight], tp))}
        rows.append(row)
    for name, shape in shapes.items():
        if name not in cuts:
            told = "gradient: all-reduce, once a step"
            same = {"over": "tp", "told": told, "whole": list(shape), "local": list(shape)}
            rows.append({"modules": name.removesuffix(".weight"), "style": "whole", **same})
    return rows


def _between_ranks(rule: ShardingRule, recipe: Recipe) -> Row:
    """Over which dimension a module communicates what, and the tokens that it sees and is given."""
    parallel, tokens = recipe.parallel, recipe.training.sequence_length
    part = tokens // parallel.cp
    if rule.style in ("attention", "mask"):
        told = _RING if rule.style == "attention" and parallel.cp_method == "ring" else _TOLD[rule.style]
        return {"over": "cp", "told": told, "whole": [tokens], "local": [part]}
    seen = [part] if rule.style == "gather" else None
    given = [part // parallel.tp] if rule.style == "gather" else None
    return {"over": "tp", "told": _TOLD[rule.style], "whole": seen, "local": given}


def sharding_text(rows: Sequence[Row]) -> str:
    """The table for people."""
    head = ("modules", "style", "over", "communicates", "whole -> local")
    cells = ((row["modules"], row["style"], row["over"], row["told"], _sizes(row)) for row in rows)
    return "\n".join(format_table([head, *cells]))


def _sizes(row: Row) -> str:
    if row["whole"] is None:
        return ""
    if row["style"] in ("gather", "attention", "mask"):
        return f"{row['whole'][0]} tokens -> {row['local'][0]}"
    return f"{format_shape(row['whole'])} -> {format_shape(row['local'])}"
