"""A rank's real program, at its real world size, run on fake tensors: it computes nothing and sends nothing.

What is executed is the trainer's own step (`training/train_state.py`) with whatever `parallel.apply.build` makes of the
recipe, but without a device and without the other ranks. Only compilation is left out: its code runs on a device alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from titanlite.dryrun.collectives import Collective, CollectiveLog
from titanlite.dryrun.fakes import WatchedFakes
from titanlite.dryrun.memory import Memory, MemoryTrace
from titanlite.errors import UsageError
from titanlite.models.layers import cpu_stands_for
from titanlite.parallel.batch import Batch
from titanlite.parallel.meshes import mesh_dimensions
from titanlite.parallel.world import World
from titanlite.plan.layout import BatchPlan, Coordinates, Layout, batch_plan, require_layout
from titanlite.recipe.sections import Recipe
from titanlite.training.train_state import TrainState


@dataclass(frozen=True)
class DryRun:
    """What a rank does in a step. It is the first; what the others lack of it are four bytes by which the stages of a
    pipeline get to know each other.
    """

    coordinates: Coordinates
    collectives: list[Collective]
    """Its messages, in order."""
    memory: Memory
    shapes: Mapping[str, tuple[int, ...]]
    """Of its part of each parameter."""
    whole_shapes: Mapping[str, tuple[int, ...]]
    """Of these parameters in whole."""


def dry_run(recipe: Recipe, size: int, rank: int) -> DryRun:
    """Run a step of a checked recipe as rank `rank` of `size`. The process must not be in a process group.

    Raises `UsageError` if there is no such rank.
    """
    if not 0 <= rank < size:
        raise UsageError(f"--rank {rank}: the ranks count from 0 to {size - 1} (--world N).")
    layout = require_layout(recipe.parallel, size)
    log, trace = CollectiveLog(spanning(layout, recipe.parallel.zero_stage)), MemoryTrace()
    with ExitStack() as stack:
        stack.enter_context(_fake_group(rank, size))
        stack.enter_context(cpu_stands_for("cuda"))
        stack.enter_context(trace.watch())
        fakes = WatchedFakes(log, trace)
        # The groups are formed for real: what they are is looked up in tensors.
        with _weights_are_fake(fakes):
            learner = TrainState(_eager(recipe), World(rank, size, torch.device("cpu")))
        stack.enter_context(trace.watch_modules(learner.model.module))
        _tell_phases(learner, trace, recipe.parallel.offload)
        stack.enter_context(fakes)
        batch = _batch(recipe, batch_plan(recipe, layout, layout.coordinates(rank).data))
        begin = trace.now()
        learner.step(1, batch, 1.0)
        table = learner.shards.table
        return DryRun(
            coordinates=layout.coordinates(rank),
            collectives=log.seen,
            memory=trace.since(begin),
            shapes={name: tuple(shard.tensor.shape) for name, shard in table.items()},
            whole_shapes={name: shard.shape for name, shard in table.items()},
        )


def spanning(layout: Layout, zero_stage: int) -> str | None:
    """The dimension of the weights' mesh that all ranks are in, if there is one."""
    degrees = mesh_dimensions(layout, zero_stage)
    return next((name for name, degree in degrees.items() if degree == layout.size), None)


@contextmanager
def _fake_group(rank: int, size: int) -> Iterator[None]:
    """A default process group in which nobody else is, and every message arrives at once."""
    if size == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Set timeout is now only supported")  # nobody waits here
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _weights_are_fake(mode: FakeTensorMode) -> Iterator[None]:
    """Models come to their device, from the one without memory, by `Module.to_empty`: let it give them fake memory."""
    real = nn.Module.to_empty

    def fake(module: nn.Module, **arguments: Any) -> nn.Module:
        with mode:
            return real(module, **arguments)

    nn.Module.to_empty = fake  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.to_empty = real  # type: ignore[method-assign]


def _eager(recipe: Recipe) -> Recipe:
    """The recipe without what needs a device, or numbers to compare."""
    parallel = recipe.parallel.model_copy(update={"async_tp": False})
    compiled = recipe.compile.model_copy(update={"enabled": False})
    resilience = recipe.resilience.model_copy(update={"rerun_every": 0})
    return recipe.model_copy(update={"parallel": parallel, "compile": compiled, "resilience": resilience})


def _tell_phases(learner: TrainState, trace: MemoryTrace, offload: bool) -> None:
    """Have the learner's step tell the trace what it is at, and which tensors hold what."""
    passes, update = learner.model.forward_backward, learner.optimizer.step
    for tensor in learner.weights.values():
        trace.mark(tensor, "weights", offload)
    for tensor in learner.optimizer.state().values():
        trace.mark(tensor, "optimizer", offload)

    def forward_backward(batch: Batch) -> Tensor:
        trace.phase = "passes"
        loss = passes(batch)
        for weight in learner.weights.values():
            if weight.grad is not None:
                trace.mark(weight.grad, "gradients", offload)
        trace.phase = "clipping"
        return loss

    def step(factor: float, taken: Tensor) -> None:
        trace.phase = "optimizer"
        update(factor, taken)

    learner.model.forward_backward = forward_backward  # type: ignore[method-assign]
    learner.optimizer.step = step  # type: ignore[method-assign]


def _batch(recipe: Recipe, plan: BatchPlan) -> Batch:
    """A step's batch in its shape; full of tokens, whatever they are."""
    length = recipe.training.sequence_length
    shape = (plan.microbatches, plan.microbatch, length)
    masked = recipe.data.document_mask
    return Batch(
        tokens=torch.empty(shape, dtype=torch.int64),
        labels=torch.empty(shape, dtype=torch.int64),
        positions=torch.empty(shape, dtype=torch.int64) if masked else None,
        documents=torch.empty(shape, dtype=torch.int64) if masked else None,
        samples=(),
        sequences=plan.global_batch,
        valid_tokens=plan.microbatches * plan.microbatch * length,
    )
