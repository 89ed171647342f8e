"""The mesh and the batch as arithmetic: where a rank is, and which samples it takes in a step. No torch.

The samples of a step do not depend on the layout: the step that finds p samples read takes samples p … p + B - 1 of the
run, B being `training.global_batch`. Of D data ranks, rank r takes those at positions ≡ r (mod D).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from titanlite.recipe.sections import Parallel, Recipe, Training


@dataclass(frozen=True)
class Layout:
    """Degrees of the mesh. Ranks count through them as pp, dp_replicate, dp_shard, cp, tp, the last one fastest."""

    dp_replicate: int
    dp_shard: int
    cp: int = 1
    tp: int = 1
    pp: int = 1

    @property
    def data_ranks(self) -> int:
        """Groups of ranks that take different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.pp * self.data_ranks * self.cp * self.tp

    def weights(self, zero_stage: int) -> tuple[int, int]:
        """(copies, cut): among the ranks with the same stage and tensor parallel share, how many copies of the weights
        there are, and how many ranks each copy's parameters, gradients or states are cut over.

        Context parallel ranks compute with the same weights on other data, so they are cut over these as well.
        """
        copies, cut = self.dp_replicate, self.dp_shard * self.cp
        return (copies, cut) if zero_stage > 0 else (copies * cut, 1)

    def place(self, rank: int) -> Place:
        """The coordinates of a rank. Tensor parallel ranks are neighbours, so that they lie within one machine."""
        rank, tp = divmod(rank, self.tp)
        rank, cp = divmod(rank, self.cp)
        pp, data = divmod(rank, self.data_ranks)
        return Place(pp=pp, data=data, cp=cp, tp=tp)


@dataclass(frozen=True)
class Place:
    """Where in the mesh a rank is."""

    pp: int
    data: int
    cp: int
    tp: int

    @property
    def counts_sequences(self) -> bool:
        """Whether this rank counts its sequences; the others that have them too do not."""
        return self.pp == self.cp == self.tp == 0


FIRST = Place(pp=0, data=0, cp=0, tp=0)
"""The first rank's, and that of a run without others."""


def layout_of(parallel: Parallel, world: int) -> Layout | None:
    """The mesh that `[parallel]` asks for on `world` ranks; None if its degrees do not multiply to that.

    `dp_shard = -1` takes the ranks that are left; in stage 0 nothing is cut, and they are copies.
    """
    replicate, shard = parallel.dp_replicate, parallel.dp_shard
    if shard == -1:
        shard = world // (replicate * parallel.cp * parallel.tp * parallel.pp)
    if parallel.zero_stage == 0:
        replicate, shard = replicate * shard, 1
    layout = Layout(replicate, shard, parallel.cp, parallel.tp, parallel.pp)
    return layout if layout.size == world else None


def active_ranks(recipe: Recipe, launched: int) -> int:
    """How many of the ranks that were launched train: all, or under `resilience.standby` those of the largest mesh
    that fits. All too if none does: then the rule `mesh` says why.
    """
    if not recipe.resilience.standby:
        return launched
    return next((size for size in range(launched, 0, -1) if layout_of(recipe.parallel, size)), launched)


def agreed_layout(parallel: Parallel, world: int) -> Layout:
    """`layout_of` for a recipe that the check has let through on `world` ranks."""
    layout = layout_of(parallel, world)
    assert layout is not None, "the rule `mesh` refuses this"
    return layout


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
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
    least_microbatches: int = 1

    @property
    def microbatches(self) -> int:
        """The same on every rank, so that collectives pair up: ceil(ceil(global / ranks) / microbatch)."""
        needed = ceil_div(ceil_div(self.global_batch, self.data_ranks), self.microbatch)
        return max(needed, self.least_microbatches)

    def samples(self, first: int) -> list[int | None]:
        """Sample numbers on this rank of the step that begins with sample `first`, `microbatches * microbatch` long;
        None is padding.
        """
        mine: list[int | None] = list(range(first + self.data_rank, first + self.global_batch, self.data_ranks))
        return mine + [None] * (self.microbatches * self.microbatch - len(mine))


@dataclass(frozen=True)
class Course:
    """Which samples each step reads after `step`, which left `samples` of them read or passed over.

    Batches follow each other, but for those that are passed over. Batch b is that of samples from (b - 1) x
    `global_batch` on: the one that step b reads in a run that passes over none and never goes back. What is passed over
    thus depends on the place in the order of samples alone, and is the same wherever a run was resumed.
    """

    step: int
    samples: int
    global_batch: int
    skipped: tuple[int, ...] = ()
    """Batches to pass over, ascending."""

    def first(self, step: int) -> int:
        """The first sample of `step`, one that is to come."""
        batch = self.samples // self.global_batch + 1
        ahead = self.skipped[bisect_left(self.skipped, batch) :]
        taken = step - self.step - 1
        # The n-th of them is met after as many batches as lie before it, less the n that were passed over.
        passed = bisect_right(range(len(ahead)), taken, key=lambda n: ahead[n] - batch - n)
        return self.samples + (taken + passed) * self.global_batch

    def end(self, step: int) -> int:
        """The sample after those of `step`."""
        return self.first(step) + self.global_batch


def course_from(recipe: Recipe, step: int = 0, samples: int = 0) -> Course:
    """The course of a run that has come to `step` and to `samples`."""
    return Course(step, samples, recipe.training.global_batch, tuple(sorted(set(recipe.data.skip_steps))))


def batch_plan(recipe: Recipe, layout: Layout, data_rank: int) -> BatchPlan:
    """The batch arithmetic of a recipe for one data rank.

    Without `training.microbatch` a rank's share is one microbatch, but under a pipeline, which needs several to have
    its stages busy, one sequence is.
    """
    training, pipeline = recipe.training, recipe.parallel.pipeline
    share = ceil_div(training.global_batch, layout.data_ranks)
    if layout.pp == 1:
        return BatchPlan(training.global_batch, layout.data_ranks, data_rank, training.microbatch or share)
    wanted = pipeline.microbatches or share
    microbatch = training.microbatch or ceil_div(share, wanted)
    return BatchPlan(training.global_batch, layout.data_ranks, data_rank, microbatch, pipeline.microbatches or 1)


def total_steps(training: Training) -> int:
    """Optimizer steps of the run: `steps`, or `tokens` rounded up to whole steps."""
    if training.steps is not None:
        return training.steps
    assert training.tokens is not None, "the rule `amount` refuses recipes with neither"
    return ceil_div(training.tokens, training.sequence_length * training.global_batch)
