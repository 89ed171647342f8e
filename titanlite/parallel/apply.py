"""From a model spec and a recipe to the model that runs on this rank.

In this order: pipeline stages, tensor, expert and context parallelism, float8, recomputation, compilation, FSDP2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titanlite.errors import UsageError
from titanlite.models.loss import TokenLoss
from titanlite.models.spec import ModelConfig, ModelSpec, saved_buffers
from titanlite.parallel.meshes import Meshes
from titanlite.parallel.model import GradientAccumulation, ParallelModel, Sync, no_sync
from titanlite.parallel.shards import Shards
from titanlite.parallel.units import compile_units, overlap_tensor_parallel, recompute_units
from titanlite.parallel.world import World
from titanlite.plan.float8 import SETTINGS, decide_linears, plan_gathers
from titanlite.plan.kernels import KERNELS, OPERATIONS, QUANTISE, choose_kernels
from titanlite.plan.layout import ORIGIN, batch_plan, require_layout
from titanlite.plan.placement import Placement, module_within, place
from titanlite.plan.stages import ALL_FORWARD_FIRST, stage_split
from titanlite.precision.casting import compute_dtype, master_dtype
from titanlite.precision.float8 import convert, fuse_casts, multiplies_blocks, refresh_casts, require_float8
from titanlite.recipe.sections import Recipe

if TYPE_CHECKING:
    from titanlite.parallel.pipeline import Pipeline


def build(spec: ModelSpec, config: ModelConfig, recipe: Recipe, world: World) -> ParallelModel:
    """The model of `config`, laid out as `[parallel]` says; its weights have no values yet."""
    layout = require_layout(recipe.parallel, world.size)
    meshes, coordinates, placements = None, ORIGIN, place(recipe, layout)
    if layout.size > 1:
        ends_share = any(len(each.stages) > 1 for each in placements.values())
        meshes = Meshes.of(layout, world.rank, recipe.parallel, world.device, ends_share)
        coordinates = meshes.coordinates
    placements |= {name: placements[other] for name, other in spec.tied(config).items()}
    builder = _Builder(spec, config, recipe, world, meshes, placements)
    passes: Pipeline | GradientAccumulation
    if meshes and layout.pp > 1:
        module, passes = builder.pipeline(meshes)
    else:
        module = builder.new_module()
        passes = GradientAccumulation(module, builder.apply(module))
    shards = Shards(builder.parameters, placements, builder.buffers, world.rank, meshes)
    model = ParallelModel(module, world, shards, passes, coordinates.is_batch_leader, coordinates.tp == 0)
    model.reports = spec.reports(config)
    model.updates_buffers = [
        (each, saved_buffers(each)) for each in module.modules() if hasattr(each, "update_buffers")
    ]
    if builder.cached:
        model.refresh = partial(refresh_casts, builder.cached, compute_dtype(recipe.precision))
    if layout.cp > 1:
        # Imports within functions: one device need not pay half a second for FSDP and the like.
        from titanlite.parallel.context import LocalSequences

        model.localize = LocalSequences(layout.cp, coordinates.cp)
    return model


@dataclass
class _Builder:
    spec: ModelSpec
    config: ModelConfig
    recipe: Recipe
    world: World
    meshes: Meshes | None  # None on one rank
    placements: Mapping[str, Placement]  # also by the names of what is tied
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    """Of what was built so far; where another stage has a tied parameter too, by the name that it is tied to."""
    buffers: dict[str, Tensor] = field(default_factory=dict)  # that are saved
    cached: list[nn.Module] = field(default_factory=list)  # linears whose casts need to be refreshed: see `convert`

    def pipeline(self, meshes: Meshes) -> tuple[nn.Module, Pipeline]:
        """The stages of the model that are on this rank."""
        from titanlite.parallel.pipeline import Pipeline, PipelineConfig, ScheduledStage, keep_pieces

        config, recipe, layout = self.config, self.recipe, meshes.layout
        pieces = self.spec.pieces(config, recipe.training.sequence_length)
        stages = stage_split(pieces, recipe.parallel.pipeline, layout.pp)
        batches = batch_plan(recipe, layout, meshes.coordinates.data)
        positions = recipe.training.sequence_length // layout.cp
        settings = PipelineConfig(
            schedule=recipe.parallel.pipeline.schedule,
            stages=len(stages),
            microbatches=batches.microbatches,
            hidden=(batches.microbatch, positions // layout.tp, config.dim),
            dtype=compute_dtype(recipe.precision),
            sequence_length=positions,
            group=meshes.pp,
            device=self.world.device,
        )
        modules, held = nn.ModuleDict(), []
        for stage in stages:
            if stage.rank == meshes.coordinates.pp:
                module = keep_pieces(self.new_module(), pieces, stage.modules)
                for name in saved_buffers(module):
                    if not module_within(name, stage.modules.__contains__):
                        problem = (
                            f"the model's saved buffer {name} is in none of its pieces, and would be in each stage"
                        )
                        raise UsageError(f"parallel.pp: {problem}. Write pp = 1.")
                sync = self.apply(module)
                modules[f"stage{stage.index}"] = module
                held.append(ScheduledStage(stage.index, module, sync, settings))
        return module if len(held) == 1 else modules, Pipeline(held, settings)

    def new_module(self) -> nn.Module:
        """The whole model on the meta device."""
        recipe = self.recipe
        with torch.device("meta"):
            module: nn.Module = self.spec.build(self.config, compute_dtype(recipe.precision))
            module.to(master_dtype(recipe.precision))
        chosen = choose_kernels(recipe, self.world.device.type)
        if names := {operation: chosen[operation] for operation in OPERATIONS if operation in chosen}:
            # Imported here: it knows Triton, which a run without kernels need not load.
            from titanlite.models.fused import use_kernels

            use_kernels(module, {operation: KERNELS[operation].get(name) for operation, name in names.items()})
        for each in module.modules():
            if isinstance(each, TokenLoss):
                each.implementation = recipe.kernels.linear_cross_entropy
                each.recompute = recipe.parallel.pp > 1 and recipe.parallel.pipeline.schedule in ALL_FORWARD_FIRST
        return module

    def apply(self, module: nn.Module) -> Sync:
        """Parallelise `module`, on the meta device, in place; its parameters are then where they rest on this rank."""
        spec, config, recipe, meshes = self.spec, self.config, self.recipe, self.meshes
        offload = recipe.parallel.offload and meshes is not None
        rests_on = torch.device("cpu") if offload else self.world.device
        if meshes and meshes.layout.tp > 1:
            self._tensor_parallel(module, meshes.tp)
        if meshes and meshes.ep is not None:
            from titanlite.parallel.expert import apply_expert_parallel

            apply_expert_parallel(module, spec, config, self.placements, self.world.rank, meshes.ep)
        names = spec.tied(config)
        here = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        tied = {name: other for name, other in names.items() if {name, other} <= here}
        if tied:
            # A tied weight would come apart when it leaves the meta device; models that tie are small enough to do so
            # before they are sharded.
            module.to_empty(device=rests_on)
            for name, other in tied.items():
                owner, _, attribute = name.rpartition(".")
                setattr(module.get_submodule(owner), attribute, module.get_parameter(other))
        if meshes and meshes.cp is not None:
            from titanlite.parallel.context import apply_context_parallel

            apply_context_parallel(module, spec.sharding(config), meshes.cp, recipe.parallel.cp_method)
        # Weights that rest unsharded where they are used are cast once a step, and outside of compiled code, which
        # would not round them to the compute dtype first, as they are where they travel in it.
        if found := decide_linears(spec, config, recipe.precision.float8):
            require_float8(self.world.device)
            settings = self._fuse(SETTINGS[recipe.precision.float8.recipe])
            cache = meshes is None or (meshes.dp_shard.size() == 1 and not offload)
            self.cached += convert(module, found, settings, cache, multiplies_blocks(self.world.device))
        recompute_units(module, spec, recipe.recompute)
        if recipe.compile.enabled:
            layout = require_layout(recipe.parallel, self.world.size)
            tokens = batch_plan(recipe, layout, 0).microbatch * recipe.training.sequence_length // layout.cp
            one_mesh = meshes is None or len(meshes.fsdp) == 1  # else FSDP gathers parts of a block by themselves
            compile_units(module, spec, tokens, recipe.recompute.budget, whole=one_mesh)
        sync: Sync = no_sync
        if meshes:
            from titanlite.parallel.fsdp import apply_fsdp

            sync = apply_fsdp(module, spec, self.placements, meshes, recipe.parallel, recipe.precision)
        if not tied:
            module.to_empty(device=rests_on)
        for each in module.modules():
            for key, buffer in each.named_buffers(recurse=False):
                each._buffers[key] = buffer.to(self.world.device)  # wherever the weights rest
        self.buffers.update(saved_buffers(module))
        self.parameters.update({names.get(name, name): parameter for name, parameter in module.named_parameters()})
        return sync

    def _tensor_parallel(self, module: nn.Module, group: dist.ProcessGroup) -> None:
        from titanlite.parallel.tensor import apply_tensor_parallel

        if self.recipe.parallel.async_tp:
            overlap_tensor_parallel(group, self.world.device)
        found = plan_gathers(self.spec, self.config, self.recipe.precision.float8)
        casts = {each.module: self._fuse(each.cast) for each in found if each.cast is not None}
        plan = self.spec.sharding(self.config)
        apply_tensor_parallel(module, plan, self.placements, self.world.rank, group, casts)

    def _fuse(self, casts: Any) -> Any:
        return fuse_casts(casts) if QUANTISE in choose_kernels(self.recipe, self.world.device.type) else casts
