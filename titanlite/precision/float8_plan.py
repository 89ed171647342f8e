"""Which products run in float8, and how: what a recipe's name stands for, and which linears it is worth it for.

Arithmetic on names and sizes, without torch: `titanlite check` says it, `float8.py` does it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from titanlite.models.spec import ModelSpec, is_named_by
from titanlite.parallel.slicing import Shape, pattern_of, slicings
from titanlite.recipe.sections import Float8, Recipe

ALIGNMENT = 16
"""Sizes that the matrix units' float8 products take are multiples of this."""


@dataclass(frozen=True)
class Cast:
    """How a factor of a product becomes float8. Scales are powers of two."""

    format: Literal["e4m3", "e5m2"]
    """e4m3 keeps 3 bits after the point down to 2^-14 of the largest value, e5m2 2 bits down to 2^-29."""
    scale: Literal["tensor", "row"]
    """One scale, or one for each vector that is multiplied and summed: rows of the left factor, columns of the right."""


@dataclass(frozen=True)
class Product:
    """A product of two matrices in float8."""

    left: Cast
    right: Cast
    fast_accumulation: bool
    """Whether the matrix units may keep their sums in fewer bits than float32 (on Hopper, about 14)."""


@dataclass(frozen=True)
class Settings:
    """The three products of a linear layer: x W^T, dy W and dy^T x. None: in the compute dtype."""

    output: Product
    grad_input: Product
    grad_weight: Product | None


_TENSOR, _ROW, _WIDE = Cast("e4m3", "tensor"), Cast("e4m3", "row"), Cast("e5m2", "tensor")
_BY_ROWS = Product(_ROW, _ROW, fast_accumulation=True)

SETTINGS: dict[str, Settings] = {
    "tensorwise": Settings(
        output=Product(_TENSOR, _TENSOR, fast_accumulation=True),
        grad_input=Product(_WIDE, _TENSOR, fast_accumulation=False),
        grad_weight=Product(_WIDE, _TENSOR, fast_accumulation=False),
    ),
    "rowwise": Settings(_BY_ROWS, _BY_ROWS, _BY_ROWS),
    # Gradients add up over the whole run, so that their errors do too. Without their product, the weight's columns are
    # never a contracted dimension of their own: one scale does for it in grad_input.
    "rowwise_with_hp_grad_weight": Settings(
        output=_BY_ROWS, grad_input=Product(_ROW, _TENSOR, fast_accumulation=True), grad_weight=None
    ),
}
"""What the recipes of these names stand for: formats and scales are those of torchao's recipes of the same names (its
third is `rowwise_with_gw_hp`) with `round_scales_to_power_of_2`."""


@dataclass(frozen=True)
class Decision:
    """What becomes of one linear."""

    name: str
    shape: Shape
    """[outputs, inputs] of the smallest share that a tensor parallel rank has."""
    skipped: str | None
    """Why it stays as it is; None: it is converted."""


def decisions(spec: ModelSpec, config: Any, recipe: Recipe) -> tuple[Decision, ...]:
    """One for each linear of the model, the same on every rank; none where float8 is not enabled."""
    section, tied = recipe.precision.float8, spec.tied(config)
    if not section.enabled:
        return ()
    shapes = dict(spec.shapes(config))
    plan, shared = spec.sharding(config), {*tied, *tied.values()}
    shapes |= {name: shapes[other] for name, other in tied.items()}
    tables = tuple(rule.pattern for rule in plan if rule.style == "vocab")
    cuts, found = slicings(shapes, plan), []
    for parameter, shape in shapes.items():
        name = parameter.removesuffix(".weight")
        if len(shape) != 2 or is_named_by(tables, name):
            continue
        slicing, shares = cuts.get(parameter), {shape}
        if slicing is not None:
            sizes = {slicing.share(recipe.parallel.tp, rank)[1] for rank in range(recipe.parallel.tp)}
            shares = {(size, shape[1]) if slicing.dimension == 0 else (shape[0], size) for size in sizes}
        reason = "shares its weight with the embedding" if parameter in shared else _reason(section, name, shares)
        found.append(Decision(name, min(shares), reason))
    return tuple(found)


def _reason(section: Float8, name: str, shares: set[Shape]) -> str | None:
    """Why a linear whose shares have these sizes is not converted, if it is not."""
    if is_named_by(section.exclude, name):
        return "excluded"
    for rows, columns in sorted(shares):
        if rows % ALIGNMENT or columns % ALIGNMENT:
            return f"{rows} x {columns} is not in multiples of {ALIGNMENT}"
        if mean_size(rows, columns) < section.min_size:
            return f"{rows} x {columns} has a mean size of {mean_size(rows, columns):.0f}, below {section.min_size}"
    return None


def mean_size(outputs: int, inputs: int) -> float:
    """The harmonic mean of a weight's sizes: it grows with what float8 saves a linear over what its casts cost.

    Of a token, three products of 2 x outputs x inputs operations take half as long: 3 x outputs x inputs are saved. Its
    inputs and outputs are read for their largest value, read, written and turned: some 8 bytes of each. So it pays above
    16/3 of the operations that the device does in the time of a byte: 1300 at an H100's 250, half that where the
    compiler fuses the casts with what comes before. The number of tokens does not matter.
    """
    return 2 * outputs * inputs / (outputs + inputs)


def summary(found: Sequence[Decision]) -> str:
    """`float8: converted 224 of 225 linears; head skipped: excluded`, alike ones together."""
    skipped = [each for each in found if each.skipped is not None]
    alike = Counter((pattern_of(each.name), each.skipped) for each in skipped)
    reasons = [f"{name} skipped{f' ({times} times)' * (times > 1)}: {why}" for (name, why), times in alike.items()]
    return "; ".join([f"converted {len(found) - len(skipped)} of {len(found)} linears", *reasons])

