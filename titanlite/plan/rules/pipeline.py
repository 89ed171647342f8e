"""Rules about `[parallel.pipeline]`: what schedules ask of stages, microbatches and what else is switched on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from titanlite.errors import Finding
from titanlite.plan.layout import batch_plan, layout_of
from titanlite.plan.rules.lookup import find_config, find_spec
from titanlite.plan.stages import (
    IN_ROUNDS,
    V_SHAPED,
    fixes_stages,
    splits_backward,
    stages_per_rank,
    takes_microbatches,
)
from titanlite.recipe.sections import Pipeline, Recipe

if TYPE_CHECKING:
    from titanlite.models.spec import Piece


def pipeline(recipe: Recipe, world: int) -> Iterator[Finding]:
    """The schedule can work through the stages and microbatches, and goes with the other settings."""
    spec, config, layout = find_spec(recipe), find_config(recipe), layout_of(recipe.parallel, world)
    if spec is None or layout is None or layout.pp == 1:
        return
    pieces = spec.pieces(config, recipe.training.sequence_length)
    plan = batch_plan(recipe, layout, 0)
    yield from pipeline_findings(recipe, pieces, bool(spec.tied(config)), plan.microbatches)


def pipeline_findings(recipe: Recipe, pieces: Sequence[Piece], tied: bool, microbatches: int) -> Iterator[Finding]:
    """What a recipe with `pp` above 1 asks of its pipeline that cannot be, each with its fix.

    `tied`: whether the model's first and last piece share a weight. `microbatches`: those of one rank's batch.
    """
    section, pp = recipe.parallel.pipeline, recipe.parallel.pp
    yield from _split_findings(section, pp, pieces)
    yield from _microbatch_findings(section, pp, microbatches)
    schedule = section.schedule
    if tied and schedule in V_SHAPED:
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


def split_backward(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Gradients of weights apart, as torch before 2.13 computes them: for a function of several results, such as the
    fused RMSNorm, it takes the sum of their gradients for the first one's; and it lets go of functions written in
    Python that it comes back to, such as the loss by chunks.
    """
    schedule, layout = recipe.parallel.pipeline.schedule, layout_of(recipe.parallel, world)
    found = version("torch")
    old = tuple(map(int, found.split(".")[:2])) < (2, 13)
    if old and layout is not None and layout.pp > 1 and splits_backward(schedule):
        problem = (
            f"{schedule} needs torch 2.13, and this is {found}, which may compute wrong gradients of weights in it;"
        )
        yield Finding("parallel.pipeline.schedule", problem, "install torch 2.13, or choose 1F1B or Interleaved1F1B.")


def _split_findings(section: Pipeline, pp: int, pieces: Sequence[Piece]) -> Iterator[Finding]:
    stages, blocks = pp * stages_per_rank(section), len(pieces) - 2
    given = section.blocks_per_stage
    if given is None:
        if stages > len(pieces):
            problem = f"{stages} stages ({pp} ranks x {stages_per_rank(section)}) are more than {blocks} blocks,"
            key = "parallel.pp" if fixes_stages(section.schedule) else "parallel.pipeline.stages_per_rank"
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
    if schedule in IN_ROUNDS:
        rounds = microbatches // pp
        more = min((microbatches // rounds + 1) * rounds, pp * (rounds + 1))
        problem = f"{schedule} goes through {microbatches} microbatches in {rounds} rounds, which do not divide them;"
    else:
        more = pp if schedule == "1F1B" else 2 * pp
        problem = f"{schedule} on {pp} ranks fills its stages with {more} microbatches or more, not {microbatches};"
    fix = f"have {more}: by a smaller training.microbatch or another global_batch."
    yield Finding("parallel.pipeline.microbatches", problem, fix)
