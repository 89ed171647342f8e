"""What can be wrong with a valid recipe on a given number of ranks.

One function a rule, each pure: (recipe, facts) -> findings, with the numbers and the fix. Values that are wrong by
themselves never come here: `recipe/load.py` refuses them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from titanlite.errors import Finding, warning
from titanlite.plan.layout import active_ranks, layout_of, total_steps
from titanlite.plan.rules import conflicts, layout, run
from titanlite.recipe.sections import Recipe
from titanlite.text import pluralize

RULES: dict[str, tuple[Callable[..., Iterator[Finding]], ...]] = {
    "ranks": (
        *(run.amount, run.names, run.heads, run.windows, run.rope, run.vocabulary, run.ranges, run.decay_rate),
        *(run.paths, run.sources, run.stages, layout.mesh, layout.cuts, layout.sequences, layout.machines),
        *(conflicts.together, conflicts.regretted, conflicts.unused_keys),
    ),
    "steps": (run.schedule, run.never_reached),
    "mesh": (layout.padding, layout.stages, layout.rounds, layout.rounded_sums, conflicts.split_backward),
    "model": (layout.conversions,),
    "model, mesh": (layout.sent, layout.experts),
    "placed model": (layout.parts, layout.uneven_cuts, layout.converted_parts),
}
"""Each rule by the facts that it takes, and waits for: a model that `heads` refuses is not known, and one that `cuts`,
`stages` or `experts` refuses has no place.
"""


def apply_rules(recipe: Recipe, world: int = 1) -> list[Finding]:
    """Every rule's findings for `recipe` on `world` ranks, errors first; `LoadedRecipe.locate` adds file and line."""
    ranks = active_ranks(recipe, world)
    amounts = (recipe.training.steps, recipe.training.tokens)
    steps = total_steps(recipe.training) if amounts.count(None) == 1 else None  # the rule `amount` wants one of the two
    mesh = layout_of(recipe.parallel, ranks)
    model = (None, None) if any(run.heads(recipe, ranks)) else run.find_model(recipe)
    facts: dict[str, tuple[Any, ...]] = {"ranks": (ranks,), "steps": (steps,), "mesh": (mesh,), "model": model}
    facts["model, mesh"] = placed = (*model, mesh)
    if mesh is not None and None not in model:
        refused = (layout.cuts(recipe, ranks), layout.stages(recipe, mesh), layout.experts(recipe, *placed))
        if not any(finding.severity == "error" for findings in refused for finding in findings):
            facts["placed model"] = placed
    known = [(rule, facts[which]) for which in facts if None not in facts[which] for rule in RULES[which]]
    findings = [finding for rule, values in known for finding in rule(recipe, *values)]
    if ranks < world:
        problem = f"the largest mesh that fits takes {pluralize(ranks, 'rank')}: {world - ranks} of {world} stand by"
        findings.append(warning("resilience.standby", problem, "until the run starts with other ranks."))
    return sorted(findings, key=lambda finding: finding.severity != "error")
