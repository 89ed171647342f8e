"""From a model spec and a recipe to the program that runs on this rank: compile per block, then FSDP2."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from titanlite.models.spec import ModelSpec
from titanlite.parallel.compiled import compile_units
from titanlite.parallel.layout import layout_of
from titanlite.parallel.program import Program
from titanlite.parallel.shards import Shards
from titanlite.parallel.world import World
from titanlite.precision.casting import compute_dtype, master_dtype
from titanlite.recipe.sections import Recipe


def build(spec: ModelSpec, config: Any, recipe: Recipe, world: World) -> Program:
    """The model of `config`, laid out as `[parallel]` says; its weights have no values yet."""
    alone = world.size == 1
    # A tied weight would come apart when it moves from the meta device; models that tie are small enough.
    start = world.device if alone or config.tie_embeddings else torch.device("meta")
    with start:
        model: nn.Module = spec.build(config, compute_dtype(recipe.precision)).to(master_dtype(recipe.precision))
    if recipe.compile.enabled:
        compile_units(model, spec)
    if alone:
        return Program(model, world)
    return _sharded(model, spec, recipe, world)


def _sharded(model: nn.Module, spec: ModelSpec, recipe: Recipe, world: World) -> Program:
    # Imported here: FSDP costs half a second that a run on one device need not pay.
    from torch.distributed.device_mesh import init_device_mesh

    from titanlite.parallel.zero import MicrobatchSync, shard_model

    layout, stage = layout_of(recipe.parallel, world.size), recipe.parallel.zero_stage
    assert layout is not None, "check.py refuses this"
    degrees = (layout.dp_replicate, layout.dp_shard)
    mesh = init_device_mesh(world.device.type, degrees, mesh_dim_names=("dp_replicate", "dp_shard"))
    shared_out = mesh if layout.dp_replicate > 1 else mesh["dp_shard"]
    sharded = shard_model(
        model, spec, shared_out, stage, compute_dtype(recipe.precision), master_dtype(recipe.precision)
    )
    if next(model.parameters()).is_meta:
        model.to_empty(device=world.device)
    return Program(model, world, Shards(model, mesh["dp_shard"].get_group()), MicrobatchSync(sharded, stage))
