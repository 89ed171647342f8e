"""What a comparison found, in plain numbers, and how much of a difference is rounding. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_TURNED_BY_CHANCE = 2  # elements of a weight that may always move the other way: a large share of a short vector
_UNITS = {"bfloat16": 2**-8, "float32": 2**-24}  # a format's unit of rounding


@dataclass(frozen=True)
class Tolerance:
    """Differences, relative, up to which two runs count as the same."""

    loss: float
    grad_norm: float
    turned: float = 0.0  # share of a weight's elements that may have moved the other way, apart from a few

    def of_weight(self, elements: int) -> float:
        """For a weight of this size, as part of the distance that it has come from its initial value."""
        return 2 * math.sqrt(self.turned + _TURNED_BY_CHANCE / elements) if self.turned else self.loss


def tolerance_in(compute: str, reduce: str, layers: int) -> Tolerance:
    """How far rounding may drive two orders of the same sums apart, in a few steps of this many blocks.

    In float64 rounding is some 1e-14 and mistakes are at least 1e-6. Elsewhere, with u the coarser format's unit, every
    block rounds anew: activations and gradients are off by some u sqrt(blocks) of their size. Loss and norm average
    them; their own sums, in float32 or more, add at most the root of their thousands of terms. Adam's first steps go by
    gradients' signs, of which a share of about that size is turned: each element is then two steps off, and a share s
    of them 2 sqrt(s) of the way.
    """
    if compute == "float64":
        return Tolerance(1e-9, 1e-9)
    unit, sums = max(_UNITS[compute], _UNITS[reduce]) * math.sqrt(layers), 64 * _UNITS["float32"]
    return Tolerance(unit + sums, 4 * unit + sums, 8 * unit)


@dataclass(frozen=True)
class NumberDifference:
    """A number under the recipe's layout and in one process."""

    here: float
    reference: float
    difference: float  # relative to the reference; infinite where either is not finite


@dataclass(frozen=True)
class WeightDifference:
    """How far a weight is from what it is in one process."""

    name: str
    difference: float  # norm, relative to the distance that the weight has come (step 0: to its norm)
    allowed: float  # how much of that rounding explains


@dataclass(frozen=True)
class StepDifference:
    """A step's numbers; step 0 is before the first one, where there are only weights."""

    step: int
    loss: NumberDifference
    grad_norm: NumberDifference
    weight: WeightDifference  # the one that differs most, by what its size allows


@dataclass(frozen=True)
class Comparison:
    """A layout and one process in one number format."""

    compute: str
    tolerance: Tolerance
    notes: tuple[str, ...]  # what could not be done as the recipe says, and why; on the first rank only
    rows: tuple[StepDifference, ...]


def first_difference(comparisons: Sequence[Comparison]) -> str | None:
    """A sentence about the first number past its comparison's tolerance; None if there is none."""
    for compared in comparisons:
        for row in compared.rows:
            when = f"after step {row.step}" if row.step else "before the first step"
            for name, found, allowed in (
                (f"the loss of step {row.step}", row.loss, compared.tolerance.loss),
                (f"the gradient norm of step {row.step}", row.grad_norm, compared.tolerance.grad_norm),
                (f"{when}, {row.weight.name}", row.weight, row.weight.allowed),
            ):
                if not found.difference <= allowed:  # true of NaN
                    numbers = "not what it is in one process"
                    if isinstance(found, NumberDifference):
                        numbers = f"{found.here:.9g} with this layout and {found.reference:.9g} in one process"
                    excess = f"{found.difference:.1e} apart, relatively, and rounding explains {allowed:.1e}"
                    return f"{compared.compute}: {name} is {numbers}: {excess}"
    return None
