"""A model with its optimizer on this rank, and the step that they take with a batch.

What `titanlite verify` proves is what the trainer runs, because both run this. No data, files or logs here.
"""

from __future__ import annotations

from torch import Tensor

from titanlite.data.loader import Batch
from titanlite.models.init import initialise
from titanlite.models.spec import spec_of
from titanlite.optim.build import Weights, build_optimizer
from titanlite.optim.clip import clip_gradients
from titanlite.parallel.apply import build
from titanlite.parallel.world import World
from titanlite.precision.casting import compute_dtype
from titanlite.recipe.sections import Recipe
from titanlite.resilience.guards import Guards


class Learner:
    """Everything that a step changes, built as the recipe says; the weights have no values yet."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        self.spec = spec_of(recipe.model.preset)
        self.config = self.spec.configure(recipe.model)
        self.program = build(self.spec, self.config, recipe, world)
        self.shards = self.program.shards
        self.weights = self.shards.local()
        """Parameter name -> what this rank holds of it."""
        weights = Weights(self.weights, self.shards.exchange())
        self.optimizer = build_optimizer(recipe.optimizer, self.spec, weights, compute_dtype(recipe.precision))
        self.guards = Guards(recipe.resilience, world.device)
        self._recipe = recipe
        self._ranks = world.size
        self._parts = self.shards.parts()

    def initialise(self) -> None:
        """Set the weights to the values that the recipe's seed gives them."""
        initialise(self.shards.table, lambda name: self.spec.initial_std(self.config, name), self._recipe.run.seed)

    def step(self, number: int, batch: Batch, factor: float) -> tuple[Tensor, Tensor]:
        """Optimizer step `number` (from 1) at `factor` times the peak rates; the host only queues work.

        Returns the loss of the global batch and the norm of its gradient before clipping, on the device.
        """
        loss = self.program.forward_backward(batch)
        norm = clip_gradients(
            self.weights.values(), self._recipe.optimizer.clip_norm, ranks=self._ranks, parts=self._parts
        )
        # With weights that rest in the host's memory the norm is there, and the step waits for it.
        taken = self.guards.judge(number, loss, norm.to(loss.device)).to(norm.device)
        self.optimizer.step(factor, taken)
        self.shards.drop_gradients()
        return loss, norm
