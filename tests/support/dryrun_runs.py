"""What a real run says, of what dry runs say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from support.parity import parity_runs
from titanlite.dryrun.collectives import Collective, CollectiveLog
from titanlite.dryrun.step import world_dimension
from titanlite.plan.layout import layout_of
from titanlite.recipe.sections import Recipe
from titanlite.training import trainer
from titanlite.training.train_state import TrainState


class Shown(TorchDispatchMode):
    """Real tensors, with every operation on them shown to the log that dry runs write."""

    def __init__(self, log: CollectiveLog) -> None:
        super().__init__()
        self._log = log

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        result = func(*args, **named)
        self._log.record(func, args, named, result)
        return result


def messages_of_two_steps(rank: int, world: int, recipe_json: str) -> list[list[Collective]]:
    """Train for real; all messages of this rank in each of the first two steps, in order."""
    recipe = Recipe.model_validate_json(recipe_json)
    layout = layout_of(recipe.parallel, world)
    assert layout is not None
    logs = [CollectiveLog(world_dimension(layout, recipe.parallel.zero_stage)) for _ in range(2)]
    step: Callable[..., tuple[Tensor, Tensor]] = trainer.take_step

    def shown(learner: TrainState, number: int, *arguments: Any) -> tuple[Tensor, Tensor]:
        with Shown(logs[number - 1]):
            return step(learner, number, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "take_step", shown)
        parity_runs.train(rank, world, recipe_json)
    return [log.recorded for log in logs]
