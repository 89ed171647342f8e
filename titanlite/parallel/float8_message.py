"""Numbers in float8 with their scales, as the bytes of one message, and what comes out of it.

Bytes, as gloo does not send float8. Knows nothing of groups, nor of whose numbers they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING

import torch

from titanlite.plan.float8 import Cast
from titanlite.precision.float8 import FORMATS

if TYPE_CHECKING:
    from torch import Tensor

_ALIGNMENT = 8
"""Bytes: each part of a message begins at a multiple, to be read as any number format."""


def packed(parts: Iterable[Tensor]) -> Tensor:
    """The bytes of all parts, each filled up to `_ALIGNMENT`."""
    flat = [part.contiguous().view(-1).view(torch.uint8) for part in parts]
    return torch.cat([piece for part in flat for piece in (part, part.new_zeros(_padding(part.numel())))])


def _padding(size: int) -> int:
    return -size % _ALIGNMENT


class Parts:
    """Reads messages that `packed` wrote, one or several of the same shape at once, part by part."""

    def __init__(self, messages: Tensor) -> None:
        """messages [..., bytes]."""
        self._messages = messages
        self._read = 0

    def next(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """[..., *shape], in the memory of the messages."""
        size = prod(shape) * dtype.itemsize
        part = self._messages[..., self._read : self._read + size].view(dtype)
        self._read += size + _padding(size)
        return part.unflatten(-1, tuple(shape))

    def next_rows(self, rows: int, columns: int, cast: Cast) -> tuple[Tensor, Tensor]:
        """A matrix cast with a scale for each row: values [..., rows, columns] and scales [..., rows, 1]."""
        return self.next((rows, columns), FORMATS[cast.format]), self.next((rows, 1), torch.float32)
