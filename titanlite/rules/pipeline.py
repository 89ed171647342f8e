"""Rules about `[parallel.pipeline]`: what schedules ask of stages, microbatches and what else is switched on."""

from __future__ import annotations

from collections.abc import Iterator

from titanlite.errors import Finding
from titanlite.parallel.layout import batch_plan, layout_of
from titanlite.parallel.stages import pipeline_findings
from titanlite.recipe.sections import Recipe
from titanlite.rules.terms import config_of, spec_named


def pipeline(recipe: Recipe, world: int) -> Iterator[Finding]:
    """The schedule can work through the stages and microbatches, and goes with the other settings."""
    spec, config, layout = spec_named(recipe), config_of(recipe), layout_of(recipe.parallel, world)
    if spec is None or layout is None or layout.pp == 1:
        return
    pieces = spec.pieces(config, recipe.training.sequence_length)
    plan = batch_plan(recipe, layout, 0)
    yield from pipeline_findings(recipe, pieces, bool(spec.tied(config)), plan.microbatches)
