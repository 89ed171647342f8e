"""The mesh and the batch as arithmetic: where a rank is, and which samples it takes in a step.

On any layout, the step that finds p samples read takes samples p … p + B - 1 of the run, B being
`training.global_batch`. Of D data ranks, rank r takes those at positions ≡ r (mod D).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from titanlite.recipe.sections import Parallel, Recipe, Training


@dataclass(frozen=True)
class Layout:
    """Degrees of the mesh. Ranks count through them as pp, dp_replicate, dp_shard, cp, tp, the last one fastest; ep
    borrows the fastest of dp_shard x cp x tp.
    """

    dp_replicate: int
    dp_shard: int
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1

    @property
    def data_ranks(self) -> int:
        """Groups of ranks that take different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def size(self) -> int:
        return self.pp * self.data_ranks * self.cp * self.tp

    def weights(self, zero_stage: int) -> tuple[int, int]:
        """(replicas, shards) of the weights among the ranks with the same stage and tensor parallel part.

        Context parallel ranks compute with the same weights on other data, so they share in the sharding.
        """
        copies, cut = self.dp_replicate, self.dp_shard * self.cp
        return (copies, cut) if zero_stage > 0 else (copies * cut, 1)

    def coordinates(self, rank: int) -> Coordinates:
        """Where a rank is. Tensor parallel ranks are neighbours, so that they lie within one machine."""
        rank, tp = divmod(rank, self.tp)
        rank, cp = divmod(rank, self.cp)
        pp, data = divmod(rank, self.data_ranks)
        return Coordinates(pp=pp, data=data, cp=cp, tp=tp)


@dataclass(frozen=True)
class Coordinates:
    pp: int
    data: int
    cp: int
    tp: int

    @property
    def is_batch_leader(self) -> bool:
        """Whether this rank counts its sequences, of the ranks that have the same ones."""
        return self.pp == self.cp == self.tp == 0


ORIGIN = Coordinates(pp=0, data=0, cp=0, tp=0)  # the first rank's, and those of a run on one rank


def layout_of(parallel: Parallel, world: int) -> Layout | None:
    """The mesh that `[parallel]` asks for on `world` ranks; None if its degrees do not multiply to that."""
    replicate, shard = parallel.dp_replicate, parallel.dp_shard
    if shard == -1:
        shard = world // (replicate * parallel.cp * parallel.tp * parallel.pp)  # the ranks that are left
    if parallel.zero_stage == 0:
        replicate, shard = replicate * shard, 1  # nothing is cut
    layout = Layout(replicate, shard, parallel.cp, parallel.tp, parallel.pp, parallel.ep)
    return layout if layout.size == world else None


def active_ranks(recipe: Recipe, launched: int) -> int:
    """How many of the launched ranks train: all, or under `resilience.standby` those of the largest mesh that fits."""
    if not recipe.resilience.standby:
        return launched
    meshes = (layout_of(recipe.parallel, size) for size in range(launched, 0, -1))
    return next((each.size for each in meshes if each and each.dp_shard * each.cp * each.tp % each.ep == 0), launched)


def require_layout(parallel: Parallel, world: int) -> Layout:
    """`layout_of` for a recipe that was checked for `world` ranks."""
    layout = layout_of(parallel, world)
    assert layout is not None, "the rule `mesh` refuses this"
    return layout


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def divisors(number: int) -> list[int]:
    """From 1 to `number`; beyond 10^8, those that a short search finds."""
    small = [divisor for divisor in range(1, min(math.isqrt(number), 10_000) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


@dataclass(frozen=True)
class BatchPlan:
    """A data rank's part of a step: `microbatches` passes over `microbatch` sequences each, the last ones padding."""

    global_batch: int
    data_ranks: int
    data_rank: int
    microbatch: int
    least_microbatches: int = 1

    @property
    def microbatches(self) -> int:
        """The same on every rank, so that collectives pair up."""
        needed = ceil_div(ceil_div(self.global_batch, self.data_ranks), self.microbatch)
        return max(needed, self.least_microbatches)

    def samples(self, first: int) -> range:
        """Sample numbers on this rank of the step that begins with sample `first`; padding has none."""
        return range(first + self.data_rank, first + self.global_batch, self.data_ranks)


@dataclass(frozen=True)
class SampleSchedule:
    """Which samples each step after `step` reads; up to it, `samples` were read or skipped.

    Steps take batches in order, but for the `skipped` ones; batch b holds the samples from (b - 1) x `global_batch` on,
    wherever a run was resumed.
    """

    step: int
    samples: int
    global_batch: int
    skipped: tuple[int, ...] = ()  # batches to skip, ascending

    def first_sample(self, step: int) -> int:
        """The first sample of `step`, which is later than `self.step`."""
        batch = self.samples // self.global_batch + 1
        ahead = self.skipped[bisect_left(self.skipped, batch) :]
        taken = step - self.step - 1
        # The n-th of them is met after as many batches as lie before it, less the n that were skipped.
        passed = bisect_right(range(len(ahead)), taken, key=lambda n: ahead[n] - batch - n)
        return self.samples + (taken + passed) * self.global_batch

    def end_sample(self, step: int) -> int:
        """The sample after those of `step`."""
        return self.first_sample(step) + self.global_batch


def sample_schedule(recipe: Recipe, step: int = 0, samples: int = 0) -> SampleSchedule:
    return SampleSchedule(step, samples, recipe.training.global_batch, tuple(sorted(set(recipe.data.skip_steps))))


def batch_plan(recipe: Recipe, layout: Layout, data_rank: int) -> BatchPlan:
    """Without `training.microbatch`, a rank's sequences are one microbatch; under a pipeline, which needs several to
    keep its stages busy, they are divided into `pipeline.microbatches`, or each is one.
    """
    training, pipeline = recipe.training, recipe.parallel.pipeline
    microbatch, least = training.microbatch, 1
    sequences = ceil_div(training.global_batch, layout.data_ranks)
    if layout.pp > 1:
        least = pipeline.microbatches or 1
        microbatch = microbatch or ceil_div(sequences, pipeline.microbatches or sequences)
    return BatchPlan(training.global_batch, layout.data_ranks, data_rank, microbatch or sequences, least)


def total_steps(training: Training) -> int:
    """Optimizer steps of the run: `steps`, or `tokens` rounded up to whole steps."""
    if training.steps is not None:
        return training.steps
    assert training.tokens is not None, "the rule `amount` refuses recipes with neither"
    return ceil_div(training.tokens, training.sequence_length * training.global_batch)
