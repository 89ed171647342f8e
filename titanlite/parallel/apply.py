"""From a model spec and a recipe to the program that runs on this rank.

In this order: pipeline stages, tensor parallelism, context parallelism, float8, recomputation, compilation, FSDP2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from titanlite.models.loss import TokenLoss
from titanlite.models.spec import ModelSpec
from titanlite.parallel.compiled import compile_units, overlap_tensor_parallel
from titanlite.parallel.model import GradientAccumulation, ParallelModel, Sync
from titanlite.parallel.recompute import recompute_units, set_memory_budget
from titanlite.parallel.shards import Shards
from titanlite.parallel.world import World
from titanlite.plan.float8 import SETTINGS, decisions, gathers
from titanlite.plan.layout import Layout, batch_plan, require_layout
from titanlite.plan.rules.kernels import QUANTISE, fused
from titanlite.plan.stages import keeps_all_microbatches, stage_split
from titanlite.precision.casting import compute_dtype, master_dtype
from titanlite.precision.float8 import KeptWeights, convert, multiplies_blocks, require_float8
from titanlite.recipe.sections import Recipe

if TYPE_CHECKING:
    from titanlite.parallel.meshes import Meshes
    from titanlite.parallel.pipeline import Pipeline
    from titanlite.plan.slicing import Placement


def build(spec: ModelSpec, config: Any, recipe: Recipe, world: World) -> ParallelModel:
    """The model of `config`, laid out as `[parallel]` says; its weights have no values yet."""
    layout = require_layout(recipe.parallel, world.size)
    if layout.size > 1:
        return _shared(spec, config, recipe, world, layout)
    with torch.device("meta"):
        model = _model(spec, config, recipe, world.device)
    kept = _to_float8(model, spec, config, recipe, world, whole=True)
    model.to_empty(device=world.device)
    _tie(model, spec.tied(config))
    _recompute_and_compile(model, spec, recipe)
    return ParallelModel(model, world, Shards.of(model), GradientAccumulation(model, Sync()), refresh=kept.refresh)


def _model(spec: ModelSpec, config: Any, recipe: Recipe, device: torch.device) -> nn.Module:
    model: nn.Module = spec.build(config, compute_dtype(recipe.precision)).to(master_dtype(recipe.precision))
    if operations := fused(recipe, device.type):
        # Imported here: it knows Triton, which a run without kernels need not load.
        from titanlite.models.fused import use_kernels

        use_kernels(model, operations)
    pipeline = recipe.parallel.pipeline
    for module in model.modules():
        if isinstance(module, TokenLoss):
            module.way = recipe.kernels.linear_cross_entropy
            module.recompute = recipe.parallel.pp > 1 and keeps_all_microbatches(pipeline.schedule)
    return model


def _to_float8(
    model: nn.Module, spec: ModelSpec, config: Any, recipe: Recipe, world: World, whole: bool
) -> KeptWeights:
    """Have linears multiply in float8, in place. `whole`: whether weights rest where they are used, and uncut.

    These are cast once a step, and outside of compiled code, which would not round them to the compute dtype first as
    they are where they travel in it. Raises `UsageError` on a device that has no float8.
    """
    section = recipe.precision.float8
    found = decisions(spec, config, section)
    if found:
        require_float8(world.device)
    native, dtype = multiplies_blocks(world.device), compute_dtype(recipe.precision)
    by_kernel = _casts_by_kernel(recipe, world)
    return convert(model, found, SETTINGS[section.recipe], dtype, whole, native, by_kernel)


def _casts_by_kernel(recipe: Recipe, world: World) -> bool:
    return QUANTISE in fused(recipe, world.device.type)


def _recompute_and_compile(model: nn.Module, spec: ModelSpec, recipe: Recipe) -> None:
    recompute_units(model, spec, recipe.recompute)
    if recipe.compile.enabled:
        set_memory_budget(recipe.recompute.budget)
        compile_units(model, spec)


def _shared(spec: ModelSpec, config: Any, recipe: Recipe, world: World, layout: Layout) -> ParallelModel:
    """A model that several ranks share: one module of it on this rank or, in a pipeline, each of its stages here."""
    # Imported here: FSDP costs half a second that a run on one device need not pay.
    from titanlite.parallel.context import SequencePart
    from titanlite.parallel.meshes import Meshes

    meshes = Meshes.of(
        layout, world.rank, recipe.parallel, world.device, ends_share_a_weight=layout.pp > 1 and bool(spec.tied(config))
    )
    sequence = SequencePart(layout.cp, meshes.coordinates.cp) if layout.cp > 1 else None
    if layout.pp > 1:
        model, shards, passes, refresh = _pipeline(spec, config, recipe, world, meshes)
        return ParallelModel(model, world, shards, passes, meshes.coordinates, sequence, refresh)
    with torch.device("meta"):
        model = _model(spec, config, recipe, world.device)
    part = _apply(model, spec, config, recipe, world, meshes)
    shards = Shards(dict(model.named_parameters()), meshes, part.placements)
    return ParallelModel(
        model, world, shards, GradientAccumulation(model, part.sync), meshes.coordinates, sequence, part.kept.refresh
    )


def _pipeline(
    spec: ModelSpec, config: Any, recipe: Recipe, world: World, meshes: Meshes
) -> tuple[nn.Module, Shards, Pipeline, Callable[[], None]]:
    """The stages of a model that are on this rank; called before each batch, the last brings them up to date."""
    from titanlite.parallel.pipeline import Held, Pipeline, Plan, keep_pieces

    layout, training = meshes.layout, recipe.training
    pieces, tied = spec.pieces(config, training.sequence_length), spec.tied(config)
    stages = stage_split(pieces, recipe.parallel.pipeline, layout.pp)
    held, parameters, placements, kept = [], {}, {}, []
    for stage in stages:
        if stage.rank != meshes.coordinates.pp:
            continue
        with torch.device("meta"):
            module = keep_pieces(_model(spec, config, recipe, world.device), pieces, stage.modules)
        part = _apply(module, spec, config, recipe, world, meshes)
        held.append(Held(stage, module, part.sync))
        kept.append(part.kept)
        parameters.update({tied.get(name, name): parameter for name, parameter in module.named_parameters()})
        placements.update({tied.get(name, name): placement for name, placement in part.placements.items()})
    batches = batch_plan(recipe, layout, meshes.coordinates.data)
    positions = training.sequence_length // layout.cp
    plan = Plan(
        schedule=recipe.parallel.pipeline.schedule,
        stages=len(stages),
        microbatches=batches.microbatches,
        hidden=(batches.microbatch, positions // layout.tp, spec.hidden_size(config)),
        dtype=compute_dtype(recipe.precision),
        sequence_length=positions,
    )
    model = (
        held[0].module if len(held) == 1 else nn.ModuleDict({f"stage{each.stage.index}": each.module for each in held})
    )
    shards = Shards(parameters, meshes, placements, tied=frozenset(tied.values()))

    def refresh() -> None:
        for weights in kept:
            weights.refresh()

    return model, shards, Pipeline(held, plan, meshes.pp, world.device), refresh


@dataclass(frozen=True)
class _Part:
    """What was done to a module."""

    sync: Sync
    placements: Mapping[str, Placement]
    kept: KeptWeights


def _apply(module: nn.Module, spec: ModelSpec, config: Any, recipe: Recipe, world: World, meshes: Meshes) -> _Part:
    """Share `module`, on the meta device, in place; its parameters are then where they rest on this rank."""
    from titanlite.parallel.context import share_sequences
    from titanlite.parallel.fsdp import apply_fsdp
    from titanlite.parallel.tensor import Sent, cut_tensors

    layout, parallel, plan = meshes.layout, recipe.parallel, spec.sharding(config)
    rests_on = torch.device("cpu") if parallel.offload else world.device
    tied = {name: other for name, other in spec.tied(config).items() if _has(module, other) and _has(module, name)}
    by_kernel, found = _casts_by_kernel(recipe, world), gathers(spec, config, recipe.precision.float8)
    sent = {each.module: Sent(each.cast, by_kernel) for each in found if each.cast is not None}
    placements = cut_tensors(module, plan, meshes.tp, sent) if layout.tp > 1 else {}
    if tied:
        # A tied weight would come apart when it leaves the meta device; models that tie are small enough to do so now.
        module.to_empty(device=rests_on)
        _tie(module, tied)
    if layout.cp > 1:
        share_sequences(module, plan, meshes.cp, parallel.cp_method)
    if parallel.async_tp and layout.tp > 1:
        overlap_tensor_parallel(meshes.tp, world.device)
    whole = meshes.dp_shard.size() == 1 and not parallel.offload
    kept = _to_float8(module, spec, config, recipe, world, whole)
    _recompute_and_compile(module, spec, recipe)
    sync = apply_fsdp(module, spec, meshes, parallel, recipe.precision)
    if not tied:
        module.to_empty(device=rests_on)
    return _Part(sync, placements, kept)


def _has(model: nn.Module, parameter: str) -> bool:
    """Whether the module of a parameter is in this part of the model."""
    module: Any = model
    for name in parameter.split("."):
        module = getattr(module, name, None)
    return module is not None


def _tie(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Make parameters that are one by the model's definition one again."""
    for name, other in tied.items():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, model.get_parameter(other))
