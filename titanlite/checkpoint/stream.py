"""Safetensors files written block by block, so that a file may be larger than the memory there is.

The library's own `save_file` wants all tensors of a file at once.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from titanlite.checkpoint.format import DTYPES, FileEntry
from titanlite.checkpoint.plan import Box, row_blocks
from titanlite.files import sync

BLOCK_BYTES = 2**26
"""A tensor goes through memory in runs of rows of about this size (one row, if that is larger)."""
BATCH_BYTES = 2**25
"""As soon as this is written it is synced, while more is written."""
Data = bytes | memoryview


@dataclass(frozen=True)
class Source:
    """A tensor that is still elsewhere."""

    dtype: str
    """torch's name of the dtype that it is written in."""
    shape: tuple[int, ...]
    read: Callable[[Box], Tensor]
    """Reads a box of it, in any dtype."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0]


def write_tensors(path: Path, tensors: Mapping[str, Source]) -> FileEntry:
    """Write and sync one file; its size and hash. The bytes depend on the tensors and their order. Raises `OSError`.

    Layout: 8 bytes little-endian length of the header; the header, JSON padded by spaces; then the values, those of
    wider dtypes first, so that each begins at a multiple of its element's size.
    """
    order = sorted(tensors, key=lambda name: -DTYPES[tensors[name].dtype][0])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        code = DTYPES[tensors[name].dtype][1]
        header[name] = {"dtype": code, "shape": tensors[name].shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "xb") as file, ThreadPoolExecutor(1) as beside:

        def hash_and_sync(batch: list[Data]) -> None:
            for data in batch:
                digest.update(data)
            if size:
                sync(file.fileno(), path)  # what was written before, so that the disk has work all the time

        for batch in _batches(itertools.chain([struct.pack("<Q", len(text)) + text], _blocks(tensors, order))):
            meanwhile = beside.submit(hash_and_sync, batch)
            file.writelines(batch)
            meanwhile.result()
            size += sum(map(len, batch))
        file.flush()
        sync(file.fileno(), path)
    return FileEntry(size, digest.hexdigest())


def _batches(blocks: Iterable[Data]) -> Iterator[list[Data]]:
    """The blocks, as many together as make up `BATCH_BYTES`."""
    batch: list[Data] = []
    size = 0
    for data in blocks:
        batch.append(data)
        size += len(data)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _blocks(tensors: Mapping[str, Source], order: Sequence[str]) -> Iterator[Data]:
    for source in map(tensors.__getitem__, order):
        origin = (0,) * len(source.shape), source.shape
        for box in row_blocks(origin, DTYPES[source.dtype][0], BLOCK_BYTES):
            block = source.read(box).to(getattr(torch, source.dtype)).contiguous()
            yield block.flatten().view(torch.uint8).numpy().data
