"""What several rules ask of a recipe. A recipe may be wrong elsewhere: then the answer is None."""

from __future__ import annotations

import math
from typing import Any

from titanlite.errors import Finding, UsageError
from titanlite.models.spec import ModelSpec, spec_of
from titanlite.plan.layout import total_steps
from titanlite.recipe.sections import Recipe


def warning(key: str, problem: str, fix: str) -> Finding:
    """A finding about a recipe that runs all the same."""
    return Finding(key, problem, fix, severity="warning")


def find_spec(recipe: Recipe) -> ModelSpec | None:
    """The model family; None for an unknown preset, which the rule `names` reports."""
    try:
        return spec_of(recipe.model.preset)
    except UsageError:
        return None


def find_config(recipe: Recipe) -> Any:
    """The model's sizes; None for an unknown preset."""
    spec = find_spec(recipe)
    return spec.configure(recipe.model) if spec else None


def find_steps(recipe: Recipe) -> int | None:
    """Steps of the run; None where the rule `amount` has something to report."""
    training = recipe.training
    return total_steps(training) if (training.steps is None) != (training.tokens is None) else None


def divisors(number: int) -> list[int]:
    """From 1 to `number`; beyond 10^8, those that a short search finds."""
    small = [divisor for divisor in range(1, min(math.isqrt(number), 10_000) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})
