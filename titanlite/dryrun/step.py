"""A rank's real program, at its real world size, run on fake tensors: it computes nothing and sends nothing.

It is the trainer's own step (`training/step.py`), but for compilation, whose code runs on a device alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.testing._internal.distributed.fake_pg import FakeStore

from titanlite.data.packing import offsets_size
from titanlite.dryrun.collectives import Collective, CollectiveLog
from titanlite.dryrun.memory import Memory, MemoryTrace
from titanlite.errors import UsageError
from titanlite.models.layers import cpu_stands_for
from titanlite.parallel.model import Batch
from titanlite.parallel.world import World
from titanlite.plan.layout import BatchPlan, Coordinates, Layout, batch_plan, require_layout
from titanlite.plan.placement import Shape, meshes_of
from titanlite.recipe.sections import Recipe
from titanlite.training.step import take_step
from titanlite.training.train_state import TrainState


@dataclass(frozen=True)
class DryRun:
    """A rank's first step. Later ones lack four bytes, by which neighbouring stages of a pipeline meet."""

    coordinates: Coordinates
    collectives: list[Collective]  # its messages, in order
    memory: Memory
    shapes: Mapping[str, tuple[Shape, Shape]]  # of its part of each parameter, and of the whole


def dry_run(recipe: Recipe, size: int, rank: int) -> DryRun:
    """Run a step of a checked recipe; this process must not be in a group. Raises `UsageError` for no such rank."""
    if not 0 <= rank < size:
        raise UsageError(f"--rank {rank}: the ranks count from 0 to {size - 1} (--world N).")
    layout = require_layout(recipe.parallel, size)
    coordinates = layout.coordinates(rank)
    log, trace = CollectiveLog(world_dimension(layout, recipe.parallel.zero_stage)), MemoryTrace()
    # Without what needs a device, or numbers to compare.
    off = {"parallel": {"async_tp": False}, "compile": {"enabled": False}, "resilience": {"rerun_every": 0}}
    eager = recipe.model_copy(update={key: getattr(recipe, key).model_copy(update=off[key]) for key in off})
    with ExitStack() as stack:
        stack.enter_context(_fake_group(rank, size))
        stack.enter_context(cpu_stands_for("cuda"))
        stack.enter_context(trace.watch_sizes())
        fakes = RecordedFakes(log.record, trace.record)
        to_empty = nn.Module.to_empty

        def to_empty_fakes(*arguments: Any, **named: Any) -> Any:
            with fakes:
                return to_empty(*arguments, **named)

        # Only the weights are fake while the model is built: process groups are looked up in real tensors.
        with patch.object(nn.Module, "to_empty", to_empty_fakes):
            state = TrainState(eager, World(rank, size, torch.device("cpu")))
        trace.follow(state.model.module)
        _trace_phases(state, trace, recipe.parallel.offload)
        stack.enter_context(fakes)
        batch = _batch(recipe, batch_plan(recipe, layout, coordinates.data))
        trace.phase = "passes"
        take_step(state, 1, batch, 1.0)
        shapes = {name: (tuple(each.tensor.shape), each.shape) for name, each in state.shards.table.items()}
        return DryRun(coordinates, log.recorded, trace.summarize(), shapes)


def world_dimension(layout: Layout, zero_stage: int) -> str | None:
    """The dimension of the weights' mesh that all ranks are in, if there is one."""
    degrees = meshes_of(layout, zero_stage)["weights"].degrees
    return next((name for name, degree in degrees if degree == layout.size), None)


@contextmanager
def _fake_group(rank: int, size: int) -> Iterator[None]:
    """A default process group without other members, in which every message arrives at once."""
    if size == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Set timeout is now only supported")  # there are no waits
            yield
    finally:
        dist.destroy_process_group()


def _trace_phases(state: TrainState, trace: MemoryTrace, offload: bool) -> None:
    """Have the step tell the trace what it is at, and which tensors hold what."""
    take_gradients, judge = state.shards.take_gradients, state.guards.judge
    for tensor in state.weights.values():
        trace.mark(tensor, "weights", offload)
    for tensor in state.optimizer.state().values():
        trace.mark(tensor, "optimizer", offload)

    def traced_take_gradients() -> None:
        take_gradients()
        for weight in state.weights.values():
            if weight.grad is not None:
                trace.mark(weight.grad, "gradients", offload)
        trace.phase = "clipping"

    def traced_judge(*arguments: Any) -> Tensor:
        taken = judge(*arguments)
        trace.phase = "optimizer"
        return taken

    state.shards.take_gradients = traced_take_gradients  # type: ignore[method-assign]
    state.guards.judge = traced_judge  # type: ignore[method-assign,assignment]


def _batch(recipe: Recipe, plan: BatchPlan) -> Batch:
    """A step's batch in its shape, of any tokens."""
    shape = (plan.microbatches, plan.microbatch, recipe.training.sequence_length)
    tokens, labels, places = (torch.empty(shape, dtype=torch.int64) for _ in range(3))
    positions = documents = None
    if recipe.data.document_mask:
        size = offsets_size(plan.microbatch, recipe.training.sequence_length)
        positions, documents = places, torch.empty((plan.microbatches, size), dtype=torch.int32)
    return Batch(tokens, labels, positions, documents, (), 0, plan.global_batch, prod(shape))


class RecordedFakes(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Within this context tensors have shapes and no memory. Each operation, though not the steps by which torch finds
    its result, is shown to `records`: with its arguments by place and by name, and its result.

    torch takes a fifth of a millisecond for an operation: what a large model's step repeats is answered here.
    """

    def __init__(self, *records: Callable[[Any, Sequence[Any], Mapping[str, Any], Any], None]) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._records = records
        self._depth = 0
        self._layouts: dict[Any, tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # two of three calls ask for it
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # as it does for real; by torch's rule for fake tensors the result would be another storage
        self._depth += 1
        try:
            result = self._result(func, types, args, named)
        finally:
            self._depth -= 1
        if self._depth == 0:
            for record in self._records:
                record(func, args, named, result)
        return result

    def _result(self, func: Any, types: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
        kind = _result_kind(func) if set(types) == {FakeTensor} else "other"
        if kind == "view" and isinstance(args[0], FakeTensor):
            with in_kernel_invocation_manager(self):  # a kernel for tensors without memory finds it at once
                result = func(*args, **named)
            device = args[0].fake_device
            if isinstance(result, list):  # of a split
                return [FakeTensor(self, each, device) for each in result]
            return result if isinstance(result, FakeTensor) else FakeTensor(self, result, device)
        if kind != "new":
            return self.dispatch(func, types, args, named)
        key = (func, _layout(args), _layout(tuple(named.items())))
        if key not in self._layouts:
            first: Any = self.dispatch(func, types, args, named)
            self._layouts[key] = (tuple(first.shape), first.stride(), first.dtype, first.fake_device)
            return first
        shape, stride, dtype, device = self._layouts[key]
        return FakeTensor(self, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), device)


@cache
def _result_kind(operation: Any) -> Literal["view", "new", "other"]:
    """`view`: in the memory of the first argument; `new`: a tensor, whose layout follows from the arguments'."""
    schema, composite = operation._schema, torch._C.DispatchKey.CompositeImplicitAutograd
    if operation.namespace != "aten" or len(schema.returns) != 1 or operation.has_kernel_for_dispatch_key(composite):
        return "other"
    if schema.returns[0].alias_info is not None or operation is torch.ops.aten._unsafe_view.default:
        return "view"
    return "new" if str(schema.returns[0].type) == "Tensor" and not schema.is_mutable else "other"


def _layout(argument: Any) -> Any:
    """All of an argument that a result's layout can follow from."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.shape, argument.stride(), getattr(argument, "fake_device", None)
    if isinstance(argument, (list, tuple)):
        return tuple(_layout(each) for each in argument)
    return type(argument), argument
