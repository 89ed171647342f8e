"""The debug model learns in float8 what it learns in bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
from support.parity import parity_runs

from titanlite.plan.float8 import SETTINGS
from titanlite.recipe.sections import Recipe

STEPS = 300


def final_loss(float8: dict[str, Any]) -> float:
    """On held-out text, after 300 steps on the standard library's source."""
    recipe = Recipe.model_validate(
        {
            "training": {"steps": STEPS, "sequence_length": 64, "global_batch": 16},
            "validation": {"every_steps": STEPS, "sequences": 64},
            "optimizer": {"lr": 1e-3},
            "schedule": {"warmup_steps": 20},
            "precision": {"compute": "bfloat16", "float8": float8},
            "metrics": {"log_every": STEPS, "tensorboard": False},
        }
    )
    curve, _ = parity_runs.train(0, 1, recipe.model_dump_json())
    return curve["validation_loss"][-1]


@pytest.fixture(scope="module")
def bfloat16_loss() -> float:
    return final_loss({})


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SETTINGS)
def test_300_steps_end_within_a_percent_of_bfloat16(recipe: str, bfloat16_loss: float) -> None:
    loss = final_loss({"enabled": True, "recipe": recipe, "min_size": 0})
    assert loss < 2.5, "that of 300 steps, not of the first few"
    assert loss == pytest.approx(bfloat16_loss, rel=0.01)
