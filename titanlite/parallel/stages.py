"""How a pipeline is laid out: which modules make a stage, which rank holds it, and what its schedule asks for.

Pure functions of the recipe, without torch. Nothing here moves a tensor; `pipeline.py` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from titanlite.errors import Finding
from titanlite.recipe.sections import Pipeline, Recipe

if TYPE_CHECKING:
    from titanlite.models.spec import Piece

_ONE_STAGE = ("GPipe", "1F1B")
_V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
_IN_ROUNDS = ("Interleaved1F1B", "InterleavedZeroBubble")


@dataclass(frozen=True)
class Stage:
    """Consecutive pieces of a model on one rank of its pipeline."""

    index: int
    """Place in the order of computation, from 0."""
    rank: int
    """Coordinate in the pipeline of the rank that holds it."""
    modules: tuple[str, ...]
    """Names of the submodules."""
    blocks: int
    """Pieces between the embedding's and the head's."""
    flops: int
    """Operations of a training step per token."""


def stages_per_rank(pipeline: Pipeline) -> int:
    """Stages that each rank holds, which the schedule fixes or leaves open."""
    if pipeline.schedule in _ONE_STAGE:
        return 1
    return 2 if pipeline.schedule in _V_SHAPED else pipeline.stages_per_rank


def rank_of_stage(schedule: str, index: int, pp: int) -> int:
    """Stages go round the ranks again and again, or down and up again as a V: 0 1 2 2 1 0."""
    if schedule in _V_SHAPED and index >= pp:
        return 2 * pp - 1 - index
    return index % pp


def splits_backward(schedule: str) -> bool:
    """Whether gradients of inputs and of weights are computed apart, the latter when a rank would idle."""
    return schedule == "InterleavedZeroBubble" or schedule in _V_SHAPED


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


_Value = tuple[float, ...]


def _balanced(costs: Sequence[int], stages: int) -> list[int]:
    """Where each stage ends: the exact answer, in O(pieces² x stages)."""
    sums = list(accumulate(costs, initial=0))

    def largest(value: _Value, first: int, last: int) -> _Value:
        return (max(value[0], sums[last] - sums[first]),)

    (limit,), _ = _best_cut(len(costs), stages, (0,), largest)

    def unevenness(value: _Value, first: int, last: int) -> _Value:
        cost = sums[last] - sums[first]
        without_blocks = min(last, len(costs) - 1) <= max(first, 1)
        return (value[0] + without_blocks, value[1] + cost**2) if cost <= limit else (math.inf, math.inf)

    return list(_best_cut(len(costs), stages, (0, 0), unevenness)[1])


def _best_cut(
    pieces: int, stages: int, start: _Value, extend: Callable[[_Value, int, int], _Value]
) -> tuple[_Value, tuple[int, ...]]:
    """The smallest value of a cut of all pieces into stages of at least one, and where each stage ends.

    `extend(value, first, last)`: the value with one more stage, of pieces first … last - 1; never less than before.
    """
    row: dict[int, tuple[_Value, tuple[int, ...]]] = {0: (start, ())}
    for stage in range(1, stages + 1):
        longer: dict[int, tuple[_Value, tuple[int, ...]]] = {}
        for last in range(stage, pieces - stages + stage + 1):
            value, first = min((extend(row[first][0], first, last), first) for first in row if first < last)
            longer[last] = (value, (*row[first][1], last))
        row = longer
    return row[pieces]


def pipeline_findings(recipe: Recipe, pieces: Sequence[Piece], tied: bool, microbatches: int) -> Iterator[Finding]:
    """What a recipe with `pp` above 1 asks of its pipeline that cannot be, each with its fix.

    `tied`: whether the model's first and last piece share a weight. `microbatches`: those of one rank's batch.
    """
    section, pp = recipe.parallel.pipeline, recipe.parallel.pp
    yield from _split_findings(section, pp, pieces)
    yield from _microbatch_findings(section, pp, microbatches)
    schedule = section.schedule
    if tied and schedule in _V_SHAPED:
        problem = f"{schedule} has the first and the last stage on one rank, and they share the tied embedding;"
        yield Finding(
            "parallel.pipeline.schedule", problem, "choose another schedule, or model.tie_embeddings = false."
        )
    if recipe.parallel.zero_stage == 3 and splits_backward(schedule):
        problem = f"{schedule} needs the weights where stage 3 has released them, and would compute wrong gradients;"
        yield Finding("parallel.zero_stage", problem, "write zero_stage = 2, or choose 1F1B or Interleaved1F1B.")
    if recipe.recompute.mode != "none" and splits_backward(schedule):
        problem = f"{schedule} goes through a block's graph once for its inputs and once for each of its weights, and"
        fix = 'write "none", or choose 1F1B or Interleaved1F1B.'
        yield Finding("recompute.mode", f"{problem} would compute the block anew each time;", fix)
    if recipe.compile.enabled and splits_backward(schedule):
        problem = f"{schedule} computes gradients of inputs and of weights apart, and compiled blocks only know both;"
        yield Finding("compile.enabled", problem, "write false, or choose 1F1B or Interleaved1F1B.")


def _split_findings(section: Pipeline, pp: int, pieces: Sequence[Piece]) -> Iterator[Finding]:
    stages, blocks = pp * stages_per_rank(section), len(pieces) - 2
    given = section.blocks_per_stage
    if given is None:
        if stages > len(pieces):
            chosen = section.schedule not in (*_ONE_STAGE, *_V_SHAPED)
            problem = f"{stages} stages ({pp} ranks x {stages_per_rank(section)}) are more than {blocks} blocks,"
            key = "parallel.pipeline.stages_per_rank" if chosen else "parallel.pp"
            yield Finding(key, f"{problem} the embedding and the head can fill;", f"have at most {len(pieces)} stages.")
        return
    key = "parallel.pipeline.blocks_per_stage"
    if len(given) != stages:
        problem = f"{len(given)} stages are given where {section.schedule} on {pp} ranks has {stages};"
        yield Finding(key, problem, f"give {stages} numbers that add up to {blocks}, or leave it out.")
    elif sum(given) != blocks:
        problem = f"{' + '.join(map(str, given))} = {sum(given)} blocks, and the model has {blocks};"
        yield Finding(key, problem, f"give {stages} numbers that add up to {blocks}, or leave it out.")
    elif not all(given[1:-1]):
        fix = "only the first (with the embedding) and the last (with the head) can do without blocks."
        yield Finding(key, f"stage {given.index(0, 1)} would be empty;", fix)


def _microbatch_findings(section: Pipeline, pp: int, microbatches: int) -> Iterator[Finding]:
    schedule = section.schedule
    if takes_microbatches(schedule, pp, microbatches):
        return
    if schedule in _IN_ROUNDS:
        rounds = microbatches // pp
        problem = f"{schedule} goes through {microbatches} microbatches in {rounds} rounds, which do not divide them;"
    else:
        least = pp if schedule == "1F1B" else 2 * pp
        problem = f"{schedule} on {pp} ranks fills its stages with {least} microbatches or more, not {microbatches};"
    more = next(n for n in range(microbatches + 1, microbatches + 2 * pp + 1) if takes_microbatches(schedule, pp, n))
    fix = f"have {more}: by a smaller training.microbatch or another global_batch."
    yield Finding("parallel.pipeline.microbatches", problem, fix)


def takes_microbatches(schedule: str, pp: int, microbatches: int) -> bool:
    """Whether `schedule` can work through so many microbatches on `pp` ranks.

    1F1B and DualPipeV must be able to fill all their stages. The interleaved ones go in max(1, n // pp) rounds of the
    same number of microbatches.
    """
    if schedule in _IN_ROUNDS:
        return microbatches % max(1, microbatches // pp) == 0
    return microbatches >= {"1F1B": pp, "DualPipeV": 2 * pp}.get(schedule, 1)
