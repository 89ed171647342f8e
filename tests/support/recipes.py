"""Recipes of the debug model for tests of what is computed from recipes alone."""

from __future__ import annotations

from typing import Any

from titanlite.recipe.sections import Recipe


def recipe(**keys: Any) -> Recipe:
    """A valid recipe of 100 steps of the debug model with `section__key=value` laid over it."""
    values: dict[str, dict[str, Any]] = {"training": {"steps": 100}, "model": {"preset": "debug"}}
    for key, value in keys.items():
        section, _, name = key.partition("__")
        values.setdefault(section, {})[name] = value
    return Recipe.model_validate(values)


def pipeline(schedule: str, pp: int = 2, zero_stage: int = 2, layers: int = 4, **keys: Any) -> dict[str, Any]:
    """Keys of a recipe whose blocks `pp` ranks share."""
    section = {"schedule": schedule, **keys}
    return {
        "parallel__pp": pp,
        "parallel__zero_stage": zero_stage,
        "parallel__pipeline": section,
        "model__layers": layers,
    }
