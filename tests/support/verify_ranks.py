"""One rank of a verification, as the pool's workers run it, with and without a mistake to be found."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support.parity import faults
from titanlite.parallel.world import World
from titanlite.recipe.sections import Recipe
from titanlite.training.train_state import TrainState
from titanlite.verify import compare
from titanlite.verify.shrink import shrink
from titanlite.verify.verdict import Comparison

STEPS = 3


def verified(rank: int, world: int, recipe_json: str, fault: str = "") -> list[Comparison]:
    """What this rank finds."""
    recipe = shrink(Recipe.model_validate_json(recipe_json), world, STEPS)
    with pytest.MonkeyPatch.context() as patch:
        if fault:
            FAULTS[fault](patch, rank)
        return list(compare.compare_layout(recipe, World(rank, world, torch.device("cpu"))))


def _one_part_missing(patch: pytest.MonkeyPatch, rank: int) -> None:
    """The second rank holds no part of the last norm."""
    apart = compare._weight_distances

    def without(shards: Any, *rest: Any) -> torch.Tensor:
        held = {name: shard for name, shard in shards.table.items() if rank == 0 or name != "norm.weight"}
        return apart(SimpleNamespace(table=held), *rest)  # type: ignore[arg-type]

    patch.setattr(compare, "_weight_distances", without)


def _drifting(patch: pytest.MonkeyPatch, rank: int) -> None:
    """The second copy's norm weights change after the optimizer: no sum shows it in the first step."""
    step = compare.take_step

    def drifting(self: TrainState, *arguments: Any) -> Any:
        numbers = step(self, *arguments)
        if rank == 1 and self.model.world.size > 1:
            self.weights["norm.weight"] *= 1 + 1e-6
        return numbers

    patch.setattr(compare, "take_step", drifting)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch, int], None]] = {
    "gradients are means": lambda patch, rank: faults.gradients_are_means(patch),
    "each rank clips by its own norm": lambda patch, rank: faults.each_rank_clips_by_its_own_norm(patch),
    "a rank begins with another's rows": lambda patch, rank: faults.a_rank_begins_with_other_rows(patch),
    "a part of a weight is nowhere": _one_part_missing,
    "a copy takes another step": _drifting,
}
