"""Batch arithmetic: which samples a data rank takes in a step. Pure functions, no torch.

The samples of a step do not depend on the layout: step s (from 0) takes samples s*B … s*B + B - 1 of the run,
B being `training.global_batch`. Of D data ranks, rank r takes those at positions ≡ r (mod D).
"""

from __future__ import annotations

from dataclasses import dataclass

from titanlite.recipe.sections import Parallel, Training


@dataclass(frozen=True)
class Layout:
    """Degrees of the mesh, outer to inner."""

    dp_replicate: int
    dp_shard: int

    @property
    def data_ranks(self) -> int:
        """Ranks that take different sequences."""
        return self.dp_replicate * self.dp_shard


def layout_of(parallel: Parallel, world: int) -> Layout | None:
    """The mesh that `[parallel]` asks for on `world` ranks; None if its degrees do not multiply to that.

    `dp_shard = -1` takes the ranks that are left; in stage 0 nothing is cut, and they are copies.
    """
    replicate, shard = parallel.dp_replicate, parallel.dp_shard
    if shard == -1:
        shard = world // replicate
    if parallel.zero_stage == 0:
        replicate, shard = replicate * shard, 1
    return Layout(replicate, shard) if replicate * shard == world else None


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class BatchPlan:
    """A step's share of one data rank: `microbatches` passes over `microbatch` sequences each.

    Where the share does not fill the last microbatch, the rest is padding: sequences of zero weight.
    """

    global_batch: int
    data_ranks: int
    data_rank: int
    microbatch: int

    @property
    def microbatches(self) -> int:
        """The same on every rank, so that collectives pair up: ceil(ceil(global / ranks) / microbatch)."""
        return ceil_div(ceil_div(self.global_batch, self.data_ranks), self.microbatch)

    def samples(self, step: int) -> list[int | None]:
        """Sample numbers of `step` (counted from 0) on this rank, `microbatches * microbatch` long; None is padding."""
        first = step * self.global_batch
        mine: list[int | None] = list(range(first + self.data_rank, first + self.global_batch, self.data_ranks))
        return mine + [None] * (self.microbatches * self.microbatch - len(mine))


def batch_plan(training: Training, data_ranks: int, data_rank: int) -> BatchPlan:
    """The batch arithmetic of a recipe's `[training]` for one data rank."""
    microbatch = training.microbatch or ceil_div(training.global_batch, data_ranks)
    return BatchPlan(training.global_batch, data_ranks, data_rank, microbatch)


def total_steps(training: Training) -> int:
    """Optimizer steps of the run: `steps`, or `tokens` rounded up to whole steps."""
    if training.steps is not None:
        return training.steps
    assert training.tokens is not None, "check.py refuses recipes with neither"
    return ceil_div(training.tokens, training.sequence_length * training.global_batch)
