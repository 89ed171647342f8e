"""What a comparison found, in plain numbers, and how much of a difference is rounding. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """Differences, relative, up to which two runs count as the same."""

    loss: float
    grad_norm: float
    turned: float = 0.0
    """Share of a weight's elements that may have moved the other way, apart from a few."""

    def of_weight(self, elements: int) -> float:
        """For a weight of so many elements, as part of the distance that it has come from its initial value."""
        if not self.turned:
            return self.loss
        return 2 * math.sqrt(self.turned + _TURNED_BY_CHANCE / elements)


_TURNED_BY_CHANCE = 2
"""Elements of a weight that may always move the other way: in a short vector, one is a large share."""

_UNITS = {"bfloat16": 2**-8, "float32": 2**-24}
"""A format's unit of rounding."""


def tolerance_in(compute: str, reduce: str, layers: int) -> Tolerance:
    """How far rounding may drive two orders of the same sums apart, in a few steps of so many blocks that compute in
    one format and send their gradients in another.

    In float64 rounding is some 1e-14 and mistakes are at least 1e-6: anything between would do.

    Elsewhere, with u the unit of rounding of the coarser format: every block rounds anew, so that activations and
    gradients are off by some u sqrt(blocks) of their size. The loss and the norm average them; their own sums, always
    in float32 or more, add at most the root of their thousands of terms. Weights are another matter. Adam's first steps
    go by gradients' signs, and of a gradient's elements a share of about that size is so near to zero that rounding
    turns their sign. Each is then two steps off: a share s of them, 2 sqrt(s) of the way.
    """
    if compute == "float64":
        return Tolerance(1e-9, 1e-9)
    unit, sums = max(_UNITS[compute], _UNITS[reduce]) * math.sqrt(layers), 64 * _UNITS["float32"]
    return Tolerance(unit + sums, 4 * unit + sums, 8 * unit)


@dataclass(frozen=True)
class Comparison:
    """A number under the recipe's layout and in one process."""

    here: float
    reference: float
    difference: float
    """Relative to the reference; infinite where either is not finite."""


@dataclass(frozen=True)
class Weight:
    """How far a weight is from what it is in one process."""

    name: str
    difference: float
    """Norm of what separates them, relative to the distance that the weight has come (step 0: to its norm)."""
    allowed: float
    """How much of that rounding explains."""


@dataclass(frozen=True)
class Row:
    """A step's numbers; step 0 is before the first one, where there are only weights."""

    step: int
    loss: Comparison
    grad_norm: Comparison
    weight: Weight
    """The one that differs most, by what its size allows."""


@dataclass(frozen=True)
class Pass:
    """A comparison in one number format."""

    compute: str
    tolerance: Tolerance
    notes: tuple[str, ...]
    """What could not be done as the recipe says, and why; on the first rank only."""
    rows: tuple[Row, ...]

    def largest(self) -> tuple[float, float, float]:
        """The largest differences of loss, gradient norm and weights."""
        rows = self.rows
        losses, norms = [row.loss.difference for row in rows], [row.grad_norm.difference for row in rows]
        return max(losses), max(norms), max(row.weight.difference for row in rows)

    def first_difference(self) -> str | None:
        """A sentence about the first number past the tolerance; None if there is none."""
        return next((said for row in self.rows for said in self._differences(row)), None)

    def _differences(self, row: Row) -> Iterator[str]:
        tolerance = self.tolerance
        compared = [("loss", row.loss, tolerance.loss), ("gradient norm", row.grad_norm, tolerance.grad_norm)]
        for name, found, allowed in compared:
            if not found.difference <= allowed:
                numbers = f"{found.here:.9g} with this layout and {found.reference:.9g} in one process"
                excess = _excess(found.difference, allowed)
                yield f"{self.compute}: the {name} of step {row.step} is {numbers}: {excess}"
        if not row.weight.difference <= row.weight.allowed:
            when = f"after step {row.step}" if row.step else "before the first step"
            excess = _excess(row.weight.difference, row.weight.allowed)
            yield f"{self.compute}: {when}, {row.weight.name} is not what it is in one process: {excess}"


def _excess(difference: float, allowed: float) -> str:
    return f"{difference:.1e} apart, relatively, and rounding explains {allowed:.1e}"


def first_difference(passes: Sequence[Pass]) -> str | None:
    """The first difference of the first pass that has one."""
    return next(filter(None, (each.first_difference() for each in passes)), None)
