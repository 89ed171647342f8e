"""Fake tensors that are quick enough for a million operations, and whose operations are recorded.

torch's `FakeTensorMode` knows what any operation gives, but takes a fifth of a millisecond for it. A large model's step
repeats a few dozen operations, which are answered here; all others are left to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

_aten = torch.ops.aten
_VIEWS = frozenset(
    {
        _aten.view.default, _aten._unsafe_view.default, _aten.t.default, _aten.transpose.int, _aten.detach.default,
        _aten.split.Tensor, _aten.slice.Tensor, _aten.as_strided.default, _aten.expand.default, _aten.unsqueeze.default,
        _aten.add_.Tensor,
    }
)  # fmt: skip
"""Results in the memory of the first argument: a kernel for tensors without memory finds them at once."""
_NEW = frozenset(
    {
        _aten.mm.default, _aten.mul.Tensor, _aten.mul.Scalar, _aten.add.Tensor, _aten.sub.Tensor, _aten.neg.default,
        _aten.pow.Tensor_Scalar, _aten.sum.dim_IntList, _aten.mean.dim, _aten.rsqrt.default, _aten.div.Tensor,
        _aten.div.Scalar, _aten.silu.default, _aten.silu_backward.default, _aten.cat.default, _aten._to_copy.default,
    }
)  # fmt: skip
"""One new tensor, whose layout follows from those of the arguments: it is remembered."""


class Recorder(Protocol):
    """What is shown each operation, its arguments and its result."""

    def record(self, operation: Any, arguments: Sequence[Any], named: Mapping[str, Any], result: Any) -> None: ...


class RecordedFakes(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Within this context tensors have shapes and no memory, and `recorders` are shown what is done with them.

    Not the steps by which torch finds an operation's result. Tensors of before are taken as fake ones of their shape.
    """

    def __init__(self, *recorders: Recorder) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._recorders = recorders
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
            for recorder in self._recorders:
                recorder.record(func, args, named, result)
        return result

    def _result(self, func: Any, types: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
        if func in _VIEWS and isinstance(args[0], FakeTensor):
            with in_kernel_invocation_manager(self):
                result = func(*args, **named)
            device = args[0].fake_device
            if isinstance(result, list):  # of a split
                return [FakeTensor(self, each, device) for each in result]
            return result if isinstance(result, FakeTensor) else FakeTensor(self, result, device)
        if func not in _NEW:
            return self.dispatch(func, types, args, named)
        key = (func, _layout(args), tuple(named.items()))
        if key not in self._layouts:
            first: Any = self.dispatch(func, types, args, named)
            self._layouts[key] = (tuple(first.shape), first.stride(), first.dtype, first.fake_device)
            return first
        shape, stride, dtype, device = self._layouts[key]
        return FakeTensor(self, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), device)


def _layout(argument: Any) -> Any:
    """All of an argument that a result's layout can follow from."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.shape, argument.stride(), getattr(argument, "fake_device", None)
    if isinstance(argument, (list, tuple)):
        return tuple(_layout(each) for each in argument)
    return type(argument), argument
