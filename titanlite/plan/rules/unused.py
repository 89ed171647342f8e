"""Rules about keys that do nothing beside the others, or that cannot be had together with them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

from titanlite.errors import Finding
from titanlite.optim.base import OPTIMIZERS, optimizer_spec
from titanlite.optim.schedules import SCHEDULES, schedule_named
from titanlite.plan.layout import layout_of
from titanlite.plan.rules.lookup import warning
from titanlite.plan.stages import fixes_stages
from titanlite.recipe.sections import Float8, Pipeline, Recipe

UnusedKey = tuple[str, bool, str]
"""(key, whether it does nothing here, why)"""


def unused_keys(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Keys that were changed from their defaults and do nothing beside the others."""
    defaults = Recipe()
    for key, does_nothing, reason in (*_of_the_run(recipe), *_of_the_layout(recipe, world)):
        if does_nothing and _value(recipe, key) != _value(defaults, key):
            yield warning(key, f"has no effect here: {reason};", "leave it out.")


def _value(recipe: Recipe, key: str) -> Any:
    return reduce(getattr, key.split("."), recipe)


def _of_the_run(recipe: Recipe) -> list[UnusedKey]:
    guards = recipe.resilience
    actions = (guards.on_nonfinite, guards.on_spike)
    return [
        *_of_the_updates(recipe),
        ("resilience.max_skips", "skip" not in actions, "neither on_nonfinite nor on_spike skips"),
        ("resilience.max_rollbacks", "rollback" not in actions, "neither on_nonfinite nor on_spike goes back"),
        *((f"resilience.spike_{key}", guards.on_spike == "off", 'on_spike is "off"') for key in ("zscore", "window")),
        ("data.prefetch", recipe.data.workers == 0, "without data.workers nothing is fetched ahead"),
        ("data.fim_tokens", recipe.data.fim_rate == 0, "data.fim_rate is 0"),
        ("checkpoint.keep_every", recipe.checkpoint.keep_last == 0, "keep_last = 0 keeps every checkpoint"),
        ("checkpoint.keep_best", recipe.checkpoint.keep_last == 0, "keep_last = 0 keeps every checkpoint"),
        ("validation.sequences", recipe.validation.every_steps == 0, "validation.every_steps is 0"),
        ("precision.reduce", recipe.precision.compute == "float64", "a float64 run sums its gradients in float64"),
        *(
            (f"precision.float8.{key}", not recipe.precision.float8.enabled, "precision.float8.enabled is false")
            for key in Float8.model_fields
        ),
        ("kernels.float8_quantise", not recipe.precision.float8.enabled, "precision.float8.enabled is false"),
        ("recompute.every", recipe.recompute.mode == "none", 'recompute.mode is "none"'),
    ]


def _of_the_updates(recipe: Recipe) -> Iterator[UnusedKey]:
    """Keys of `[optimizer]` and `[schedule]` that the chosen ones do not read, by their own account."""
    optimizer, schedule = recipe.optimizer, recipe.schedule
    if optimizer.name in OPTIMIZERS:
        used: tuple[str, ...] = ("name", "clip_norm", *optimizer_spec(optimizer.name).keys)
        unused = [key for key in type(optimizer).model_fields if key not in used]
        yield from ((f"optimizer.{key}", True, f"the optimizer is {optimizer.name}") for key in unused)
    if schedule.name in SCHEDULES:
        used = ("name", "warmup_steps", *schedule_named(schedule.name).keys)
        unused = [key for key in type(schedule).model_fields if key not in used]
        yield from ((f"schedule.{key}", True, f"the schedule is {schedule.name}") for key in unused)


def _of_the_layout(recipe: Recipe, world: int) -> list[UnusedKey]:
    parallel, layout = recipe.parallel, layout_of(recipe.parallel, world)
    stage, pipeline = parallel.zero_stage, parallel.pipeline
    uncut = layout is not None and layout.size > 1 and layout.dp_shard * layout.cp == 1
    copied = layout is None or max(layout.weights(stage)[0], layout.tp, layout.pp) > 1
    cut = layout.weights(stage)[1] if layout is not None else 0
    fixed = parallel.pp > 1 and fixes_stages(pipeline.schedule)
    return [
        *((f"parallel.pipeline.{name}", parallel.pp == 1, "parallel.pp is 1") for name in Pipeline.model_fields),
        ("parallel.pipeline.stages_per_rank", fixed, f"{pipeline.schedule} fixes it"),
        ("resilience.check_replicas_every", not copied, "no rank holds a copy of what another does"),
        ("precision.float8.all_gather", cut == 1 and parallel.tp == 1, "no weights are cut, and no activations"),
        ("parallel.cp_method", parallel.cp == 1, "parallel.cp is 1"),
        ("parallel.async_tp", parallel.tp == 1, "parallel.tp is 1"),
        ("parallel.zero_stage", uncut and stage > 0, "every rank is a copy: there is none to cut over"),
        ("parallel.prefetch", stage == 0 or uncut, "no weights are cut, so none are gathered"),
        ("parallel.dp_shard", stage == 0 and parallel.dp_shard > 1, "in stage 0 nothing is cut, its ranks are copies"),
    ]
