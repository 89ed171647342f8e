"""Which products run in float8, and how: what a recipe's name stands for, and which linears it is worth it for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from titanlite.models.spec import ModelConfig, ModelSpec, is_named_by
from titanlite.plan.placement import Shape, pattern_of
from titanlite.recipe.sections import Float8

ALIGNMENT = 16  # sizes that the matrix units' float8 products take are multiples of this
BLOCK = 32  # neighbours that share a scale in the formats of the OCP Microscaling specification (MX, version 1.0)


@dataclass(frozen=True)
class Cast:
    """How a factor of a product becomes float8: e4m3 keeps 3 bits after the point down to 2^-14 of the largest value,
    e5m2 2 bits down to 2^-29. Scales are powers of two: one; or one for each vector that is multiplied and summed (left
    rows, right columns), or `BLOCK` of it.
    """

    format: Literal["e4m3", "e5m2"]
    scale: Literal["tensor", "row", "block"]


@dataclass(frozen=True)
class Product:
    left: Cast
    right: Cast
    fast_accumulation: bool  # whether units may keep their sums in fewer bits than float32 (on Hopper, about 14)


@dataclass(frozen=True)
class Float8Settings:
    """The three products of a linear layer: x W^T, dy W and dy^T x. None: in the compute dtype."""

    output: Product
    grad_input: Product
    grad_weight: Product | None

    @property
    def alignment(self) -> int:
        """Sizes, and numbers of tokens, must be multiples of this."""
        return BLOCK if self.output.left.scale == "block" else ALIGNMENT

    @property
    def sent_weights(self) -> Cast | None:
        """How a rank casts its rows of a weight before it sends them; None if it cannot."""
        return _cast_by_rows(self.output.right, self.grad_input.right)


def _cast_by_rows(cast: Cast, transposed: Cast | None) -> Cast | None:
    """The cast of rows that loses nothing of a factor of two products, one with its transpose; None if it would.

    A product in the compute dtype needs the factor in full. What is small beside its row can be large in its block, or
    in its column, which is a row of the transpose.
    """
    if transposed is None or cast.format != transposed.format or cast.scale == "block" or transposed.scale != "tensor":
        return None
    return replace(cast, scale="row")


_TENSOR, _ROW, _BLOCK = Cast("e4m3", "tensor"), Cast("e4m3", "row"), Cast("e4m3", "block")
_FORWARD, _BACKWARD = (Product(_ROW, _ROW, fast_accumulation=fast) for fast in (True, False))
_WIDE = Product(Cast("e5m2", "tensor"), _TENSOR, fast_accumulation=False)
_BLOCKS = Product(_BLOCK, _BLOCK, fast_accumulation=False)

# What the recipes of these names stand for: formats and scales of the first three are those of torchao's recipes of
# the same names (its third is `rowwise_with_gw_hp`) with `round_scales_to_power_of_2`.
SETTINGS: dict[str, Float8Settings] = {
    "tensorwise": Float8Settings(Product(_TENSOR, _TENSOR, fast_accumulation=True), _WIDE, _WIDE),
    "rowwise": Float8Settings(_FORWARD, _BACKWARD, _BACKWARD),
    # A weight has one scale in grad_input, so that it need not be read again along its columns.
    "rowwise_with_hp_grad_weight": Float8Settings(_FORWARD, Product(_ROW, _TENSOR, fast_accumulation=False), None),
    "mxfp8": Float8Settings(_BLOCKS, _BLOCKS, _BLOCKS),
}


@dataclass(frozen=True)
class LinearDecision:
    name: str
    shape: Shape  # [outputs, inputs] of its weight, in whole
    skipped: str | None  # why it stays as it is; None: it is converted


def decide_linears(spec: ModelSpec, config: ModelConfig, section: Float8) -> tuple[LinearDecision, ...]:
    """One for each linear of the model, by its whole size on any layout; none where float8 is not enabled."""
    if not section.enabled:
        return ()
    shapes, tied = spec.shapes(config), spec.tied(config)
    shapes = {**shapes, **{name: shapes[other] for name, other in tied.items()}}
    tables = tuple(rule.pattern for rule in spec.sharding(config) if rule.style == "vocab")
    found = []
    for parameter, shape in shapes.items():
        name, reason = parameter.removesuffix(".weight"), None
        if len(shape) != 2 or is_named_by(tables, name):
            continue
        if parameter in tied:
            reason = "shares the embedding's weight"
        elif is_named_by(section.exclude, name):
            reason = "excluded"
        elif not aligned(shape, section):
            reason = f"not in multiples of {SETTINGS[section.recipe].alignment}"
        elif mean_size(*shape) < section.min_size:
            reason = f"below min_size {section.min_size}"
        found.append(LinearDecision(name, shape, reason))
    return tuple(found)


def aligned(shape: Shape, section: Float8) -> bool:
    """Whether a weight of this shape can be multiplied in float8."""
    return all(size % SETTINGS[section.recipe].alignment == 0 for size in shape)


def mean_size(outputs: int, inputs: int) -> float:
    """The harmonic mean of a weight's sizes: it grows with what float8 saves a linear over what its casts cost.

    Of a token, three products save 3 x outputs x inputs operations, and some 8 bytes of each input and output are read
    and written for the casts. So it pays above 16/3 of the operations that the device does in the time of a byte: 1300
    at an H100's 250, half that where the compiler fuses the casts with what comes before.
    """
    return 2 * outputs * inputs / (outputs + inputs)


@dataclass(frozen=True)
class Gather:
    """What tensor parallel ranks gather before products: inputs of `column` linears, gradients of a `row` linear's."""

    module: str
    what: Literal["inputs", "gradients"]
    cast: Cast | None  # how it travels; None: in the compute dtype
    why: str | None  # why it is not sent in float8


def plan_gathers(spec: ModelSpec, config: ModelConfig, section: Float8) -> tuple[Gather, ...]:
    """All of a model's, none where `all_gather` is off. Inputs need every linear that takes them to be converted."""
    if not (section.enabled and section.all_gather):
        return ()
    settings = SETTINGS[section.recipe]
    rules, styles = spec.sharding(config), ("row", "column", "gather")
    patterns = {style: tuple(rule.pattern for rule in rules if rule.style == style) for style in styles}
    gathering = tuple(point.rpartition(".")[0] for point in patterns["gather"])  # modules whose input it is
    takers: dict[tuple[str, Literal["inputs", "gradients"]], list[LinearDecision]] = {}
    for each in decide_linears(spec, config, section):
        if is_named_by(patterns["row"], each.name):
            takers.setdefault((each.name, "gradients"), []).append(each)
        elif is_named_by(patterns["column"], each.name):
            parts = each.name.split(".")
            around = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
            module = next(module for module in around if is_named_by(gathering, module))
            takers.setdefault((module, "inputs"), []).append(each)
    right, left = (settings.grad_weight.right, settings.grad_weight.left) if settings.grad_weight else (None, None)
    casts = {
        "inputs": _cast_by_rows(settings.output.left, right),
        "gradients": _cast_by_rows(settings.grad_input.left, left),
    }
    found = []
    for (module, what), linears in takers.items():
        why = None if casts[what] is not None else f"{section.recipe} takes them more exactly"
        why = next((f"{linear.name}: {linear.skipped}" for linear in linears if linear.skipped is not None), why)
        found.append(Gather(module, what, casts[what] if why is None else None, why))
    return tuple(found)


def format_gathers(found: Sequence[Gather]) -> list[str]:
    """`inputs of layers.*.attention, layers.*.ffn: e4m3`, `inputs of head: as computed (head: excluded)`."""
    modules: dict[tuple[str, str], dict[str, None]] = {}
    for each in found:
        how = each.cast.format if each.cast is not None else f"as computed ({pattern_of(each.why or '')})"
        modules.setdefault((each.what, how), {})[pattern_of(each.module)] = None
    return [f"{what} of {', '.join(names)}: {how}" for (what, how), names in modules.items()]


def summarize_linears(found: Sequence[LinearDecision]) -> str:
    """`converted 224 of 225 linears; skipped: head (excluded)`."""
    reasons: dict[str, dict[str, None]] = {}
    for each in found:
        if each.skipped is not None:
            reasons.setdefault(each.skipped, {})[pattern_of(each.name)] = None
    skipped = ", ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())
    converted = sum(each.skipped is None for each in found)
    return f"converted {converted} of {len(found)} linears{'; skipped: ' * bool(skipped)}{skipped}"
