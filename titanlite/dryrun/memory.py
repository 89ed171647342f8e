"""What a program holds in memory, by purpose, and when it holds most, without what allocator and libraries add.

What a storage was for shows only later (a result is an activation if it outlives the forward pass), so events are kept,
and summed up when all is known.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args
from unittest.mock import patch

import torch
from torch import Tensor, nn

from titanlite.dryrun.collectives import flatten

Purpose = Literal["weights", "gathered", "gradients", "optimizer", "activations", "other"]  # see docs/dry_run.md
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)

_FSDP_OPERATIONS: Mapping[str, Purpose] = {  # all of whose tensors have one purpose
    "fsdp::all_gather_copy_in": "gathered",
    "fsdp::split_with_sizes_copy": "gathered",
    "fsdp::chunk_cat": "gradients",
    "c10d::_reduce_scatter_base_": "gradients",
}


@dataclass
class _Storage:
    bytes: int
    forward_span: int | None  # number of the span of forward computation that made it, if one did
    purpose: Purpose | None = None
    on_host: bool = False
    end: weakref.ref[torch.UntypedStorage] | None = None  # calls when the storage is freed


@dataclass(frozen=True)
class Moment:
    """What is held at one time, in bytes."""

    total: int
    by_purpose: Mapping[Purpose, int]
    where: str  # what the rank was doing: phase, module, operation


@dataclass(frozen=True)
class Memory:
    """What a step holds on its device."""

    by_phase: Mapping[str, Moment]  # `forward`, `backward` … -> when most was held in it
    most: Mapping[Purpose, int]  # bytes for each purpose at its own highest
    host_bytes: int  # most bytes in the host's memory, beside all this

    @property
    def peak(self) -> Moment:
        return max(self.by_phase.values(), key=lambda moment: moment.total)


class MemoryTrace:
    """Follows the storages of one model's program: within `watch_sizes`, and shown each operation by `record`."""

    def __init__(self) -> None:
        self.phase = "build"  # what the program is doing; within `passes`, forward and backward are distinguished here
        self._storages: dict[int, _Storage] = {}
        self._events: list[tuple[_Storage, int, tuple[str, str, Any]]] = []
        self._modules: list[str] = []  # names of the modules whose forward is running, innermost last
        self._backward_module = ""
        self._operation: Any = None
        self._span = 0
        self._in_forward = False

    def record(self, operation: Any, arguments: Sequence[Any], named: Mapping[str, Any], result: Any) -> None:
        """Show what a dispatch mode was given, and what came out."""
        self._update_span()
        if tensors := flatten(result):
            self._operation = operation
        for tensor in tensors:
            self._storage(tensor)
        if (purpose := _FSDP_OPERATIONS.get(operation._schema.name)) is not None:
            for tensor in flatten((arguments, named)):
                self.mark(tensor, purpose)
        is_cast = operation is torch.ops.aten._to_copy.default
        if is_cast and self._storage(arguments[0]).purpose in ("weights", "gathered"):
            self.mark(result, "gathered")

    def mark(self, tensor: Tensor, purpose: Purpose, on_host: bool = False) -> None:
        """Say what a tensor's storage is for; the first purpose holds. `on_host`: it rests in the host's memory."""
        storage = self._storage(tensor.to_local() if hasattr(tensor, "to_local") else tensor)
        storage.on_host |= on_host
        storage.purpose = storage.purpose or purpose

    @contextmanager
    def watch_sizes(self) -> Iterator[None]:
        """Notice storages that change their size, which FSDP's do without any operation."""
        resize = torch.UntypedStorage.resize_

        def resize_and_record(handle: torch.UntypedStorage, size: int) -> Any:
            result = resize(handle, size)
            if (storage := self._storages.get(handle._cdata)) is not None:
                self._operation = "a storage changes its size"
                self._add_event(storage, size - storage.bytes)
                storage.bytes = size
            return result

        with patch.object(torch.UntypedStorage, "resize_", resize_and_record):
            yield

    def follow(self, model: nn.Module) -> None:
        """Know which module computes, its parameters as they are then (FSDP exchanges them), and their gradients."""
        last_output: Callable[[], Tensor | None] = lambda: None  # noqa: E731

        def enter(module: nn.Module, name: str) -> None:
            self._modules.append(name)
            for parameter in module.parameters(recurse=False):
                self.mark(parameter, "gathered")
                parameter.register_post_accumulate_grad_hook(mark_gradient)  # type: ignore[no-untyped-call]

        def mark_gradient(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.mark(parameter.grad, "gradients")

        def leave(output: Any, name: str) -> None:
            nonlocal last_output
            self._modules.pop()
            # What a module returns as its last submodule did is that one's.
            if isinstance(output, Tensor) and output.requires_grad and last_output() is not output:
                output.register_hook(lambda _: setattr(self, "_backward_module", name))  # type: ignore[no-untyped-call]
                last_output = weakref.ref(output)

        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda m, _, name=name: enter(m, name))
            module.register_forward_hook(lambda _, __, output, name=name: leave(output, name), always_call=True)

    def summarize(self) -> Memory:
        """What is held from the end of the phase `build` on."""
        held: dict[Any, int] = dict.fromkeys((*PURPOSES, "host"), 0)
        most, by_phase = dict(held), dict[str, Moment]()
        for storage, change, (phase, module, operation) in self._events:
            purpose = "host" if storage.on_host else storage.purpose or "other"
            held[purpose] += change
            most[purpose] = held[purpose] if phase == "build" else max(most[purpose], held[purpose])
            total = sum(held.values()) - held["host"]
            if phase != "build" and (phase not in by_phase or total > by_phase[phase].total):
                where = f"{phase}{f' of {module}' * bool(module)}{f' ({operation})' * (operation is not None)}"
                by_phase[phase] = Moment(total, {each: held[each] for each in PURPOSES}, where)
        return Memory(by_phase, {each: most[each] for each in PURPOSES}, most["host"])

    def _storage(self, tensor: Tensor) -> _Storage:
        handle = tensor.untyped_storage()
        key = handle._cdata
        if key not in self._storages:
            storage = self._storages[key] = _Storage(handle.nbytes(), self._span if self._in_forward else None)
            storage.end = weakref.ref(handle, lambda _: self._free(key))
            self._add_event(storage, storage.bytes)
        return self._storages[key]

    def _free(self, key: int) -> None:
        storage = self._storages.pop(key)
        self._update_span()
        span = storage.forward_span
        if storage.purpose is None and span is not None and (span != self._span or not self._in_forward):
            storage.purpose = "activations"
        self._add_event(storage, -storage.bytes)

    def _update_span(self) -> None:
        """Begin a new span where forward computation begins, be it for the first time or for the backward pass."""
        forward = self.phase == "passes" and (not _in_backward() or torch.is_grad_enabled() or bool(self._modules))
        self._span += forward and not self._in_forward
        self._in_forward = forward

    def _add_event(self, storage: _Storage, change: int) -> None:
        if not change:
            return
        phase, backward = self.phase, self.phase == "passes" and _in_backward()
        if phase == "passes":
            phase = "forward" if not backward else "recomputation" if self._in_forward else "backward"
        module = self._modules[-1] if self._modules else self._backward_module if backward else ""
        self._events.append((storage, change, (phase, module, self._operation)))


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
