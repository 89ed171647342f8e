"""One step over packed documents, and the same with each document by itself, for test_packing_parity.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from titanlite.data.loader import train_loader, validation_batches
from titanlite.data.sources import Source
from titanlite.data.splits import DataSplits, open_data
from titanlite.parallel.world import World
from titanlite.plan.layout import batch_plan, require_layout
from titanlite.recipe.sections import Recipe
from titanlite.training.step import take_step
from titanlite.training.train_state import TrainState


@dataclass(frozen=True)
class Numbers:
    """Of the first step and of validation with the initial weights."""

    loss: float
    grad_norm: float
    validation_loss: float
    bits_per_byte: float


def _begin(rank: int, world: int, recipe_json: str) -> tuple[Recipe, DataSplits, TrainState]:
    recipe = Recipe.model_validate_json(recipe_json)
    learner = TrainState(recipe, World(rank, world, torch.device("cpu")))
    learner.initialise()
    return recipe, open_data(recipe.data, recipe.training.sequence_length, recipe.run.seed), learner


def packed(rank: int, world: int, recipe_json: str) -> Numbers:
    """As the trainer does it."""
    recipe, data, learner = _begin(rank, world, recipe_json)
    layout = require_layout(recipe.parallel, world)
    plan = batch_plan(recipe, layout, layout.coordinates(rank).data)
    (source,) = data.validation
    held_out = learner.model.evaluate(validation_batches(source, source.windows, plan, []))
    loss, norm, _ = take_step(learner, 1, next(train_loader(data.train, plan, [0])), 1.0)
    return Numbers(loss.item(), norm.item(), held_out.loss, held_out.bits_per_byte)


def alone(recipe_json: str) -> Numbers:
    """Each document in a sequence of its own, without a mask or padding, its first token predicted from a separator."""
    _, data, learner = _begin(0, 1, recipe_json)
    model = learner.model.module

    def loss_of(source: Source) -> tuple[torch.Tensor, int]:
        total, tokens = torch.zeros((), dtype=torch.float64), source.beginning(source.tokens).tolist()
        document = [256]
        for token in tokens:
            document.append(token)
            if token == 256:
                whole = torch.tensor([document])
                total = total + model(whole[:, :-1], whole[:, 1:]).double()
                document = [256]
        return total, len(tokens)

    with torch.no_grad():
        held_out, count = loss_of(data.validation[0])
    text_bytes = count - int((data.validation[0].beginning(count) == 256).sum())
    loss, tokens = loss_of(data.train.sources[0])
    (loss / tokens).backward()
    norm = torch.stack([weight.grad.norm() for weight in model.parameters() if weight.grad is not None]).norm()
    return Numbers(
        (loss / tokens).item(), norm.item(), (held_out / count).item(), held_out.item() / math.log(2) / text_bytes
    )
