"""The table at the head of a safetensors file, read strictly and compared with what a manifest says. No torch.

Read here rather than by the library, which maps files into memory: one that is cut while it is read would be a fatal
signal there, and is an error here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from titanlite.checkpoint.format import DTYPES, Chunk, DamagedCheckpointError, TensorEntry

ChunksByFile = dict[str, list[tuple[str, Chunk]]]
"""File -> (tensor, chunk) of what lies in it."""
MAX_HEADER_BYTES = 10**8
"""The library's own limit."""
_NAMES = {code: name for name, (_, code) in DTYPES.items()}


class StoredTensor(NamedTuple):
    """One tensor of a file."""

    dtype: str
    """torch's name, or safetensors' code of a dtype that no checkpoint holds."""
    shape: tuple[int, ...]
    begin: int
    """First byte in the file."""
    nbytes: int


def chunks_by_file(tensors: Mapping[str, TensorEntry]) -> ChunksByFile:
    """Which chunks lie in which file."""
    placed: ChunksByFile = {}
    for name, entry in tensors.items():
        for chunk in entry.chunks:
            placed.setdefault(chunk.file, []).append((name, chunk))
    return placed


def read_header(path: Path, file: FileIO) -> bytes:
    """The bytes before the values: the length of the table, and the table.

    Raises `DamagedCheckpointError` and `OSError`.
    """
    length = file.read(8) or b""
    count = int.from_bytes(length, "little")
    if count > min(os.fstat(file.fileno()).st_size, MAX_HEADER_BYTES):
        raise DamagedCheckpointError(f"{path} is not a readable safetensors file: its table is too large.")
    return length + (file.read(count) or b"")


def parse_table(path: Path, header: bytes, file_bytes: int) -> dict[str, StoredTensor]:
    """The tensors of a file of `file_bytes` bytes by key, in order of place: they fill it without a gap.

    Raises `DamagedCheckpointError`.
    """
    try:
        fields = json.loads(header[8:])
        fields.pop("__metadata__", None)
        table, end = {}, len(header)
        for key, entry in sorted(fields.items(), key=lambda item: tuple(item[1]["data_offsets"])):
            first, last = entry["data_offsets"]
            dtype, shape = _NAMES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"])
            if not all(type(size) is int and size >= 0 for size in (first, last, *shape)):
                raise ValueError("its sizes are no sizes")
            nbytes = last - first
            if len(header) + first != end or (dtype in DTYPES and nbytes != math.prod(shape) * DTYPES[dtype][0]):
                raise ValueError("its table has gaps, or tensors of another size than their shape's")
            table[key] = StoredTensor(dtype, shape, end, nbytes)
            end += nbytes
        if end != file_bytes:
            raise ValueError("its table is not of all its bytes")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} is not a readable safetensors file: {error!r}.") from None
    return table


def check_table(
    path: Path, table: Mapping[str, StoredTensor], stored: Mapping[str, TensorEntry], chunks: list[tuple[str, Chunk]]
) -> None:
    """A file must hold the chunks of `stored` that its manifest puts there. Raises `DamagedCheckpointError`."""
    for name, chunk in chunks:
        found = table.get(chunk.key)
        if found is None:
            raise DamagedCheckpointError(f"{path} does not hold '{chunk.key}', which its manifest lists.")
        if (found.dtype, found.shape) != (stored[name].dtype, chunk.shape):
            raise DamagedCheckpointError(f"{path} holds '{chunk.key}' otherwise than its manifest says.")
