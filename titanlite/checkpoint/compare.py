"""How far two checkpoints are apart, tensor by tensor, however each of them is cut; a few blocks are in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from titanlite.checkpoint.examine import find_corruption
from titanlite.checkpoint.format import DamagedCheckpointError, TensorEntry
from titanlite.checkpoint.load import read_box
from titanlite.checkpoint.plan import row_blocks
from titanlite.checkpoint.storage import read_manifest

_BLOCK_VALUES = 2**22
"""Values compared at once, in float64; a row that has more is compared whole."""


@dataclass(frozen=True)
class Difference:
    """One tensor in two checkpoints."""

    name: str
    a: str | None
    """`dtype[shape]` in the first; None: it has no such tensor."""
    b: str | None
    differing: int | None = None
    """Values that are not the same; None where the shapes cannot be compared. NaN is the same as NaN."""
    max_abs: float | None = None
    """Largest |a - b|; infinite where only one of the two is finite, or a number."""
    max_rel: float | None = None
    """Largest |a - b| / max(|a|, |b|)."""

    @property
    def is_none(self) -> bool:
        """Whether the tensor is the same in both, its dtype too."""
        return self.a == self.b and self.differing == 0


def compare_checkpoints(a: Path, b: Path, prefix: str = "") -> Iterator[Difference]:
    """Every tensor of either checkpoint whose name begins with `prefix`, in the first one's order.

    Raises `DamagedCheckpointError` if a file of one is not as its manifest says; hashes are not compared.
    """
    for folder in (a, b):
        for damage in find_corruption(folder):
            raise DamagedCheckpointError(damage)
    left, right = read_manifest(a).tensors, read_manifest(b).tensors
    for name in dict.fromkeys([*left, *right]):
        if not name.startswith(prefix):
            continue
        one, other = left.get(name), right.get(name)
        texts = _text(one), _text(other)
        if one is None or other is None or one.shape != other.shape:
            yield Difference(name, *texts)
            continue
        blocks = row_blocks(((0,) * len(one.shape), one.shape), 1, _BLOCK_VALUES)
        parts = [_compare(read_box(a, one, block), read_box(b, other, block)) for block in blocks]
        counts, absolute, relative = zip(*parts, strict=True) if parts else ((), (), ())
        yield Difference(name, *texts, sum(counts), max(absolute, default=0.0), max(relative, default=0.0))


def _text(entry: TensorEntry | None) -> str | None:
    return None if entry is None else f"{entry.dtype}{list(entry.shape)}"


def _compare(x: torch.Tensor, y: torch.Tensor) -> tuple[int, float, float]:
    """Differing values, largest absolute and largest relative difference."""
    a, b = x.double(), y.double()
    exact = (x, y) if x.dtype == y.dtype == torch.int64 else (a, b)  # float64 cannot hold every int64
    same = (exact[0] == exact[1]) | (a.isnan() & b.isnan())
    differing = int((~same).sum())
    if differing == 0:
        return 0, 0.0, 0.0
    apart = (a - b).abs()[~same].nan_to_num(nan=math.inf, posinf=math.inf)
    larger = torch.maximum(a.abs(), b.abs())[~same]
    relative = torch.where(apart.isinf(), apart, apart / larger)
    return differing, float(apart.max()), float(relative.max())
