"""A model's sharding plan as a table: what each rank of a tp or cp group has of it, and what they communicate.

`titanlite check RECIPE --show-plan` prints it. The plan itself is the model's (`ModelFamily.sharding`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from titanlite.models.spec import ShardingRule, Style, spec_of
from titanlite.plan.placement import SHARD_DIMENSION, GroupRank, find_placements, local_shape, pattern_of
from titanlite.recipe.sections import Recipe
from titanlite.text import format_shape, format_table

_MESSAGES: dict[Style, str] = {
    "vocab": "rows found: reduce-scatter; backward all-gather",
    "gather": "input: all-gather; backward reduce-scatter",
    "column": "nothing",
    "row": "output: reduce-scatter; backward all-gather",
    "loss": "three numbers a token",
    "attention": "keys and values: all-gather; backward reduce-scatter",
    "mask": "document numbers: all-gather",
}
_RING = "keys and values: passed round; backward also their gradients"
_OF_TOKENS = ("gather", "attention", "mask")
"""Styles of modules that see more of the sequence than they are given."""


def sharding_table(recipe: Recipe) -> list[dict[str, Any]]:
    """One row a rule of the plan, then one a parameter that no rule cuts, numbers in names left open.

    `over` is the mesh dimension (tp, cp) that it concerns, `told` what its ranks communicate. `whole` and `local` are
    shapes of the weight for the first rank; for what sees more of the sequence than it is given, tokens.
    """
    spec = spec_of(recipe.model.preset)
    config = spec.configure(recipe.model)
    plan, tied = spec.sharding(config), spec.tied(config)
    shapes = {pattern_of(name): shape for name, shape in spec.shapes(config).items()}
    shapes |= {pattern_of(name): shapes[pattern_of(other)] for name, other in tied.items()}
    placements, tp = find_placements(shapes, plan), GroupRank(0, recipe.parallel.tp)
    rows = []
    for rule in plan:
        weight = f"{rule.pattern}.weight"
        row = {"modules": rule.pattern, "style": rule.style, **_between_ranks(rule, recipe)}
        if rule.style in SHARD_DIMENSION and weight in shapes:
            local = local_shape(shapes[weight], placements[weight], tp)
            row |= {"whole": list(shapes[weight]), "local": list(local)}
        rows.append(row)
    for name, shape in shapes.items():
        if name not in placements:
            same = {"told": "gradient: all-reduce, once a step", "whole": list(shape), "local": list(shape)}
            rows.append({"modules": name.removesuffix(".weight"), "style": "whole", "over": "tp", **same})
    return rows


def _between_ranks(rule: ShardingRule, recipe: Recipe) -> dict[str, Any]:
    """Over which dimension a module communicates what, and the tokens that it sees and is given."""
    parallel, tokens = recipe.parallel, recipe.training.sequence_length
    part = tokens // parallel.cp
    if rule.style in ("attention", "mask"):
        told = _RING if rule.style == "attention" and parallel.cp_method == "ring" else _MESSAGES[rule.style]
        return {"over": "cp", "told": told, "whole": [tokens], "local": [part]}
    gathers = rule.style == "gather"
    seen, given = ([part], [part // parallel.tp]) if gathers else (None, None)
    return {"over": "tp", "told": _MESSAGES[rule.style], "whole": seen, "local": given}


def format_sharding_table(rows: Sequence[dict[str, Any]]) -> str:
    """The table for people."""
    cells = [("modules", "style", "over", "communicates", "whole -> local")]
    for row in rows:
        sizes = ""
        if row["whole"] is not None:
            unit = " tokens" * (row["style"] in _OF_TOKENS)
            sizes = f"{format_shape(row['whole'])}{unit} -> {format_shape(row['local'])}"
        cells.append((row["modules"], row["style"], row["over"], row["told"], sizes))
    return "\n".join(format_table(cells))
