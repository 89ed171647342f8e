"""Sharded weights that travel in float8: half the bytes of an all-gather in bfloat16.

Ranks hold whole rows, so each rank casts its own with a scale a row; what arrives is bfloat16 again, every value one
that float8 has. Casting that for a product changes nothing but values close to nothing beside the largest, since all
scales are powers of two: the largest value of a whole weight need not be known first.
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

from titanlite.parallel.collectives import Part, all_gather, pack, rows_in_float8, unpack
from titanlite.plan.float8 import Cast
from titanlite.plan.layout import ceil_div
from titanlite.precision.float8 import Float8Linear, quantise

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROWS = Cast("e4m3", "row")


def gather_in_float8(units: Sequence[nn.Module], ranks: int) -> None:
    """Have the FSDP units gather the weights of converted linears in float8, over the `ranks` that share them."""
    for unit in units:
        parameters = tuple(_local_parameters(unit, ranks))
        if any(parameter.converted for parameter in parameters):
            assert isinstance(unit, FSDPModule)
            unit.set_custom_all_gather(Float8Gather(parameters))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _LocalParameter:
    """What each rank sends of a parameter, in FSDP's order; the last ranks' may be padded."""

    rows: int
    columns: int
    converted: bool
    fused: bool
    """Whether its cast is Triton's."""

    def parts(self, dtype: torch.dtype) -> Sequence[Part]:
        """Of a message: its values, or float8 values and the scale of each row."""
        plain: Part = ((self.rows, self.columns), dtype)
        return rows_in_float8(self.rows, self.columns, _ROWS) if self.converted else (plain,)


def _local_parameters(unit: nn.Module, ranks: int) -> Iterator[_LocalParameter]:
    for module in unit.modules():
        multiply = getattr(module, "multiply", None)
        for parameter in module.parameters(recurse=False):
            rows, *rest = parameter.shape
            fused = isinstance(multiply, Float8Linear) and multiply.fused
            yield _LocalParameter(ceil_div(rows, ranks), prod(rest), isinstance(multiply, Float8Linear), fused)


class Float8Gather:
    """An all-gather of a unit's parameters (torch's `AllGather`, by shape)."""

    def __init__(self, parameters: Sequence[_LocalParameter]) -> None:
        self._parameters = parameters

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what is gathered."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Gather `input_tensor`, this rank's parts of the parameters one after the other, into `output_tensor`."""
        received = all_gather(self._message(input_tensor), group)
        self._unpack(received.view(group.size(), -1), output_tensor.view(group.size(), -1))

    def _message(self, flat: Tensor) -> Tensor:
        parts: list[Tensor] = []
        for parameter, values in self._split(flat):
            parts += quantise(values, _ROWS, parameter.fused) if parameter.converted else (values,)
        return pack(parts)

    def _unpack(self, messages: Tensor, out: Tensor) -> None:
        """The values of the ranks' messages [ranks, bytes], all at once, into what is gathered [ranks, numbers]."""
        parts = iter(unpack(messages, (part for each in self._parameters for part in each.parts(out.dtype))))
        for parameter, values in self._split(out):
            if parameter.converted:
                torch.mul(next(parts).to(values.dtype), next(parts).to(values.dtype), out=values)
            else:
                values.copy_(next(parts))

    def _split(self, flat: Tensor) -> Iterator[tuple[_LocalParameter, Tensor]]:
        """Each parameter with its [..., rows, columns] of `flat` [..., numbers]."""
        pieces = flat.split([each.rows * each.columns for each in self._parameters], dim=-1)
        for each, piece in zip(self._parameters, pieces, strict=True):
            yield each, piece.unflatten(-1, (each.rows, each.columns))
