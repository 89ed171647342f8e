"""`[debug]`: hooks that look at every module's output. They slow a run down and read the device; off by default."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from titanlite.errors import NonfiniteFound


class NonfiniteFinder:
    """Stops at the first module whose output, or the gradient of whose output, is not finite, and says which."""

    def __init__(self, model: nn.Module) -> None:
        self.step = 0
        for name, module in model.named_modules():
            if name:
                module.register_forward_hook(partial(self._look_at_output, name))

    def _look_at_output(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in filter(Tensor.is_floating_point, _tensors(output)):
            self._look(name, module, "output", tensor)
            if tensor.requires_grad:
                tensor.register_hook(partial(self._look, name, module, "gradient of the output"))  # type: ignore[no-untyped-call]

    def _look(self, name: str, module: nn.Module, what: str, tensor: Tensor) -> None:
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise NonfiniteFound(
                f"step {self.step}: {name} ({type(module).__name__}): the {what} has {bad} non-finite of "
                f"{tensor.numel()} values, shape {list(tensor.shape)}, {tensor.dtype}. It is the first module in "
                "the order of computation; the step was not applied."
            )


@contextmanager
def trace_shapes(model: nn.Module, info: Callable[[str], None]) -> Iterator[None]:
    """Print each module's name, type, input and output shapes as it finishes its forward pass."""

    def show(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        info(f"{name:32} {type(module).__name__:12} {_shapes(inputs):32} -> {_shapes(output)}")

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.enter_context(module.register_forward_hook(partial(show, name or "(model)")))
        yield


def _tensors(value: Any) -> list[Tensor]:
    """Those in a module's input or output, however they are nested."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _shapes(value: Any) -> str:
    return " ".join(f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for tensor in _tensors(value))
