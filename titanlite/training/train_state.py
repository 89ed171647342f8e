"""What a step changes on this rank: a model, its optimizer, and what the guards remember."""

from __future__ import annotations

from titanlite.models.init import initialise
from titanlite.models.shard import Shard
from titanlite.models.spec import spec_of
from titanlite.observe.inspection import NonfiniteFinder
from titanlite.optim.base import Weights, optimizer_spec
from titanlite.parallel.apply import build
from titanlite.parallel.world import World
from titanlite.precision.casting import compute_dtype
from titanlite.recipe.sections import Recipe
from titanlite.resilience.guards import Guards


class TrainState:
    """Everything that a step changes, built as the recipe says; the weights have no values yet."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        self.spec = spec_of(recipe.model.preset)
        self.config = self.spec.configure(recipe.model)
        self.model = build(self.spec, self.config, recipe, world)
        self.shards = self.model.shards
        self.weights = self.shards.local()  # parameter name -> what this rank holds of it
        weights = Weights(self.weights, self.shards.exchange(), world.device)
        build_optimizer = optimizer_spec(recipe.optimizer.name).build
        self.optimizer = build_optimizer(recipe, self.spec, weights, compute_dtype(recipe.precision))
        self.guards = Guards(recipe.resilience, world.device)
        self.finder = NonfiniteFinder(self.model.module) if recipe.debug.find_nonfinite else None
        self.recipe = recipe

    def initialise(self) -> None:
        """Bring everything to its state before the first step, the weights to the values that the seed gives them."""
        initialise(self.shards.table, lambda name: self.spec.initial_std(self.config, name), self.recipe.run.seed)
        for tensor in (*self.optimizer.state().values(), *(each.tensor for each in self.shards.buffers.values())):
            tensor.zero_()
        self.guards.reset()

    def shards_by_name(self) -> dict[str, Shard]:
        """This rank's part of everything that a checkpoint holds, by name.

        What is not here is a function of the recipe, the step and the samples read.
        """
        parts = {"model": self.weights, "optimizer": self.optimizer.state(), "guards": self.guards.state()}
        held = {
            f"{part}.{name}": shard
            for part, tensors in parts.items()
            for name, shard in self.shards.shards_of(tensors).items()
        }
        return held | {f"model.{name}": shard for name, shard in self.shards.buffers.items()}
