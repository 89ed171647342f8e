"""How far two checkpoints are apart, tensor by tensor, however each of them is cut; a few blocks are in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from titanlite.checkpoint.examine import damages
from titanlite.checkpoint.format import Chunk, DamagedCheckpointError, TensorEntry
from titanlite.checkpoint.headers import open_tensors
from titanlite.checkpoint.plan import Box, overlap, within
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


def differences(a: Path, b: Path, prefix: str = "") -> Iterator[Difference]:
    """Every tensor of either checkpoint whose name begins with `prefix`, in the first one's order.

    Raises `DamagedCheckpointError` if a file of one is not as its manifest says; hashes are not compared.
    """
    for folder in (a, b):
        for damage in damages(folder):
            raise DamagedCheckpointError(damage)
    left, right = read_manifest(a).tensors, read_manifest(b).tensors
    for name in dict.fromkeys([*left, *right]):
        if not name.startswith(prefix):
            continue
        one, other = left.get(name), right.get(name)
        texts = _text(one), _text(other)
        if one is None or other is None or one.shape != other.shape:
            yield Difference(name, *texts)
        else:
            differing, max_abs, max_rel = _apart(a, one, b, other)
            yield Difference(name, *texts, differing, max_abs, max_rel)


def _text(entry: TensorEntry | None) -> str | None:
    return None if entry is None else f"{entry.dtype}{list(entry.shape)}"


def _apart(a: Path, one: TensorEntry, b: Path, other: TensorEntry) -> tuple[int, float, float]:
    """Differing values, largest absolute and largest relative difference."""
    count, max_abs, max_rel = 0, 0.0, 0.0
    try:
        with ExitStack() as stack:
            files: dict[Path, Any] = {}

            def opened(path: Path) -> Any:
                if path not in files:
                    files[path] = stack.enter_context(open_tensors(path))
                return files[path]

            for left in one.chunks:
                for right in other.chunks:
                    shared = overlap((left.offset, left.shape), (right.offset, right.shape))
                    for block in _blocks(shared) if shared is not None else ():
                        x = _values(opened(a / left.file), left, block)
                        y = _values(opened(b / right.file), right, block)
                        differing, absolute, relative = _compared(x, y)
                        count += differing
                        max_abs, max_rel = max(max_abs, absolute), max(max_rel, relative)
    except (SafetensorError, OSError) as error:
        raise DamagedCheckpointError(f"a file of {a} or {b} cannot be read: {error}.") from error
    return count, max_abs, max_rel


def _blocks(box: Box) -> Iterator[Box]:
    """The box in runs of rows of at most `_BLOCK_VALUES` values."""
    offset, size = box
    if not size:
        yield box
        return
    rows = max(1, _BLOCK_VALUES // max(1, math.prod(size[1:])))
    for start in range(0, size[0], rows):
        yield (offset[0] + start, *offset[1:]), (min(rows, size[0] - start), *size[1:])


def _values(file: Any, chunk: Chunk, block: Box) -> torch.Tensor:
    if not chunk.shape:
        return torch.as_tensor(file.get_tensor(chunk.key))
    return torch.as_tensor(file.get_slice(chunk.key)[within(block, (chunk.offset, chunk.shape))])


def _compared(x: torch.Tensor, y: torch.Tensor) -> tuple[int, float, float]:
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
