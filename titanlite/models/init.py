"""Initial weights as a function of (seed, parameter name, global index) alone, unlike DTensor's, which see the mesh.

Blocks of whole leading rows are drawn on the CPU, each from a generator of its own, so that a rank which owns
some rows draws only their blocks and gets the same bits as a process that owns everything.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from titanlite.models.shard import Shard

_BLOCK_ELEMENTS = 2**18  # drawn from one generator: part of the definition of the weights


def initialise(table: Mapping[str, Shard], std_of: Callable[[str], float | None], seed: int) -> None:
    """Fill, in place, what is held of every parameter: normal with std_of(name), or ones where that is None."""
    with torch.no_grad():
        for name, held in table.items():
            std = std_of(name)
            if std is None:
                held.tensor.fill_(1.0)
                continue
            last = held.offset[0] + held.tensor.shape[0]
            values = draw_rows(name, held.shape, held.offset[0], last, std, seed)
            for dimension in range(1, values.dim()):
                values = values.narrow(dimension, held.offset[dimension], held.tensor.shape[dimension])
            held.tensor.copy_(values)


def draw_rows(name: str, shape: tuple[int, ...], first: int, last: int, std: float, seed: int) -> Tensor:
    """Rows first … last - 1 of the initial value of a parameter of global `shape`; float32, on the CPU."""
    row_elements = math.prod(shape[1:])
    block_rows = max(1, _BLOCK_ELEMENTS // max(row_elements, 1))
    pieces = [torch.empty(0, *shape[1:])]
    for block in range(first // block_rows, -(-last // block_rows) if last > first else 0):
        start, stop = block * block_rows, min((block + 1) * block_rows, shape[0])
        digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
        # torch takes 63 bits without complaint.
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
        values = torch.empty(stop - start, *shape[1:], device="cpu").normal_(0.0, std, generator=generator)
        pieces.append(values[max(first - start, 0) : last - start])
    return torch.cat(pieces)
