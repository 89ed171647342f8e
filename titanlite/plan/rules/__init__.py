"""What can be wrong with a valid recipe on a given number of ranks.

One function a rule, each pure: (recipe, world) -> findings, with the numbers and the fix. Values that are wrong by
themselves never come here: `recipe/load.py` refuses them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from titanlite.errors import Finding
from titanlite.plan.layout import active_ranks
from titanlite.plan.rules import conflicts, data, float8, layout, run
from titanlite.recipe.sections import Recipe

Rule = Callable[[Recipe, int], Iterator[Finding]]

RULES: tuple[Rule, ...] = (
    *(run.amount, run.names, run.heads, run.rope, run.vocabulary, run.ranges, run.schedule, run.decay_rate),
    *(data.homes, data.sources, data.stages, data.never_read),
    *(layout.mesh, layout.cuts, layout.uneven_cuts, layout.sequences, layout.machines, layout.parts),
    *(layout.microbatches, layout.stages, layout.rounds, conflicts.split_backward),
    *(float8.nothing_converted, float8.exclusions, float8.shares, float8.sent),
    *(layout.rounded_sums, layout.padding, run.never_reached, conflicts.unused_keys),
    *(conflicts.checkpoints, conflicts.guards, conflicts.compiler, conflicts.formats, conflicts.memory),
)


def apply_rules(recipe: Recipe, world: int = 1) -> list[Finding]:
    """Every rule's findings for `recipe` on `world` ranks, errors first; `LoadedRecipe.locate` adds file and line."""
    active = active_ranks(recipe, world)
    findings = [finding for rule in RULES for finding in rule(recipe, active)]
    if active < world:
        findings.append(layout.standing_by(active, world))
    return sorted(findings, key=lambda finding: finding.severity != "error")
