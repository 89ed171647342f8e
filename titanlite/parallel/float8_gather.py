"""Sharded weights that travel in float8: half the bytes of an all-gather in bfloat16.

Ranks hold whole rows, so each rank casts its own with a scale a row; what arrives is bfloat16 again, every value one
that float8 has. Casting that for a product changes nothing but values close to nothing beside the largest, since all
scales are powers of two: nobody needs to ask for the largest value of a whole weight first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from titanlite.parallel.float8_message import Parts, packed
from titanlite.parallel.tensor import all_gather
from titanlite.plan.float8 import Cast
from titanlite.plan.layout import ceil_div
from titanlite.precision.float8 import Float8Linear, quantise

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROWS = Cast("e4m3", "row")


def gather_in_float8(units: Sequence[nn.Module], ranks: int) -> None:
    """Have the FSDP units gather the weights of converted linears in float8, over `ranks` that they are cut over."""
    for unit in units:
        shares = tuple(_shares(unit, ranks))
        if any(share.converted for share in shares):
            assert isinstance(unit, FSDPModule)
            unit.set_custom_all_gather(Float8Gather(shares))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Share:
    """What each rank sends of a parameter, in FSDP's order; the last ranks' may be padded."""

    rows: int
    columns: int
    converted: bool
    fused: bool
    """Whether its cast is Triton's."""


def _shares(unit: nn.Module, ranks: int) -> Iterator[_Share]:
    for module in unit.modules():
        multiply = getattr(module, "multiply", None)
        converted = isinstance(multiply, Float8Linear)
        for parameter in module.parameters(recurse=False):
            rows, *rest = parameter.shape
            yield _Share(ceil_div(rows, ranks), prod(rest), converted, converted and multiply.fused)


class Float8Gather:
    """An all-gather of a unit's parameters (torch's `AllGather`, by shape)."""

    def __init__(self, shares: Sequence[_Share]) -> None:
        self._shares = shares

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what is gathered."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Gather `input_tensor`, this rank's shares one after the other, into `output_tensor`."""
        sent = packed(self._message(input_tensor))
        received = all_gather(sent, group)
        self._unpack(received.view(group.size(), -1), output_tensor.view(group.size(), -1))

    def _message(self, flat: Tensor) -> Iterator[Tensor]:
        """What is sent for each share: its values, or float8 values and the scale of each row."""
        for share, values in self._split(flat):
            if share.converted:
                yield from quantise(values, _ROWS, share.fused)
            else:
                yield values

    def _unpack(self, messages: Tensor, out: Tensor) -> None:
        """The values of the ranks' messages [ranks, bytes], all at once, into what is gathered [ranks, numbers]."""
        parts = Parts(messages)
        for share, values in self._split(out):
            if share.converted:
                rounded, scales = parts.next_rows(share.rows, share.columns, _ROWS)
                torch.mul(rounded.to(values.dtype), scales.to(values.dtype), out=values)
            else:
                values.copy_(parts.next((share.rows, share.columns), values.dtype))

    def _split(self, flat: Tensor) -> Iterator[tuple[_Share, Tensor]]:
        """Each share with its [..., rows, columns] of `flat` [..., numbers]."""
        pieces = flat.split([share.rows * share.columns for share in self._shares], dim=-1)
        return ((s, piece.unflatten(-1, (s.rows, s.columns))) for s, piece in zip(self._shares, pieces, strict=True))
