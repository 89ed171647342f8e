"""From a checkpoint's files into parts of tensors, block by block; files that are to be verified are hashed on the way.

Beside the targets, one block is held. Nothing is mapped into memory: a file that is cut while it is read is an error
here, where it would be a fatal signal there.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from titanlite.checkpoint.format import DTYPES, Chunk, DamagedCheckpointError, FileEntry, TensorEntry
from titanlite.checkpoint.headers import check_header, parse_table
from titanlite.checkpoint.plan import Box, overlap, within
from titanlite.checkpoint.storage import open_plain, other_content, require_size, verify_file
from titanlite.checkpoint.stream import row_blocks
from titanlite.models.shard import Shard

BLOCK_BYTES = 2**22
"""What is read at once: whole rows of about this size (one row, if that is larger). So small that it is still in the
processor's cache when it is hashed and copied."""
RUN_BYTES = 2**12
"""Rows of which no more than this is wanted are read whole, as a disk gives whole pages anyway."""
MAX_TABLE_BYTES = 10**8
"""The library's own limit."""


def read_verified(
    path: Path,
    expected: FileEntry,
    stored: Mapping[str, TensorEntry],
    chunks: list[tuple[str, Chunk]],
    into: Mapping[str, Shard],
) -> None:
    """Read all of a file once: compare it with the manifest, and copy what `into` has a part of.

    `chunks` are those of `stored` that lie in it. Raises `DamagedCheckpointError` and `OSError`; what `into` then holds
    is undefined.
    """
    with open_plain(path) as file:
        require_size(path, file, expected)
        try:
            check_header(path, stored, chunks)
        except DamagedCheckpointError:
            verify_file(path, expected)  # if it is not the file that was written, that is what to say
            raise
        reader, known = _Reader(path, file, xxhash.xxh3_128()), {chunk.key: (name, chunk) for name, chunk in chunks}
        for key, begin, size in reader.table():
            name, chunk = known.get(key, ("", None))
            if chunk is not None and name in into:
                reader.take(begin, chunk, stored[name].dtype, (chunk.offset, chunk.shape), into[name])
            else:
                reader.skip(begin, size)
        if reader.hexdigest() != expected.xxh3_128:
            raise other_content(path)


def read_parts(
    path: Path, stored: Mapping[str, TensorEntry], chunks: list[tuple[str, Chunk]], into: Mapping[str, Shard]
) -> None:
    """Copy the parts that `into` has of these chunks of a file and read no others: another rank verifies it.

    Raises `DamagedCheckpointError` and `OSError`.
    """
    with open_plain(path) as file:
        reader = _Reader(path, file, None)
        places = {key: (begin, size) for key, begin, size in reader.table()}
        for name, chunk in chunks:
            begin, size = places.get(chunk.key, (0, -1))
            if size != stored[name].chunk_bytes(chunk):
                raise DamagedCheckpointError(f"{path} holds '{chunk.key}' otherwise than its manifest says.")
            part = overlap((chunk.offset, chunk.shape), into[name].box)
            assert part is not None
            reader.take(begin, chunk, stored[name].dtype, part, into[name])


class _Reader:
    """A safetensors file, opened; hashes what it reads if it is given a digest."""

    def __init__(self, path: Path, file: FileIO, digest: xxhash.xxh3_128 | None) -> None:
        self._path = path
        self._file = file
        self._digest = digest
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def table(self) -> list[tuple[str, int, int]]:
        """(key, first byte, bytes) of each tensor, in the file's order, which leaves no gap."""
        length = bytearray(8)
        self._read(0, memoryview(length))
        (count,) = struct.unpack("<Q", length)
        size = os.fstat(self._file.fileno()).st_size
        if count > min(size, MAX_TABLE_BYTES):
            raise DamagedCheckpointError(f"{self._path} is not a readable safetensors file: its table is too large.")
        text = bytearray(count)
        self._read(8, memoryview(text))
        return parse_table(self._path, text, size)

    def skip(self, begin: int, size: int) -> None:
        """Read bytes that nobody here wants."""
        block = self._block(min(size, BLOCK_BYTES)).numpy().data
        for first in range(0, size, BLOCK_BYTES):
            self._read(begin + first, block[: size - first])

    def take(self, begin: int, chunk: Chunk, dtype: str, box: Box, shard: Shard) -> None:
        """Read a box of a chunk, whose values begin at byte `begin`, and copy what the shard has of it."""
        origin, values_dtype, itemsize = (chunk.offset, chunk.shape), getattr(torch, dtype), DTYPES[dtype][0]
        offset, size = without_short_runs(origin, box, RUN_BYTES // itemsize)
        for place, extent in row_blocks(size, itemsize, BLOCK_BYTES):
            block = tuple(a + b for a, b in zip(offset, place, strict=True)), extent
            part = overlap(block, shard.box)
            target = None if part is None else shard.tensor.detach()[within(part, shard.box)]
            if target is not None and part == block and _takes_bytes(target, values_dtype):
                self._read_runs(begin, origin, block, target)
                continue
            values = self._block(itemsize * math.prod(extent)).view(values_dtype).view(extent)
            self._read_runs(begin, origin, block, values)
            if part is not None and target is not None:
                target.copy_(values[within(part, block)])

    def hexdigest(self) -> str:
        assert self._digest is not None
        return self._digest.hexdigest()

    def _block(self, size: int) -> Tensor:
        """Bytes to read into, the same ones each time: the allocator would take some time and more memory than that."""
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return self._scratch[:size]

    def _read_runs(self, begin: int, origin: Box, block: Box, values: Tensor) -> None:
        memory, done = values.view(-1).view(torch.uint8).numpy().data, 0
        itemsize = values.element_size()
        for first, count in runs(origin, block):
            self._read(begin + first * itemsize, memory[done : done + count * itemsize])
            done += count * itemsize

    def _read(self, offset: int, memory: memoryview) -> None:
        """Fill `memory` from byte `offset` on."""
        self._file.seek(offset)
        done = 0
        while done < len(memory):
            count = self._file.readinto(memory[done:])
            if not count:
                raise DamagedCheckpointError(f"{self._path} is damaged: it was cut while it was read.")
            done += count
        if self._digest is not None:
            self._digest.update(memory)


def runs(whole: Box, box: Box) -> Iterator[tuple[int, int]]:
    """(first element, elements) of what lies together of a box in an array that holds `whole`, row-major; in order."""
    start, size, shape = [a - b for a, b in zip(box[0], whole[0], strict=True)], box[1], whole[1]
    if not shape:
        yield 0, 1
        return
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    inner = len(shape) - 1  # the axes after it are spanned whole, so that a run goes through them
    while inner > 0 and size[inner] == shape[inner]:
        inner -= 1
    outer = [range(a, a + n) for a, n in zip(start[:inner], size[:inner], strict=True)]
    for place in itertools.product(*outer):
        first = sum(a * stride for a, stride in zip((*place, start[inner]), strides[: inner + 1], strict=True))
        yield first, size[inner] * strides[inner]


def without_short_runs(whole: Box, box: Box, elements: int) -> Box:
    """The box, widened along its last axes until what lies together is more than so many elements, or a whole row."""
    offset, size = list(box[0]), list(box[1])
    for axis in reversed(range(1, len(size))):
        if math.prod(size[axis:]) > elements:
            break
        offset[axis], size[axis] = whole[0][axis], whole[1][axis]
    return tuple(offset), tuple(size)


def _takes_bytes(target: Tensor, dtype: torch.dtype) -> bool:
    """Whether a file's bytes can be read into the tensor's own memory."""
    return target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous()
