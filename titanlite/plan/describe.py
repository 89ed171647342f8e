"""What a run will be, in plain numbers: sizes, batches, mesh, stages, what each rank keeps, bytes, operations.

Arithmetic on the recipe alone, for any mesh; knows neither devices nor torch. Guesses neither time nor activations.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from titanlite.models.spec import ModelConfig, ModelSpec, is_named_by, spec_of
from titanlite.optim.base import optimizer_spec
from titanlite.plan.float8 import SETTINGS, decisions, gathers, gathers_in_words, summary
from titanlite.plan.layout import Layout, active_ranks, batch_plan, require_layout, total_steps
from titanlite.plan.slicing import ALONE, GroupRank, Shape, find_placements, local_shape, pattern_of
from titanlite.plan.stages import Stage, splits_backward, stage_split
from titanlite.recipe.sections import Model, Pipeline, Recipe

_WIDTHS = {"bfloat16": 2, "float32": 4, "float64": 8}
"""Bytes of a number."""


@dataclass(frozen=True)
class Kept:
    """How much of a parameter one rank has to do with. Sizes are shapes, possibly with no rows."""

    name: str
    whole: Shape
    used: Shape
    """What it computes with: its tensor parallel share."""
    kept: Shape
    """What it keeps of that from step to step: its rows of it, in ZeRO stages 1 to 3."""


def describe(recipe: Recipe, world: int = 1) -> dict[str, Any]:
    """What a recipe without errors will be on `world` ranks, in plain numbers."""
    standby = world - (world := active_ranks(recipe, world))
    spec, config, layout = _spec(recipe), _config(recipe), require_layout(recipe.parallel, world)
    training, plan, steps = recipe.training, batch_plan(recipe, layout, 0), total_steps(recipe.training)
    tokens_per_step = training.global_batch * training.sequence_length
    flops_per_token = spec.flops_per_token(config, training.sequence_length)
    ranks = kept_by_stages(recipe, layout)
    return {
        "name": recipe.run.name,
        "preset": recipe.model.preset,
        "changed": list(model_differences(Model(preset=recipe.model.preset), recipe.model)),
        "architecture": spec.to_huggingface_config(config)["architectures"][0],
        "dim": config.dim,
        "layers": config.layers,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "ffn_dim": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else config.rope_scaling.model_dump(),
        "norm_eps": config.norm_eps,
        "tie_embeddings": config.tie_embeddings,
        "qk_norm": config.qk_norm,
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
        "parameters_used": max(_count(item.used for item in rank) for rank in ranks),
        "parameters_kept": max(_count(item.kept for item in rank) for rank in ranks),
        "shapes": _shapes(ranks),
        "pipeline": _pipeline(recipe, layout, plan.microbatches),
        "float8": _float8(recipe, layout),
        "state_bytes": max((_state_bytes(recipe, layout, rank) for rank in ranks), key=lambda parts: parts["total"]),
        "checkpoint_bytes": checkpoint_bytes(recipe),
        "flops_per_token": flops_per_token,
        "flops": flops_per_token * steps * tokens_per_step,
    }


def model_differences(before: Model, after: Model) -> dict[str, tuple[Any, Any]]:
    """Keys of `[model]` by which two models differ, each with both values, whatever presets these come from."""
    if spec_of(before.preset) is not spec_of(after.preset):
        return {"preset": (before.preset, after.preset)}
    old, new = (asdict(spec_of(model.preset).configure(model)) for model in (before, after))
    return {key: (value, new[key]) for key, value in old.items() if value != new[key]}


WEIGHTS_DEPEND_NOT_ON = ("init_std", "depth_scaled_init")
"""Keys of `[model]` that say nothing of a model whose weights are there."""


def _float8(recipe: Recipe, layout: Layout) -> dict[str, Any] | None:
    """Which linears multiply in float8 and how, and why the others do not, and what is sent in float8; None where it is
    not enabled."""
    section = recipe.precision.float8
    found, name = decisions(_spec(recipe), _config(recipe), section), section.recipe
    if not found:
        return None
    over_tp = gathers(_spec(recipe), _config(recipe), section) if layout.tp > 1 else ()
    cut = layout.weights(recipe.parallel.zero_stage)[1] > 1
    return {
        "recipe": name,
        "settings": asdict(SETTINGS[name]),
        "summary": summary(found),
        "linears": [asdict(each) for each in found],
        "sends_weights": section.all_gather and cut and SETTINGS[name].sent_weights is not None,
        "gathers": [asdict(each) for each in over_tp],
        "gathers_in_words": gathers_in_words(over_tp),
    }


def checkpoint_bytes(recipe: Recipe) -> int:
    """Bytes of a checkpoint's tensors: weights and optimizer states in whole, over however many ranks they lie."""
    alone = Layout(dp_replicate=1, dp_shard=1)
    states = _state_bytes(recipe, alone, kept_by_stages(recipe, alone)[0])
    return states["weights"] + states["optimizer"]


def stages_of(recipe: Recipe, layout: Layout) -> tuple[Stage, ...]:
    """The pipeline's stages, first to last; the whole model is one where there is no pipeline."""
    pieces = _spec(recipe).pieces(_config(recipe), recipe.training.sequence_length)
    alone = Pipeline(schedule="GPipe")
    return stage_split(pieces, recipe.parallel.pipeline if layout.pp > 1 else alone, layout.pp)


def kept_by_stages(recipe: Recipe, layout: Layout, tp_rank: int = 0, cut_rank: int = 0) -> list[list[Kept]]:
    """For each rank of a pipeline, what it keeps of the parameters that its stages compute with.

    Ranks 0 of a tensor parallel group, and of those that weights are cut over (`dp_shard` x `cp`), keep the most.
    """
    spec, config = _spec(recipe), _config(recipe)
    shapes, cuts = spec.shapes(config), find_placements(spec.shapes(config), spec.sharding(config))
    tp, cut = GroupRank(tp_rank, layout.tp), GroupRank(cut_rank, layout.weights(recipe.parallel.zero_stage)[1])
    rank_of = {name: stage.rank for stage in stages_of(recipe, layout) for name in stage.modules}
    places = [(name, rank_of[_within(name, rank_of)]) for name in shapes]
    # Both ends of a pipeline have the weight that they share.
    places += [(other, rank_of[_within(name, rank_of)]) for name, other in spec.tied(config).items()]
    ranks: list[dict[str, Kept]] = [{} for _ in range(layout.pp)]
    for name, rank in places:
        whole, placement = shapes[name], cuts.get(name)
        used, kept = (local_shape(whole, placement, tp, shard) for shard in (ALONE, cut))
        ranks[rank][name] = Kept(name, whole, used, kept)
    return [list(rank.values()) for rank in ranks]


def _within(parameter: str, modules: Collection[str]) -> str:
    """Which of `modules` a parameter is in; empty if in none."""
    parts = parameter.split(".")
    return next((name for end in range(1, len(parts)) if (name := ".".join(parts[:end])) in modules), "")


def _count(shapes: Iterable[Shape]) -> int:
    return sum(map(prod, shapes))


def _state_bytes(recipe: Recipe, layout: Layout, rank: Sequence[Kept]) -> dict[str, int]:
    """Bytes on one rank of what lives from step to step, and of the weights gathered for a pass.

    The optimizer's states are as many as its spec says, in the weights' own format. What the ZeRO stage does not cut is
    there in whole: gradients below stage 2, gathered weights below stage 3. Schedules that split the backward pass sum
    gradients once a step in any stage, and have them in whole until then.
    """
    is_matrix = _spec(recipe).is_block_matrix
    states, stage = optimizer_spec(recipe.optimizer.name).states, recipe.parallel.zero_stage
    width = max(4, _WIDTHS[recipe.precision.compute])
    kept, used = _count(item.kept for item in rank), _count(item.used for item in rank)
    once_a_step = stage < 2 or (layout.pp > 1 and splits_backward(recipe.parallel.pipeline.schedule))
    moments = sum(prod(item.kept) * states(is_matrix(item.name)) for item in rank)
    parts = {
        "weights": width * kept,
        "gathered": _WIDTHS[recipe.precision.compute] * _gathered(recipe, layout, rank),
        "gradients": width * (used if once_a_step else kept),
        "optimizer": width * moments,
    }
    if copies := _kept_in_float8(recipe, layout, rank):
        parts["float8"] = copies
    return {**parts, "total": sum(parts.values())}


def _kept_in_float8(recipe: Recipe, layout: Layout, rank: Sequence[Kept]) -> int:
    """Bytes of the weights that are cast once a step, which are those that rest whole; for each of two products."""
    if layout.weights(recipe.parallel.zero_stage)[1] > 1 or recipe.parallel.offload:
        return 0
    found = decisions(_spec(recipe), _config(recipe), recipe.precision.float8)
    converted = {f"{each.name}.weight" for each in found if each.skipped is None}
    return 2 * _count(item.used for item in rank if item.name in converted)


def _gathered(recipe: Recipe, layout: Layout, rank: Sequence[Kept]) -> int:
    """Parameters that lie gathered, in the compute dtype, at the fullest moment of a pass.

    Below stage 3 these are all. In stage 3 they are the ones outside the units, the unit at work, those asked for ahead
    of it (one at least, in backward), and the last unit, which backward begins with, where no pipeline comes between.
    """
    parallel, spec = recipe.parallel, _spec(recipe)
    if layout.data_ranks * layout.cp == 1 and not parallel.offload:
        return 0
    if parallel.zero_stage < 3:
        return _count(item.used for item in rank)
    tied = set(spec.tied(_config(recipe)).values())
    units: dict[str, int] = {"": 0}
    for item in rank:
        unit = "" if item.name in tied else _unit(item.name, spec.shard_units)
        units[unit] = units.get(unit, 0) + prod(item.used)
    kept = units.pop("")
    if units and layout.pp == 1:
        kept += units.pop(next(reversed(units)))
    sizes, together = list(units.values()), 1 + max(parallel.prefetch, 1)
    return kept + max((sum(sizes[first : first + together]) for first in range(len(sizes))), default=0)


def _unit(parameter: str, patterns: tuple[str, ...]) -> str:
    """The submodule that is gathered and released with this parameter; empty for the model itself."""
    parts = parameter.split(".")
    prefixes = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((prefix for prefix in prefixes if is_named_by(patterns, prefix)), "")


def _shapes(ranks: Sequence[Sequence[Kept]]) -> dict[str, dict[str, list[int]]]:
    """Parameters by name, numbers left open: shapes of the whole, and of what the first rank of a stage has of it."""
    items = [item for rank in ranks for item in rank]
    return {
        pattern_of(item.name): {part: list(getattr(item, part)) for part in ("whole", "used", "kept")} for item in items
    }


def _pipeline(recipe: Recipe, layout: Layout, microbatches: int) -> dict[str, Any] | None:
    """The stages, with their share of the operations, and the share of time that ranks idle; None without one."""
    if layout.pp == 1:
        return None
    stages, shapes = stages_of(recipe, layout), _spec(recipe).shapes(_config(recipe))
    stage_of = {name: stage.index for stage in stages for name in stage.modules}
    parameters = [0] * len(stages)
    for name, shape in shapes.items():
        parameters[stage_of[_within(name, stage_of)]] += prod(shape)
    flops = sum(stage.flops for stage in stages)
    table = [
        {
            "stage": stage.index,
            "rank": stage.rank,
            "modules": list(stage.modules),
            "blocks": stage.blocks,
            "flops_share": stage.flops / flops,
            "parameters": parameters[stage.index],
        }
        for stage in stages
    ]
    schedule = recipe.parallel.pipeline.schedule
    bubble = bubble_share(schedule, layout.pp, len(stages) // layout.pp, microbatches)
    return {"schedule": schedule, "bubble_share": bubble, "balance": _balance(stages, layout.pp), "stages": table}


def _balance(stages: Sequence[Stage], pp: int) -> float:
    """The ranks' mean share of the operations over the largest one: 1 is even."""
    loads = [sum(stage.flops for stage in stages if stage.rank == rank) for rank in range(pp)]
    return sum(loads) / pp / max(loads)


def bubble_share(schedule: str, pp: int, stages_per_rank: int, microbatches: int) -> float | None:
    """The share of a step's time that a rank of an even pipeline idles (Narayanan et al. 2021, section 2.2).

    (pp - 1) / (stages_per_rank x microbatches + pp - 1). None for the schedules that split the backward pass: theirs
    follows from their table (`--show-schedule`), not from a formula.
    """
    if splits_backward(schedule):
        return None
    return (pp - 1) / (stages_per_rank * microbatches + pp - 1)


def _spec(recipe: Recipe) -> ModelSpec:
    return spec_of(recipe.model.preset)


def _config(recipe: Recipe) -> ModelConfig:
    return _spec(recipe).configure(recipe.model)


def describe_model(run: dict[str, Any]) -> str:
    """The preset, and which keys make another model of it; what names none is called custom."""
    changed = ", ".join(run["changed"])
    return f"{run['preset']} with another {changed}" if changed and run["preset"] != "custom" else str(run["preset"])
