"""The part of a named tensor that one process holds: a box of the whole, or all of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is finite, in one pass and without a copy; waits for the device."""
    if not _may_overflow(tensor):
        return True
    ends = torch.stack(torch.aminmax(tensor.detach()))  # a NaN is both
    return bool(ends.isfinite().all())


@torch.no_grad()
def may_be_nonfinite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether some number may not be finite: a bool scalar on their device, by one fused pass that waits for nothing.

    Norms of finite numbers are finite unless their squares overflow: `is_finite`, several times slower, decides then.
    """
    held = [tensor for tensor in tensors if _may_overflow(tensor)]
    return ~torch.stack(torch._foreach_norm(held)).isfinite().all() if held else torch.zeros((), dtype=torch.bool)


def _may_overflow(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and tensor.is_floating_point() and tensor.element_size() > 1


@dataclass(frozen=True)
class Shard:
    """The elements `offset[d] … offset[d] + tensor.shape[d] - 1` of every dimension d of a whole tensor."""

    tensor: Tensor  # a view of what is held: writing into it sets the parameter. May be empty.
    offset: tuple[int, ...]
    shape: tuple[int, ...]  # shape of the whole tensor
    copies: int = 1  # processes that hold this very box
    copy: int = 0  # which of them this is, from 0

    @property
    def box(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Offset and shape of what is held."""
        return self.offset, tuple(self.tensor.shape)

    @staticmethod
    def whole(tensor: Tensor, copies: int = 1, copy: int = 0) -> Shard:
        """All of `tensor`."""
        return Shard(tensor, (0,) * tensor.dim(), tuple(tensor.shape), copies, copy)

    def of(self, tensor: Tensor) -> Shard:
        """The same part of another tensor of the same whole shape (an optimizer's moment, say)."""
        assert tensor.shape == self.tensor.shape
        return Shard(tensor, self.offset, self.shape, self.copies, self.copy)
