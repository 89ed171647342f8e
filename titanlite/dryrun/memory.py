"""What a program holds in memory, by purpose, and when it holds most.

Follows storages, not tensors: from the operation that makes one to its end. What a storage was for shows only later
(a result is an activation if it outlives the forward pass), so events are kept, and summed up when all is known.
Bytes are those of the tensors: an allocator's rounding and gaps, and what kernels and libraries take, come on top.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Purpose = Literal["weights", "gathered", "gradients", "optimizer", "activations", "other"]

PURPOSES: tuple[Purpose, ...] = ("weights", "gathered", "gradients", "optimizer", "activations", "other")
"""- `weights`: what rests on the rank from step to step
- `gathered`: weights as a pass uses them: brought together from other ranks, or cast to the compute dtype
- `gradients` of weights, whole or cut, with the buffers in which they are summed over ranks
- `optimizer`: its states
- `activations`: what the forward pass (or its repetition) leaves for the backward pass
- `other`: the batch, and what lives within a pass: temporaries, gradients of activations
"""


class _Block:
    """One storage."""

    __slots__ = ("born", "bytes", "on_host", "purpose")

    def __init__(self, size: int, born: int | None) -> None:
        self.bytes = size
        self.on_host = False
        self.born = born
        """Number of the span of forward computation that made it, if one did."""
        self.purpose: Purpose | None = None


@dataclass(frozen=True)
class Moment:
    """What is held at one time, in bytes."""

    total: int
    by_purpose: Mapping[Purpose, int]
    where: str
    """What the rank was doing: phase, module, operation."""


@dataclass(frozen=True)
class Memory:
    """What a stretch of the program holds on its device."""

    by_phase: Mapping[str, Moment]
    """`forward`, `backward` … -> when most was held in it."""
    most: Mapping[Purpose, int]
    """Bytes for each purpose at its own highest."""
    host_bytes: int
    """Beside all this, at most so much in the host's memory."""

    @property
    def peak(self) -> Moment:
        """When most is held."""
        return max(self.by_phase.values(), key=lambda moment: moment.total)


class MemoryTrace:
    """Follows the storages of one model's program; `watch` it, and show it each operation."""

    def __init__(self) -> None:
        self.phase = "build"
        """What the program is doing: `forward` and backward passes tell themselves apart within one phase."""
        self._blocks: dict[int, _Block] = {}
        self._ends: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._events: list[tuple[_Block, int, tuple[str, str, Any]]] = []
        self._modules: list[str] = []
        """Names of the modules whose forward is running, innermost last."""
        self._backward_of = ""
        self._operation: Any = None
        self._span = 0
        self._forward = False

    # What is shown.

    def see(self, operation: Any, arguments: Sequence[Any], named: Mapping[str, Any], result: Any) -> None:
        """Show what a dispatch mode was given, and what came out."""
        self._turn()
        tensors = list(_flat(result))
        if tensors:
            self._operation = operation
        for tensor in tensors:
            self._hold(tensor)
        purpose = _PURPOSE_BY_NAME.get(operation._schema.name)
        if purpose is not None:
            for tensor in _flat((arguments, tuple(named.values()))):
                self.mark(tensor, purpose)
        elif operation is torch.ops.aten._to_copy.default and self._purpose(arguments[0]) in ("weights", "gathered"):
            self.mark(result, "gathered")

    def mark(self, tensor: Tensor, purpose: Purpose, on_host: bool = False) -> None:
        """Say what a tensor's storage is for; what was said first holds. `on_host`: it rests in the host's memory."""
        block = self._hold(tensor)
        block.on_host |= on_host
        if block.purpose is None:
            block.purpose = purpose

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Notice storages that change their size, which FSDP's do without any operation."""
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            block = self._blocks.get(storage._cdata)
            if block is not None:
                self._operation = "a storage changes its size"
                self._note(block, size - block.bytes)
                block.bytes = size
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]

    @contextmanager
    def watch_modules(self, model: nn.Module) -> Iterator[None]:
        """Know which module computes, its parameters as they are then (FSDP exchanges them), and their gradients."""
        marked: set[int] = set()
        hooks: list[Any] = []
        named: Callable[[], Tensor | None] = lambda: None  # noqa: E731

        def enter(module: nn.Module, name: str) -> None:
            self._modules.append(name)
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.mark(_local(parameter), "gathered")
                    if id(parameter) not in marked:
                        marked.add(id(parameter))
                        hook = parameter.register_post_accumulate_grad_hook(self._take_gradient)  # type: ignore[no-untyped-call]
                        hooks.append(hook)

        def leave(output: Any, name: str) -> None:
            nonlocal named
            self._modules.pop()
            # What a module returns as its last submodule did is that one's.
            if isinstance(output, Tensor) and output.requires_grad and named() is not output:
                output.register_hook(lambda _: self._backward_reaches(name))  # type: ignore[no-untyped-call]
                named = weakref.ref(output)

        with ExitStack() as stack:
            for name, module in model.named_modules():
                hooks.append(module.register_forward_pre_hook(lambda m, _, name=name: enter(m, name)))
                hooks.append(
                    module.register_forward_hook(lambda _, __, out, name=name: leave(out, name), always_call=True)
                )
            stack.callback(lambda: [hook.remove() for hook in hooks])
            yield

    # What is asked.

    def now(self) -> int:
        """A time, to be given to `since`."""
        return len(self._events)

    def since(self, time: int) -> Memory:
        """What was held from `time` on."""
        held = dict.fromkeys(PURPOSES, 0)
        on_host = 0
        for block, change, _ in self._events[:time]:
            held[block.purpose or "other"] += change * (not block.on_host)
            on_host += change * block.on_host
        most, most_on_host = dict(held), on_host
        by_phase: dict[str, Moment] = {}
        for block, change, where in self._events[time:]:
            if block.on_host:
                on_host += change
                most_on_host = max(most_on_host, on_host)
                continue
            purpose = block.purpose or "other"
            held[purpose] += change
            most[purpose] = max(most[purpose], held[purpose])
            total, phase = sum(held.values()), where[0]
            if phase not in by_phase or total > by_phase[phase].total:
                by_phase[phase] = Moment(total, dict(held), _said(where))
        return Memory(by_phase, most, most_on_host)

    # How it knows.

    def _hold(self, tensor: Tensor) -> _Block:
        storage = tensor.untyped_storage()
        key = storage._cdata
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = _Block(storage.nbytes(), self._span if self._forward else None)
            self._ends[key] = weakref.ref(storage, lambda _: self._end(key))
            self._note(block, block.bytes)
        return block

    def _end(self, key: int) -> None:
        block = self._blocks.pop(key)
        del self._ends[key]
        self._turn()
        if block.purpose is None and block.born is not None and (block.born != self._span or not self._forward):
            block.purpose = "activations"
        self._note(block, -block.bytes)

    def _note(self, block: _Block, change: int) -> None:
        if change:
            self._events.append((block, change, (self._doing(), self._place(), self._operation)))

    def _purpose(self, tensor: Tensor) -> Purpose | None:
        return self._hold(tensor).purpose

    def _turn(self) -> None:
        """Begin a new span where forward computation begins, be it for the first time or for the backward pass."""
        forward = self.phase == "passes" and (not _in_backward() or torch.is_grad_enabled() or bool(self._modules))
        if forward and not self._forward:
            self._span += 1
        self._forward = forward

    def _take_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.mark(_local(parameter.grad), "gradients")

    def _backward_reaches(self, module: str) -> None:
        self._backward_of = module

    def _doing(self) -> str:
        if self.phase != "passes":
            return self.phase
        if not _in_backward():
            return "forward"
        return "recomputation" if self._forward else "backward"

    def _place(self) -> str:
        if self._modules:
            return self._modules[-1]
        return self._backward_of if self.phase == "passes" and _in_backward() else ""


_PURPOSE_BY_NAME: Mapping[str, Purpose] = {
    "fsdp::all_gather_copy_in": "gathered",
    "fsdp::split_with_sizes_copy": "gathered",
    "fsdp::chunk_cat": "gradients",
    "c10d::_reduce_scatter_base_": "gradients",
}
"""FSDP's own operations, all of whose tensors have one purpose."""


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _said(where: tuple[str, str, Any]) -> str:
    phase, module, operation = where
    place = f"{phase} of {module}" if module else phase
    return f"{place} ({operation})" if operation is not None else place


def _local(tensor: Tensor) -> Tensor:
    """The tensor itself, or the part of it that this rank has."""
    local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


def _flat(nested: Any) -> Iterator[Tensor]:
    """The tensors among nested tuples and lists."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, (tuple, list)):
        for each in nested:
            yield from _flat(each)
