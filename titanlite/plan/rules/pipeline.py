"""Rules about `[parallel.pipeline]`: what schedules ask of stages and microbatches."""

from __future__ import annotations

from collections.abc import Iterator

from titanlite.errors import Finding
from titanlite.plan.layout import batch_plan, layout_of
from titanlite.plan.rules.lookup import find_config, find_spec
from titanlite.plan.stages import IN_ROUNDS, fixes_stages, stages_per_rank, takes_microbatches
from titanlite.recipe.sections import Recipe


def stages(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Each stage has a part of the model."""
    spec, layout, section = find_spec(recipe), layout_of(recipe.parallel, world), recipe.parallel.pipeline
    if spec is None or layout is None or layout.pp == 1:
        return
    pieces = len(spec.pieces(find_config(recipe), recipe.training.sequence_length))
    number, blocks, given = layout.pp * stages_per_rank(section), pieces - 2, section.blocks_per_stage
    if given is None and number > pieces:
        problem = f"{number} stages ({layout.pp} ranks x {stages_per_rank(section)}) are more than {blocks} blocks,"
        key = "parallel.pp" if fixes_stages(section.schedule) else "parallel.pipeline.stages_per_rank"
        yield Finding(key, f"{problem} the embedding and the head can fill;", f"have at most {pieces} stages.")
    if given is None:
        return
    key, fix = "parallel.pipeline.blocks_per_stage", f"give {number} numbers that add up to {blocks}, or leave it out."
    if len(given) != number:
        problem = f"{len(given)} stages are given where {section.schedule} on {layout.pp} ranks has {number};"
        yield Finding(key, problem, fix)
    elif sum(given) != blocks:
        problem = f"{' + '.join(map(str, given))} = {sum(given)} blocks, and the model has {blocks};"
        yield Finding(key, problem, fix)
    elif not all(given[1:-1]):
        fix = "only the first (with the embedding) and the last (with the head) can do without blocks."
        yield Finding(key, f"stage {given.index(0, 1)} would be empty;", fix)


def microbatches(recipe: Recipe, world: int) -> Iterator[Finding]:
    """The schedule can go through a rank's microbatches."""
    layout, schedule = layout_of(recipe.parallel, world), recipe.parallel.pipeline.schedule
    if layout is None or layout.pp == 1:
        return
    pp, number = layout.pp, batch_plan(recipe, layout, 0).microbatches
    if takes_microbatches(schedule, pp, number):
        return
    if schedule in IN_ROUNDS:
        rounds = number // pp
        more = min((number // rounds + 1) * rounds, pp * (rounds + 1))
        problem = f"{schedule} goes through {number} microbatches in {rounds} rounds, which do not divide them;"
    else:
        more = pp if schedule == "1F1B" else 2 * pp
        problem = f"{schedule} on {pp} ranks fills its stages with {more} microbatches or more, not {number};"
    fix = f"have {more}: by a smaller training.microbatch or another global_batch."
    yield Finding("parallel.pipeline.microbatches", problem, fix)
