"""How a pipeline is laid out: which modules make a stage, which rank holds it, and what its schedule asks for."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from titanlite.models.spec import Piece, spec_of
from titanlite.plan.layout import Layout
from titanlite.recipe.sections import Pipeline, Recipe

# Schedules …
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")  # with the first and the last stage on the first rank
IN_ROUNDS = ("Interleaved1F1B", "InterleavedZeroBubble")  # that take the microbatches in rounds of equal size
SPLIT_BACKWARD = ("InterleavedZeroBubble", *V_SHAPED)  # that compute gradients of weights later, when a rank would idle
ALL_FORWARD_FIRST = ("GPipe", "LoopedBFS")  # whose last stage runs all microbatches forward before one backward
FIXED_STAGES = {"GPipe": 1, "1F1B": 1, **dict.fromkeys(V_SHAPED, 2)}  # that fix how many stages a rank holds


@dataclass(frozen=True)
class Stage:
    """Consecutive pieces of a model on one rank of its pipeline."""

    index: int  # place in the order of computation, from 0
    rank: int  # coordinate in the pipeline of the rank that holds it
    modules: tuple[str, ...]  # names of the submodules
    blocks: int  # pieces between the embedding's and the head's
    flops: int  # operations of a training step per token


def stages_per_rank(pipeline: Pipeline) -> int:
    return FIXED_STAGES.get(pipeline.schedule, pipeline.stages_per_rank)


def rank_of_stage(schedule: str, index: int, pp: int) -> int:
    """Stages go round the ranks again and again, or down and up again as a V: 0 1 2 2 1 0."""
    if schedule in V_SHAPED and index >= pp:
        return 2 * pp - 1 - index
    return index % pp


def stage_split(pieces: Sequence[Piece], pipeline: Pipeline, pp: int) -> tuple[Stage, ...]:
    """The stages of `pp` ranks, first to last: `blocks_per_stage`, or the split whose largest stage is smallest.

    Of the splits that are equal in that, one with blocks in every stage and, then, the most even one. The first piece
    and the last (embedding and head) are counted at their cost and may make a stage alone.
    """
    stages = pp * stages_per_rank(pipeline)
    if pipeline.blocks_per_stage is None:
        ends = _balanced([piece.flops for piece in pieces], stages)
    else:
        ends = [1 + end for end in accumulate(pipeline.blocks_per_stage)]
        ends[-1] += 1
    return tuple(
        Stage(
            index=index,
            rank=rank_of_stage(pipeline.schedule, index, pp),
            modules=tuple(name for piece in pieces[first:last] for name in piece.modules),
            blocks=min(last, len(pieces) - 1) - max(first, 1),
            flops=sum(piece.flops for piece in pieces[first:last]),
        )
        for index, (first, last) in enumerate(zip([0, *ends], ends, strict=False))
    )


def stages_of(recipe: Recipe, layout: Layout) -> tuple[Stage, ...]:
    """The pipeline's stages, first to last; the whole model is one where there is no pipeline."""
    spec = spec_of(recipe.model.preset)
    pieces = spec.pieces(spec.configure(recipe.model), recipe.training.sequence_length)
    return stage_split(pieces, recipe.parallel.pipeline if layout.pp > 1 else Pipeline(schedule="GPipe"), layout.pp)


def _balanced(costs: Sequence[int], stages: int) -> list[int]:
    """Where each stage ends: the exact answer."""
    pieces, sums = len(costs), list(accumulate(costs, initial=0))

    def latest(limit: int) -> list[int]:
        """Where stages end at the latest that cost no more than this, each leaving a piece to each that follows."""
        ends = [0]
        for following in reversed(range(stages)):
            ends.append(min(bisect_right(sums, sums[ends[-1]] + limit) - 1, pieces - following))
        return ends[1:]

    limit, enough = -1, sums[-1]
    while enough - limit > 1:  # not `bisect`: operations may exceed 64 bits
        middle = (limit + enough) // 2
        limit, enough = (limit, middle) if latest(middle)[-1] == pieces else (middle, enough)

    earliest = [pieces]  # where stages end, last to first, if those that follow have room for the rest
    for stage in reversed(range(1, stages)):
        earliest.append(max(stage, bisect_left(sums, sums[earliest[-1]] - enough)))

    def value(first: int, last: int) -> int:
        without_blocks = min(last, pieces - 1) <= max(first, 1)
        return (sums[last] - sums[first]) ** 2 + without_blocks * sums[-1] ** 2 * 2

    # Where a stage ends -> the value of the best cut up to there (the least is best), and where the stage begins.
    cuts: list[dict[int, tuple[int, int]]] = [{0: (0, 0)}]

    def fill(ends: range, begins: range) -> None:
        """The last row of `cuts`, from its middle on, since stages that end earlier begin no later."""
        if ends:
            half = len(ends) // 2
            end = ends[half]
            able = range(max(begins.start, bisect_left(sums, sums[end] - enough)), min(begins.stop, end))
            cuts[-1][end] = min((cuts[-2][begin][0] + value(begin, end), begin) for begin in able)
            fill(ends[:half], range(begins.start, cuts[-1][end][1] + 1))
            fill(ends[half + 1 :], range(cuts[-1][end][1], begins.stop))

    for first, last in zip(reversed(earliest), latest(enough), strict=True):
        begins = range(min(cuts[-1]), max(cuts[-1]) + 1)
        cuts.append({})
        fill(range(first, last + 1), begins)
    ends = [pieces]
    for row in cuts[:1:-1]:
        ends.append(row[ends[-1]][1])
    return ends[::-1]


def takes_microbatches(schedule: str, pp: int, microbatches: int) -> bool:
    """Whether `schedule` can work through this many microbatches on `pp` ranks: 1F1B and DualPipeV must fill all their
    stages, the interleaved ones go in max(1, n // pp) rounds of the same number of microbatches.
    """
    if schedule in IN_ROUNDS:
        return microbatches % max(1, microbatches // pp) == 0
    return microbatches >= {"1F1B": pp, "DualPipeV": 2 * pp}.get(schedule, 1)
