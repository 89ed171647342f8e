"""The same few steps twice: on the first rank alone, then on all of them as the recipe's layout says.

After each step, the loss, the gradient norm and every weight are compared. Knows no files; prints nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from titanlite.corpus.tokenizers import open_tokenizer
from titanlite.data.loader import train_loader
from titanlite.data.splits import split_of
from titanlite.models.spec import spec_of
from titanlite.optim.schedules import lr_factor
from titanlite.parallel.batch import Batch
from titanlite.parallel.shards import Shards
from titanlite.parallel.world import World
from titanlite.plan.layout import batch_plan, require_layout, total_steps
from titanlite.precision.casting import master_dtype
from titanlite.recipe.sections import Recipe
from titanlite.training.train_state import TrainState
from titanlite.verify.shrink import in_precision, reference_of, uncompiled
from titanlite.verify.verdict import Comparison, Pass, Row, Tolerance, Weight, tolerance_in

Shapes = Mapping[str, tuple[int, ...]]


def passes(recipe: Recipe, world: World) -> Iterator[Pass]:
    """The comparison in float64, then in the recipe's own precision, each when it is done; equal on every rank.

    `recipe` is a shrunken one. Where float64 is not to be had, float32 takes its place and the pass says why.
    """
    exact, notes = _exact(recipe, world)
    yield _compare(exact, world, notes)
    if recipe.precision != exact.precision:
        yield _compare(recipe, world, ())


def _exact(recipe: Recipe, world: World) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe in the widest format that the device computes in, compiled if that works; and what had to give way.

    The first rank tries, alone, so that a failure leaves nobody waiting; the others hear of it.
    """
    double = in_precision(recipe, compute="float64")
    no_float64 = no_compiler = ""
    if world.is_first:
        no_float64 = _refusal(uncompiled(double), world)
        if not no_float64 and recipe.compile.enabled:
            no_compiler = _refusal(double, world)
    refused = world.broadcast(torch.tensor([bool(no_float64), bool(no_compiler)], device=world.device)).tolist()
    if refused[0]:
        single = in_precision(recipe, compute="float32", reduce="float32")
        return single, (f"float32 in place of float64: {no_float64}",)
    if refused[1]:
        return uncompiled(double), (f"not compiled, since in float64 that fails: {no_compiler}",)
    return double, ()


def _refusal(recipe: Recipe, world: World) -> str:
    """The first line of what a step of `recipe`, unshared, fails with; empty if it does not."""
    alone = reference_of(recipe).model_copy(update={"recompute": recipe.recompute, "compile": recipe.compile})
    try:
        for _ in islice(_run(alone, World(0, 1, world.device)), 2):
            pass
    except Exception as error:  # whatever a device, a kernel or a compiler cannot do
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return ""


@dataclass(frozen=True)
class _State:
    """A run after some of its steps."""

    shards: Shards
    loss: Tensor
    grad_norm: Tensor
    """Both zero before the first step."""


def _run(recipe: Recipe, world: World) -> Iterator[_State]:
    """Train as the trainer does, on synthetic text: the state before the first step, and after each."""
    if recipe.compile.enabled:
        torch.compiler.reset()  # code of earlier runs would count as many recompilations of this one
    learner = TrainState(recipe, world)
    learner.initialise()
    zero = torch.zeros((), dtype=torch.float64, device=world.device)
    yield _State(learner.shards, zero, zero)
    steps = total_steps(recipe.training)
    for number, batch in enumerate(_batches(recipe, world, steps), 1):
        factor = lr_factor(number, recipe.schedule, steps)
        loss, norm = learner.step(number, batch.to(world.device), factor)
        yield _State(learner.shards, loss, norm.to(world.device))


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
    return train_loader(split_of(stream, tokenizer, training.sequence_length, mask, seed, packing), plan, 0, steps)


@dataclass(frozen=True)
class _Snapshot:
    """What one process computed, up to some step."""

    weights: Tensor
    """All of them, flat, in the order of the spec's shapes."""
    numbers: Tensor
    """Loss and gradient norm, float64."""
    distances: Tensor
    """How far each weight has come from its initial value; at step 0, its norm."""


def _compare(recipe: Recipe, world: World, notes: tuple[str, ...]) -> Pass:
    """All ranks run the layout, beside what the first one remembers of running alone."""
    spec = spec_of(recipe.model.preset)
    config = spec.configure(recipe.model)
    shapes, precision = spec.shapes(config), recipe.precision
    tolerance = tolerance_in(precision.compute, precision.reduce, config.layers)
    remembered = _alone(recipe, shapes, world) if world.is_first else None
    rows = []
    for step, state in enumerate(_run(recipe, world)):
        expected = remembered[step] if remembered is not None else _blank(recipe, shapes, world.device)
        for tensor in (expected.weights, expected.numbers, expected.distances):
            world.broadcast(tensor)
        rows.append(_row(step, state, expected, shapes, tolerance, world))
    return Pass(precision.compute, tolerance, notes, tuple(rows))


def _alone(recipe: Recipe, shapes: Shapes, world: World) -> list[_Snapshot]:
    """What one process computes, without the others: before the first step, and after each."""
    snapshots: list[_Snapshot] = []
    for state in _run(reference_of(recipe), World(0, 1, world.device)):
        weights = torch.cat([state.shards.table[name].tensor.detach().flatten() for name in shapes])
        moved = weights - snapshots[0].weights if snapshots else weights
        distances = torch.stack([part.double().norm() for part in _parts(moved, shapes).values()])
        snapshots.append(_Snapshot(weights, torch.stack((state.loss.double(), state.grad_norm.double())), distances))
    return snapshots


def _blank(recipe: Recipe, shapes: Shapes, device: torch.device) -> _Snapshot:
    """Room for a snapshot of the first rank's."""
    weights = torch.empty(sum(map(math.prod, shapes.values())), dtype=master_dtype(recipe.precision), device=device)
    numbers = torch.empty(2, dtype=torch.float64, device=device)
    return _Snapshot(weights, numbers, numbers.new_empty(len(shapes)))


def _parts(flat: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    pieces = torch.split(flat, [math.prod(shape) for shape in shapes.values()])
    return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


def _row(step: int, state: _State, expected: _Snapshot, shapes: Shapes, tolerance: Tolerance, world: World) -> Row:
    """The differences after a step, the same on every rank."""
    numbers = torch.stack((state.loss.double(), state.grad_norm.double()))
    off = _relative((numbers - expected.numbers).abs(), expected.numbers.abs())
    world.reduce(off, "max")  # should another rank have got other numbers than the first, whose are shown
    world.broadcast(numbers)
    apart = _relative(_apart(state.shards, _parts(expected.weights, shapes), world), expected.distances)
    allowed = apart.new_tensor([tolerance.of_weight(math.prod(shape)) for shape in shapes.values()])
    worst = int((apart / allowed).argmax())
    loss, norm = map(Comparison, numbers.tolist(), expected.numbers.tolist(), off.tolist())
    return Row(step, loss, norm, Weight(list(shapes)[worst], float(apart[worst]), float(allowed[worst])))


def _relative(difference: Tensor, size: Tensor) -> Tensor:
    """difference / size; 0 where nothing differs, infinite where either is no number."""
    return torch.where(difference == 0, 0.0, difference / size).nan_to_num(torch.inf, posinf=torch.inf)


def _apart(shards: Shards, whole: Mapping[str, Tensor], world: World) -> Tensor:
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
    world.reduce(sums, "sum")
    squares, elements = sums
    counts = elements.new_tensor([weight.numel() for weight in whole.values()])
    complete = ((elements == 0) | (elements == counts.unsqueeze(1))).all(1) & (elements[:, 0] > 0)
    return torch.where(complete, squares.amax(1).sqrt(), torch.inf)
