"""Collectives on tensors, and messages in float8.

Functional collectives, waited for at once: the form that the compiler knows how to split and overlap. (The plain calls
have other names from one version of torch to the next.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from titanlite.precision.float8 import FORMATS

if TYPE_CHECKING:
    import torch.distributed as dist

    from titanlite.plan.float8 import Cast

SEQUENCE = 1  # dimension of activations [batch, seq, …] that is divided between ranks

_ops = torch.ops._c10d_functional


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[rows, …] of each rank -> [ranks x rows, …]."""
    return _ops.wait_tensor(_ops.all_gather_into_tensor(x, group.size(), group.group_name))


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks x rows, …] of each rank -> the sum over ranks of this rank's [rows, …]."""
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(x, "sum", group.size(), group.group_name))


def all_reduce(x: Tensor, operation: str, group: dist.ProcessGroup) -> Tensor:
    """The `sum` or `max` over the ranks, of each element."""
    return _ops.wait_tensor(_ops.all_reduce(x, operation, group.group_name))


OVERLAPPED: set[str] = set()  # names of groups whose messages the compiler splits: it knows them by copies before


def gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[batch, seq / ranks, …] of each rank -> [batch, seq, …] on all."""
    if len(x) == 1 and group.group_name not in OVERLAPPED:  # parts lie in order as they come
        return all_gather(x.contiguous(), group).flatten(0, 1).unsqueeze(0)
    return torch.cat(all_gather(x.contiguous(), group).chunk(group.size()), dim=SEQUENCE)


def scatter_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[batch, seq, …] of each rank -> the sum over ranks of this rank's part, [batch, seq / ranks, …]."""
    if len(x) == 1 and group.group_name not in OVERLAPPED:
        return reduce_scatter(x.contiguous().unflatten(1, (group.size(), -1))[0], group)
    return reduce_scatter(torch.cat(x.chunk(group.size(), dim=SEQUENCE)), group)


# ---- numbers in float8 with their scales, as the bytes of one message: gloo does not send float8 ---------------------

Part = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of a tensor in a message

_ALIGNMENT = 8  # bytes: each part of a message begins at a multiple, to be read in any dtype


def pack(parts: Iterable[Tensor]) -> Tensor:
    """The bytes of all parts, each padded to `_ALIGNMENT`."""
    flat = [part.contiguous().view(-1).view(torch.uint8) for part in parts]
    return torch.cat([piece for part in flat for piece in (part, part.new_zeros(-part.numel() % _ALIGNMENT))])


def unpack(messages: Tensor, parts: Iterable[Part]) -> list[Tensor]:
    """Messages [..., bytes] that `pack` made of such parts -> [..., *shape] of each, in the memory of the messages."""
    found, at = [], 0
    for shape, dtype in parts:
        size = prod(shape) * dtype.itemsize
        found.append(messages[..., at : at + size].view(dtype).unflatten(-1, shape))
        at += size + -size % _ALIGNMENT
    return found


def rows_in_float8(rows: int, columns: int, cast: Cast) -> Sequence[Part]:
    """A matrix cast with a scale for each row: values and scales."""
    return ((rows, columns), FORMATS[cast.format]), ((rows, 1), torch.float32)
