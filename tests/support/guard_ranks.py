"""What a rank does in the tests of guards: a whole run of the trainer, with a fault on one of the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from support.parity.parity_runs import open_trainer
from titanlite.errors import TitanliteError
from titanlite.observe.jsonl import Row
from titanlite.parallel.model import ParallelModel
from titanlite.parallel.shards import Shards
from titanlite.plan.rules import apply_rules
from titanlite.recipe.sections import Recipe
from titanlite.training import trainer
from titanlite.training.train_state import TrainState

Ended = tuple[str, list[Row], dict[str, torch.Tensor]]
"""What the run ended with (empty: its last step), its rows, and what the rank then holds of the weights."""


def train(rank: int, world: int, recipe_json: str, folder: str, fault: tuple[str, int, int] | None = None) -> Ended:
    """`fault`: its kind, and the rank and the step (from 1, as the rank counts them) at which it happens."""
    recipe = Recipe.model_validate_json(recipe_json)
    assert not [finding for finding in apply_rules(recipe, world) if finding.severity == "error"]
    said = ""
    with pytest.MonkeyPatch.context() as patch:
        if fault is not None and fault[1] == rank:
            _inject(patch, fault[0], fault[2])
        with open_trainer(rank, world, recipe_json, folder) as (trainer, kept):
            try:
                trainer.train()
            except TitanliteError as error:
                said = f"{type(error).__name__}: {error}"
    weights = {name: shard.tensor.detach().clone() for name, shard in trainer.state.shards.table.items()}
    return said, kept.rows, weights


def _inject(patch: pytest.MonkeyPatch, kind: str, step: int) -> None:
    whole_step, forward_backward, take = trainer.take_step, ParallelModel.forward_backward, Shards.take_gradients
    calls = {"steps": 0, "passes": 0}

    def nan_in_a_gradient(self: Shards) -> None:
        take(self)
        calls["steps"] += 1
        if calls["steps"] == step:
            held = next(tensor for tensor in self.local().values() if tensor.numel())
            assert held.grad is not None
            held.grad.view(-1)[0] = float("nan")

    def flipped(choose: Callable[[TrainState], torch.Tensor]) -> Callable[..., Any]:
        def stepped(self: TrainState, *arguments: Any) -> Any:
            result = whole_step(self, *arguments)
            calls["steps"] += 1
            if calls["steps"] == step:
                choose(self).view(-1)[:1].view(torch.int64).bitwise_xor_(1)  # the last bit of a float64
            return result

        return stepped

    def ruined(self: TrainState, *arguments: Any) -> Any:
        result = whole_step(self, *arguments)
        calls["steps"] += 1
        if calls["steps"] == step:
            [tensor for tensor in self.weights.values() if tensor.numel()][-1].detach().view(-1)[0] = float("inf")
        return result

    def another_loss(self: ParallelModel, batch: Any, valid: torch.Tensor) -> torch.Tensor:
        calls["passes"] += 1
        return forward_backward(self, batch, valid) * (1 + 1e-15 * (calls["passes"] == step))

    def another_gradient(self: Shards) -> None:
        take(self)
        calls["passes"] += 1
        if calls["passes"] == step:
            held = self.local()["norm.weight"]
            assert held.grad is not None
            held.grad.view(-1)[:1].view(torch.int64).bitwise_xor_(1)

    owner: Any
    owner, name, broken = {
        "nan": (Shards, "take_gradients", nan_in_a_gradient),
        "ruined": (trainer, "take_step", ruined),
        "weight": (trainer, "take_step", flipped(lambda self: self.weights["norm.weight"].detach())),
        "moment": (trainer, "take_step", flipped(lambda self: self.optimizer.state()["norm.weight/square"])),
        "loss twice": (ParallelModel, "forward_backward", another_loss),
        "gradient twice": (Shards, "take_gradients", another_gradient),
    }[kind]
    patch.setattr(owner, name, broken)
