"""What a run will be, by arithmetic on the recipe: sizes, batches, mesh, stages, operations; and its sharding plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from math import prod
from typing import Any

from titanlite.errors import UsageError
from titanlite.models.spec import ModelConfig, ModelSpec, Style, spec_of
from titanlite.plan.float8 import SETTINGS, decide_linears, format_gathers, plan_gathers, summarize_linears
from titanlite.plan.layout import ORIGIN, Layout, active_ranks, batch_plan, require_layout, total_steps
from titanlite.plan.memory import checkpoint_bytes, count_elements, local_parameters, state_bytes
from titanlite.plan.placement import CUTS, Shape, module_within, pattern_of, place
from titanlite.plan.stages import SPLIT_BACKWARD, stages_of
from titanlite.recipe.sections import Model, Recipe
from titanlite.text import format_shape, format_table

WEIGHTS_DEPEND_NOT_ON = ("init_std", "depth_scaled_init")  # keys of `[model]` that weights make superfluous

_MESSAGES: dict[Style, str] = {
    "vocab": "rows found: reduce-scatter; backward all-gather",
    "gather": "all-gather; backward reduce-scatter",
    "column": "nothing",
    "row": "output: reduce-scatter; backward all-gather",
    "loss": "three numbers a token",
    "split": "nothing",
    "attention": "keys and values: all-gather; backward reduce-scatter",
    "experts": "tokens: all-gather; outputs: reduce-scatter; backward the same",
}
_RING = "keys and values: passed round; backward also their gradients"


def describe_run(recipe: Recipe, world: int = 1) -> dict[str, Any]:
    """A recipe without errors on `world` ranks."""
    standby = world - (world := active_ranks(recipe, world))
    spec, layout = spec_of(recipe.model.preset), require_layout(recipe.parallel, world)
    config, training = spec.configure(recipe.model), recipe.training
    plan, steps = batch_plan(recipe, layout, ORIGIN.data), total_steps(training)
    tokens_per_step = training.global_batch * training.sequence_length
    flops_per_token = spec.flops_per_token(config, training.sequence_length)
    table = place(recipe, layout)
    ranks = [local_parameters(table, stage * layout.size // layout.pp) for stage in range(layout.pp)]
    return {
        "name": recipe.run.name,
        "preset": recipe.model.preset,
        "changed": list(model_differences(Model(preset=recipe.model.preset), recipe.model)),
        "architecture": _architecture(spec, config),
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
        "ep": layout.ep,
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
    passes = len(stages) // layout.pp * microbatches
    return {
        "schedule": schedule,
        # Of an even pipeline (Narayanan et al. 2021, section 2.2); of split backward passes, see `--show-schedule`.
        "bubble_share": None if schedule in SPLIT_BACKWARD else (layout.pp - 1) / (passes + layout.pp - 1),
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


def _architecture(spec: ModelSpec, config: ModelConfig) -> str:
    """The class of Hugging Face's transformers that computes the same, or the family."""
    try:
        return str(spec.to_huggingface_config(config)["architectures"][0]) if spec.huggingface_classes else spec.family
    except UsageError:  # none does
        return spec.family


def sharding_table(recipe: Recipe) -> list[dict[str, Any]]:
    """One row a rule of the model's sharding plan, then one a parameter that no rule cuts, numbers in names left open.

    `over` is the mesh dimension (tp, cp, ep) that it concerns, `told` what its ranks communicate. `whole` and `local`
    are shapes of the weight for the first rank; for what sees more of the sequence than it is given, tokens.
    """
    spec, parallel, tokens = spec_of(recipe.model.preset), recipe.parallel, recipe.training.sequence_length
    config, part = spec.configure(recipe.model), tokens // parallel.cp
    layout = Layout(1, parallel.ep, parallel.cp, parallel.tp, ep=parallel.ep)  # data ranks, however many, cut no use
    table = place(recipe, layout)
    table |= {name: table[other] for name, other in spec.tied(config).items()}
    placed = {pattern_of(name): placement for name, placement in table.items()}
    seen = dict.fromkeys(("gather", "split"), ([part], [part // parallel.tp]))
    seen["attention"] = [tokens], [part]
    messages = {**_MESSAGES, "attention": _RING if parallel.cp_method == "ring" else _MESSAGES["attention"]}

    def row(modules: str, style: str, over: str, message: str, whole: Any, local: Any) -> dict[str, Any]:
        return {"modules": modules, "style": style, "over": over, "told": message, "whole": whole, "local": local}

    rows: list[dict[str, Any]] = []
    for rule in spec.sharding(config):
        over = CUTS[rule.style][0] if rule.style in CUTS else "cp" if rule.style == "attention" else "tp"
        sizes = [seen.get(rule.style, (None, None))]
        if rule.style in CUTS:
            own = (each for name, each in placed.items() if name.rpartition(".")[0] == rule.pattern)
            sizes = [(list(each.shape), list(each.part(0, gathered=True)[1])) for each in own] or sizes
        rows += [row(rule.pattern, rule.style, over, messages[rule.style], *each) for each in sizes]
    for name, each in placed.items():
        if len(each.cuts) == 1:
            message, whole = "gradient: all-reduce, once a step", list(each.shape)
            rows.append(row(name.removesuffix(".weight"), "whole", "tp", message, whole, whole))
    return rows


def format_sharding_table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [("modules", "style", "over", "communicates", "whole -> local")]
    for row in rows:
        sizes = ""
        if row["whole"] is not None:
            unit = " tokens" * (row["style"] in ("gather", "split", "attention"))
            sizes = f"{format_shape(row['whole'])}{unit} -> {format_shape(row['local'])}"
        cells.append((row["modules"], row["style"], row["over"], row["told"], sizes))
    return "\n".join(format_table(cells))
