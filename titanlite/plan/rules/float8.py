"""Rules about `[precision.float8]`: that it finds something to do, and what cannot be had together with it."""

from __future__ import annotations

from collections.abc import Iterator

from titanlite.errors import Finding
from titanlite.models.spec import is_named_by
from titanlite.plan import float8
from titanlite.plan.layout import layout_of
from titanlite.plan.placement import GroupRank, find_placements, local_slices, pattern_of
from titanlite.plan.rules.layout import cuts
from titanlite.plan.rules.lookup import find_config, find_spec, warning
from titanlite.plan.rules.run import heads
from titanlite.recipe.sections import Recipe


def nothing_converted(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Float8 that is enabled and leaves every linear as it is."""
    found = _decisions(recipe, world)
    if found and all(each.skipped is not None for each in found):
        fix = "lower min_size or shorten exclude, or write enabled = false."
        yield warning("precision.float8.enabled", f"{float8.summarize_linears(found)};", fix)


def exclusions(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Every pattern of `exclude` is the name of a linear."""
    found = _decisions(recipe, world)
    for pattern in recipe.precision.float8.exclude:
        if found and not any(is_named_by((pattern,), each.name) for each in found):
            fix = f"names are such as {found[0].name}, with * for a number (titanlite check --json has them all)."
            yield Finding("precision.float8.exclude", f"no linear is named '{pattern}';", fix)


def shares(recipe: Recipe, world: int) -> Iterator[Finding]:
    """What each tensor parallel rank has of a converted linear can be multiplied in float8, and is worth it.

    Left as it is on this layout alone, it would have other numbers than on others.
    """
    tp, section, spec = recipe.parallel.tp, recipe.precision.float8, find_spec(recipe)
    converted = {pattern_of(f"{each.name}.weight"): each for each in _decisions(recipe, world) if each.skipped is None}
    takes = float8.SETTINGS[section.recipe].alignment
    if spec is None or tp == 1:
        return
    cut = find_placements({name: each.shape for name, each in converted.items()}, spec.sharding(find_config(recipe)))
    for name, placement in cut.items():
        whole, module = converted[name].shape, name.removesuffix(".weight")
        parts = {local_slices(whole, placement, GroupRank(rank, tp))[1] for rank in range(tp)}
        misfit = next((part for part in sorted(parts) if not float8.aligned(part, section)), None)
        rows, columns = min(parts)
        if misfit is not None:
            size = f"{misfit[0]} x {misfit[1]}"
            problem = f"{module} is {size} on a rank, and {section.recipe} takes multiples of {takes};"
            yield Finding("parallel.tp", problem, f'choose another tp, or add "{module}" to precision.float8.exclude.')
        elif float8.mean_size(rows, columns) < section.min_size:
            problem = f"of {module}, {rows} x {columns} on a rank is less than min_size counts on: float8 costs time;"
            yield warning("precision.float8.exclude", problem, f'add "{module}".')


def sent(recipe: Recipe, world: int) -> Iterator[Finding]:
    """What ranks gather can be sent in float8, where it is asked for."""
    key, spec, section = "precision.float8.all_gather", find_spec(recipe), recipe.precision.float8
    layout = layout_of(recipe.parallel, world)
    if spec is None or layout is None or not section.all_gather or not _decisions(recipe, world):
        return
    cut = layout.weights(recipe.parallel.zero_stage)[1] > 1
    if cut and float8.SETTINGS[section.recipe].sent_weights is None:
        problem = f"weights of {section.recipe} travel in the compute dtype: a cast of their rows would take bits;"
        yield warning(key, problem, "for float8, choose tensorwise or rowwise_with_hp_grad_weight.")
    found = float8.plan_gathers(spec, find_config(recipe), section) if layout.tp > 1 else ()
    if found and all(each.cast is None for each in found):
        fix = "for that, choose tensorwise and have the linears that share an input converted together."
        yield warning(key, f"over tp nothing travels in float8: {'; '.join(float8.format_gathers(found))};", fix)


def _decisions(recipe: Recipe, world: int) -> tuple[float8.LinearDecision, ...]:
    """None where the model's sizes do not fit together, which other rules report."""
    spec = find_spec(recipe)
    if spec is None or any(heads(recipe, world)) or any(cuts(recipe, world)):
        return ()
    return float8.decide_linears(spec, find_config(recipe), recipe.precision.float8)
