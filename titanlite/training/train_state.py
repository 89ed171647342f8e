"""A model with its optimizer on this rank, and the step that they take with a batch.

What `titanlite verify` proves is what the trainer runs, because both run this. No data, files or logs here.
"""

from __future__ import annotations

from torch import Tensor

from titanlite.models.init import initialise
from titanlite.models.shard import Shard
from titanlite.models.spec import spec_of
from titanlite.observe.inspection import NonfiniteFinder
from titanlite.optim.base import Weights, optimizer_spec
from titanlite.parallel.apply import build
from titanlite.parallel.model import Batch
from titanlite.parallel.world import World
from titanlite.precision.casting import compute_dtype
from titanlite.recipe.sections import Recipe
from titanlite.resilience.corruption import checksums, compare_repeated
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
        self._finder = NonfiniteFinder(self.model.module) if recipe.debug.find_nonfinite else None
        self._recipe = recipe
        self._ranks = world

    def initialise(self) -> None:
        """Bring everything to its state before the first step, the weights to the values that the seed gives them."""
        initialise(self.shards.table, lambda name: self.spec.initial_std(self.config, name), self._recipe.run.seed)
        for tensor in self.optimizer.state().values():
            tensor.zero_()
        self.guards.reset()

    def shards_by_name(self) -> dict[str, Shard]:
        """This rank's part of everything that a checkpoint holds, by name.

        What is not here is a function of the recipe, the step and the samples read.
        """
        parts = {"model": self.weights, "optimizer": self.optimizer.state(), "guards": self.guards.state()}
        return {
            f"{part}.{name}": shard
            for part, tensors in parts.items()
            for name, shard in self.shards.shards_of(tensors).items()
        }

    def step(self, number: int, batch: Batch, factor: float) -> tuple[Tensor, Tensor]:
        """Optimizer step `number` (from 1) at `factor` times the peak rates; the host only queues work.

        Returns the loss of the global batch and the norm of its gradient before clipping, on the device. Only every
        `resilience.rerun_every` steps the host waits: to compare, and all raise `GuardStop` where bits differ.
        """
        if self._finder is not None:
            self._finder.step = number
        every = self._recipe.resilience.rerun_every
        twice = every > 0 and number % every == 0
        loss = self._compute_twice(number, batch) if twice else self.model.forward_backward(batch)
        norm = self.shards.clip_gradients(self._recipe.optimizer.clip_norm)
        # With weights that rest in the host's memory the norm is there, and the step waits for it.
        taken = self.guards.judge(number, loss, norm.to(loss.device)).to(norm.device)
        self.optimizer.step(factor, taken)
        self.shards.drop_gradients()
        return loss, norm

    def _compute_twice(self, number: int, batch: Batch) -> Tensor:
        """`ParallelModel.forward_backward` whose result is proved to have the same bits as that of a first try."""
        found = []  # checksums of this rank's part of the loss, and of the gradients held here
        for _ in range(2):
            self.shards.drop_gradients()
            own = self.model.compute(batch)
            loss = self.model.sum(own)
            found.append(checksums([own, *(weight.grad for weight in self.weights.values())]))  # type: ignore[list-item]
        names = ["the loss", *(f"the gradient of {name}" for name in self.weights)]
        compare_repeated(number, names, found[0], found[1], self._ranks)
        return loss
