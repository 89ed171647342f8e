"""The same few steps on the first rank alone and on all as the recipe's layout says, compared after each step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from titanlite.corpus.tokenizers import open_tokenizer
from titanlite.data.loader import train_loader
from titanlite.data.splits import split_of
from titanlite.models.spec import spec_of
from titanlite.optim.schedules import lr_factor
from titanlite.parallel.model import Batch
from titanlite.parallel.shards import Shards
from titanlite.parallel.world import World
from titanlite.plan.layout import batch_plan, require_layout, total_steps
from titanlite.plan.placement import Shape
from titanlite.precision.casting import master_dtype
from titanlite.recipe.sections import Recipe
from titanlite.training.step import take_step
from titanlite.training.train_state import TrainState
from titanlite.verify import verdict
from titanlite.verify.shrink import change, reference_of, without_compiler


def compare_layout(recipe: Recipe, world: World) -> Iterator[verdict.Comparison]:
    """The comparison in float64, then in the recipe's own precision, each when it is done; equal on every rank.

    `recipe` is a shrunken one. Where float64 is not to be had, float32 takes its place and a note says why.
    """
    exact, notes = _widest_precision(recipe, world)
    yield _compare(exact, world, notes)
    if recipe.precision != exact.precision:
        yield _compare(recipe, world, ())


def _widest_precision(recipe: Recipe, world: World) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe in the widest format that the device computes in, compiled if that works; and what had to give way.

    The first rank tries it alone, so that a failure leaves no other rank waiting.
    """
    double = change(recipe, precision={"compute": "float64"})
    no_float64 = world.run_on_rank0(lambda: _try_step(without_compiler(double), world))
    if no_float64:
        single = change(recipe, precision={"compute": "float32", "reduce": "float32"})
        return single, (f"float32 in place of float64: {no_float64}",)
    no_compiler = world.run_on_rank0(lambda: _try_step(double, world)) if recipe.compile.enabled else ""
    if no_compiler:
        return without_compiler(double), (f"not compiled, since in float64 that fails: {no_compiler}",)
    return double, ()


def _try_step(recipe: Recipe, world: World) -> str:
    """The first line of the error of a step of `recipe` in one process; empty if there is none."""
    alone = reference_of(recipe).model_copy(update={"recompute": recipe.recompute, "compile": recipe.compile})
    try:
        list(islice(_run(alone, World(0, 1, world.device)), 2))
    except Exception as error:  # whatever a device, a kernel or a compiler cannot do
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return ""


def _run(recipe: Recipe, world: World) -> Iterator[tuple[Shards, Tensor]]:
    """Train as the trainer does, on synthetic text. Before the first step and after each: the weights, and loss and
    gradient norm [2] in float64 (zero before the first).
    """
    if recipe.compile.enabled:
        torch.compiler.reset()  # code of earlier runs would count as many recompilations of this one
    state = TrainState(recipe, world)
    state.initialise()
    yield state.shards, torch.zeros(2, dtype=torch.float64, device=world.device)
    steps = total_steps(recipe.training)
    for number, batch in enumerate(_batches(recipe, world, steps), 1):
        loss, norm, _ = take_step(state, number, batch.to(world.device), lr_factor(number, recipe.schedule, steps))
        yield state.shards, torch.stack((loss.double(), norm.double().to(world.device)))


def _batches(recipe: Recipe, world: World, steps: int) -> Iterator[Batch]:
    """Bytes of uneven frequency, in documents of a few tokens: the same on every rank, and nothing is read."""
    layout = require_layout(recipe.parallel, world.size)
    plan, training = batch_plan(recipe, layout, layout.coordinates(world.rank).data), recipe.training
    tokenizer = open_tokenizer(recipe.data.tokenizer)
    random = np.random.default_rng(recipe.run.seed)
    tokens = steps * training.global_batch * training.sequence_length + 1
    stream = (random.random(tokens) ** 2 * tokenizer.separator).astype(np.uint16)
    stream[random.random(tokens) < 1 / 12] = tokenizer.separator
    stream[-1] = tokenizer.separator
    mask, seed, packing = recipe.data.document_mask, recipe.run.seed, recipe.data.packing
    split = split_of(stream, tokenizer, training.sequence_length, mask, seed, packing)
    return train_loader(split, plan, range(0, steps * training.global_batch, training.global_batch))


class _Snapshot(NamedTuple):
    """What one process computed, up to some step."""

    weights: Tensor  # all of them, flat, in the order of the spec's shapes
    numbers: Tensor  # loss and gradient norm, float64
    distances: Tensor  # how far each weight has come from its initial value; at step 0, its norm


def _compare(recipe: Recipe, world: World, notes: tuple[str, ...]) -> verdict.Comparison:
    """All ranks run the layout, beside what the first one kept of running alone; the same on every rank."""
    spec, precision = spec_of(recipe.model.preset), recipe.precision
    config = spec.configure(recipe.model)
    shapes = spec.shapes(config)
    elements = [*map(math.prod, shapes.values())]
    tolerance = verdict.tolerance_in(precision.compute, precision.reduce, config.layers)
    kept = _run_alone(recipe, shapes, world) if world.is_first else None
    rows = []
    for step, (shards, numbers) in enumerate(_run(recipe, world)):
        if kept is not None:
            expected = kept[step]
        else:
            weights = numbers.new_empty(sum(elements), dtype=master_dtype(precision))
            expected = _Snapshot(weights, torch.empty_like(numbers), numbers.new_empty(len(shapes)))
        for tensor in expected:
            world.broadcast(tensor)
        off = _relative((numbers - expected.numbers).abs(), expected.numbers.abs())
        world.max(off)  # should another rank have got other numbers than the first, whose are shown
        world.broadcast(numbers)
        distances = _weight_distances(shards, _split_weights(expected.weights, shapes), world)
        apart = _relative(distances, expected.distances)
        allowed = apart.new_tensor([*map(tolerance.of_weight, elements)])
        worst = int((apart / allowed).argmax())
        loss, norm = map(verdict.NumberDifference, numbers.tolist(), expected.numbers.tolist(), off.tolist())
        weight = verdict.WeightDifference(list(shapes)[worst], float(apart[worst]), float(allowed[worst]))
        rows.append(verdict.StepDifference(step, loss, norm, weight))
    return verdict.Comparison(precision.compute, tolerance, notes, tuple(rows))


def _run_alone(recipe: Recipe, shapes: Mapping[str, Shape], world: World) -> list[_Snapshot]:
    """What one process computes, without the others: before the first step, and after each."""
    snapshots: list[_Snapshot] = []
    for shards, numbers in _run(reference_of(recipe), World(0, 1, world.device)):
        weights = torch.cat([shards.table[name].tensor.detach().flatten() for name in shapes])
        moved = weights - snapshots[0].weights if snapshots else weights
        distances = torch.stack([part.double().norm() for part in _split_weights(moved, shapes).values()])
        snapshots.append(_Snapshot(weights, numbers, distances))
    return snapshots


def _split_weights(flat: Tensor, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    parts = torch.split(flat, [*map(math.prod, shapes.values())])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _relative(difference: Tensor, size: Tensor) -> Tensor:
    """difference / size; 0 where nothing differs, infinite where either is no number."""
    return torch.where(difference == 0, 0.0, difference / size).nan_to_num(torch.inf, posinf=torch.inf)


def _weight_distances(shards: Shards, whole: Mapping[str, Tensor], world: World) -> Tensor:
    """For each weight, the norm of what separates the ranks' parts of it from `whole`, in the worst of its copies.

    Infinite where some copy's parts do not make up a whole.
    """
    # [squared differences and elements, weights, copies]: ends of a pipeline each have copies of a tied weight.
    sums = torch.zeros(2, len(whole), 2 * world.size, dtype=torch.float64, device=world.device)
    for index, (name, weight) in enumerate(whole.items()):
        shard = shards.table.get(name)
        if shard is None:
            continue
        part = weight[tuple(slice(first, first + n) for first, n in zip(shard.offset, shard.tensor.shape, strict=True))]
        sums[0, index, shard.copy] = (shard.tensor.detach().to(part.device) - part).double().square().sum()
        sums[1, index, shard.copy] = part.numel()
    world.sum(sums)
    squares, elements = sums
    counts = elements.new_tensor([weight.numel() for weight in whole.values()])
    complete = ((elements == 0) | (elements == counts.unsqueeze(1))).all(1) & (elements[:, 0] > 0)
    return torch.where(complete, squares.amax(1).sqrt(), torch.inf)
