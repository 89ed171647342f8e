"""What a run will be, by arithmetic on the recipe: sizes, batches, mesh, stages, what each rank keeps, operations; and
its sharding plan as a table. Knows neither devices nor torch, guesses neither time nor activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from math import prod
from typing import Any

from titanlite.models.spec import ModelConfig, ModelSpec, ShardingRule, Style, spec_of
from titanlite.plan.float8 import SETTINGS, decide_linears, format_gathers, plan_gathers, summarize_linears
from titanlite.plan.layout import ORIGIN, Layout, active_ranks, batch_plan, require_layout, total_steps
from titanlite.plan.memory import checkpoint_bytes, count_elements, local_parameters, module_within, state_bytes
from titanlite.plan.placement import SHARD_DIMENSION, GroupRank, Shape, find_placements, local_shape, pattern_of
from titanlite.plan.stages import splits_backward, stages_of
from titanlite.recipe.sections import Model, Recipe
from titanlite.text import format_shape, format_table

WEIGHTS_DEPEND_NOT_ON = ("init_std", "depth_scaled_init")
"""Keys of `[model]` that say nothing of a model whose weights are there."""

_MESSAGES: dict[Style, str] = {
    "vocab": "rows found: reduce-scatter; backward all-gather",
    "gather": "input: all-gather; backward reduce-scatter",
    "column": "nothing",
    "row": "output: reduce-scatter; backward all-gather",
    "loss": "three numbers a token",
    "attention": "keys and values: all-gather; backward reduce-scatter",
    "mask": "document numbers: all-gather",
}


def describe_run(recipe: Recipe, world: int = 1) -> dict[str, Any]:
    """A recipe without errors on `world` ranks."""
    standby = world - (world := active_ranks(recipe, world))
    spec, layout = spec_of(recipe.model.preset), require_layout(recipe.parallel, world)
    config, training = spec.configure(recipe.model), recipe.training
    plan, steps = batch_plan(recipe, layout, ORIGIN.data), total_steps(training)
    tokens_per_step = training.global_batch * training.sequence_length
    flops_per_token = spec.flops_per_token(config, training.sequence_length)
    ranks = local_parameters(recipe, layout)
    return {
        "name": recipe.run.name,
        "preset": recipe.model.preset,
        "changed": list(model_differences(Model(preset=recipe.model.preset), recipe.model)),
        "architecture": (
            spec.to_huggingface_config(config)["architectures"][0] if spec.huggingface_classes else spec.family
        ),
        **{field.name: getattr(config, field.name) for field in fields(ModelConfig)},
        "rope_scaling": None if config.rope_scaling is None else config.rope_scaling.model_dump(),
        "parameters": spec.parameter_count(config),
        "embedding_parameters": spec.embedding_parameters(config),
        "steps": steps,
        "tokens": steps * tokens_per_step,
        "tokens_per_step": tokens_per_step,
        "sequence_length": training.sequence_length,
        "global_batch": training.global_batch,
        "world": world,
        "standby": standby,
        "mesh": {name: getattr(layout, name) for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp")},
        "data_ranks": layout.data_ranks,
        "microbatch": plan.microbatch,
        "microbatches": plan.microbatches,
        "parameters_used": max(count_elements(each.used for each in rank) for rank in ranks),
        "parameters_kept": max(count_elements(each.kept for each in rank) for rank in ranks),
        # Numbers in names left open; what the first rank of a stage has of the whole.
        "shapes": {
            pattern_of(each.name): {part: list(getattr(each, part)) for part in ("whole", "used", "kept")}
            for rank in ranks
            for each in rank
        },
        "pipeline": _pipeline(recipe, spec.shapes(config), layout, plan.microbatches),
        "float8": _float8(recipe, spec, config, layout),
        "state_bytes": max((state_bytes(recipe, layout, rank) for rank in ranks), key=lambda parts: parts["total"]),
        "checkpoint_bytes": checkpoint_bytes(recipe),
        "flops_per_token": flops_per_token,
        "flops": flops_per_token * steps * tokens_per_step,
    }


def describe_model(run: dict[str, Any]) -> str:
    """The preset, and which keys make another model of it; what names none is called custom."""
    changed = ", ".join(run["changed"])
    return f"{run['preset']} with another {changed}" if changed and run["preset"] != "custom" else str(run["preset"])


def model_differences(before: Model, after: Model) -> dict[str, tuple[Any, Any]]:
    """Keys of `[model]` by which two models differ, each with both values, whatever presets these come from."""
    if spec_of(before.preset) is not spec_of(after.preset):
        return {"preset": (before.preset, after.preset)}
    old, new = (asdict(spec_of(model.preset).configure(model)) for model in (before, after))
    return {key: (value, new[key]) for key, value in old.items() if value != new[key]}


def _float8(recipe: Recipe, spec: ModelSpec, config: ModelConfig, layout: Layout) -> dict[str, Any] | None:
    """Which linears multiply in float8, how, and why others do not; what is sent in it. None if it is not enabled."""
    section = recipe.precision.float8
    linears, settings = decide_linears(spec, config, section), SETTINGS[section.recipe]
    if not linears:
        return None
    gathers = plan_gathers(spec, config, section) if layout.tp > 1 else ()
    sharded = layout.weights(recipe.parallel.zero_stage)[1] > 1
    return {
        "recipe": section.recipe,
        "settings": asdict(settings),
        "summary": summarize_linears(linears),
        "linears": [asdict(each) for each in linears],
        "sends_weights": section.all_gather and sharded and settings.sent_weights is not None,
        "gathers": [asdict(each) for each in gathers],
        "gathers_in_words": format_gathers(gathers),
    }


def _pipeline(recipe: Recipe, shapes: Mapping[str, Shape], layout: Layout, microbatches: int) -> dict[str, Any] | None:
    """The stages, with their share of the operations, and the share of time that ranks idle; None without one."""
    if layout.pp == 1:
        return None
    stages, schedule = stages_of(recipe, layout), recipe.parallel.pipeline.schedule
    stage_of = {name: stage.index for stage in stages for name in stage.modules}
    parameters, loads = [0] * len(stages), [0] * layout.pp
    for name, shape in shapes.items():
        parameters[stage_of[module_within(name, stage_of.__contains__)]] += prod(shape)
    for stage in stages:
        loads[stage.rank] += stage.flops
    return {
        "schedule": schedule,
        "bubble_share": bubble_share(schedule, layout.pp, len(stages) // layout.pp, microbatches),
        # The ranks' mean share of the operations over the largest one: 1 is even.
        "balance": sum(loads) / layout.pp / max(loads),
        "stages": [
            {
                "stage": stage.index,
                "rank": stage.rank,
                "modules": list(stage.modules),
                "blocks": stage.blocks,
                "flops_share": stage.flops / sum(loads),
                "parameters": parameters[stage.index],
            }
            for stage in stages
        ],
    }


def bubble_share(schedule: str, pp: int, stages_per_rank: int, microbatches: int) -> float | None:
    """The share of a step's time that a rank of an even pipeline idles (Narayanan et al. 2021, section 2.2).

    None for the schedules that split the backward pass: theirs follows from their timetable (`--show-schedule`).
    """
    if splits_backward(schedule):
        return None
    return (pp - 1) / (stages_per_rank * microbatches + pp - 1)


def sharding_table(recipe: Recipe) -> list[dict[str, Any]]:
    """One row a rule of the model's sharding plan, then one a parameter that no rule cuts, numbers in names left open.

    `over` is the mesh dimension (tp, cp) that it concerns, `told` what its ranks communicate. `whole` and `local` are
    shapes of the weight for the first rank; for what sees more of the sequence than it is given, tokens.
    """
    spec = spec_of(recipe.model.preset)
    config = spec.configure(recipe.model)
    plan, tied = spec.sharding(config), spec.tied(config)
    shapes = {pattern_of(name): shape for name, shape in spec.shapes(config).items()}
    shapes |= {pattern_of(name): shapes[pattern_of(other)] for name, other in tied.items()}
    placements, tp = find_placements(shapes, plan), GroupRank(0, recipe.parallel.tp)
    rows = []
    for rule in plan:
        weight = f"{rule.pattern}.weight"
        row = {"modules": rule.pattern, "style": rule.style, **_between_ranks(rule, recipe)}
        if rule.style in SHARD_DIMENSION and weight in shapes:
            local = local_shape(shapes[weight], placements[weight], tp)
            row |= {"whole": list(shapes[weight]), "local": list(local)}
        rows.append(row)
    for name, shape in shapes.items():
        if name not in placements:
            same = {"told": "gradient: all-reduce, once a step", "whole": list(shape), "local": list(shape)}
            rows.append({"modules": name.removesuffix(".weight"), "style": "whole", "over": "tp", **same})
    return rows


def _between_ranks(rule: ShardingRule, recipe: Recipe) -> dict[str, Any]:
    """Over which dimension a module communicates what, and the tokens that it sees and is given."""
    parallel, tokens = recipe.parallel, recipe.training.sequence_length
    part = tokens // parallel.cp
    if rule.style in ("attention", "mask"):
        ring = rule.style == "attention" and parallel.cp_method == "ring"
        told = "keys and values: passed round; backward also their gradients" if ring else _MESSAGES[rule.style]
        return {"over": "cp", "told": told, "whole": [tokens], "local": [part]}
    seen, given = ([part], [part // parallel.tp]) if rule.style == "gather" else (None, None)
    return {"over": "tp", "told": _MESSAGES[rule.style], "whole": seen, "local": given}


def format_sharding_table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [("modules", "style", "over", "communicates", "whole -> local")]
    for row in rows:
        sizes = ""
        if row["whole"] is not None:
            unit = " tokens" * (row["style"] in ("gather", "attention", "mask"))
            sizes = f"{format_shape(row['whole'])}{unit} -> {format_shape(row['local'])}"
        cells.append((row["modules"], row["style"], row["over"], row["told"], sizes))
    return "\n".join(format_table(cells))
