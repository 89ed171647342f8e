"""Opening safetensors files, and the table at the head of one compared with what a manifest says of the file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from errno import ENOENT
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from titanlite.checkpoint.format import DTYPES, Chunk, DamagedCheckpointError, TensorEntry
from titanlite.checkpoint.storage import open_plain

Placed = dict[str, list[tuple[str, Chunk]]]
"""File -> (tensor, chunk) of what lies in it."""


def placed_chunks(tensors: Mapping[str, TensorEntry]) -> Placed:
    """Which chunks lie in which file."""
    placed: Placed = {}
    for name, entry in tensors.items():
        for chunk in entry.chunks:
            placed.setdefault(chunk.file, []).append((name, chunk))
    return placed


@contextmanager
def open_tensors(path: Path, framework: str = "pt") -> Iterator[Any]:
    """The library's handle of a file. Raises `SafetensorError`, and `OSError` also where torch calls it otherwise."""
    try:
        handle = safe_open(path, framework=framework)
    except RuntimeError as error:  # of torch's memory map: the library looks for the file first, and then torch
        if path.exists():
            raise
        raise FileNotFoundError(ENOENT, os.strerror(ENOENT), str(path)) from error
    with handle:
        yield handle


def check_header(path: Path, stored: Mapping[str, TensorEntry], chunks: list[tuple[str, Chunk]]) -> None:
    """The file's own table must say what the manifest says. Raises `DamagedCheckpointError`."""
    open_plain(path).close()  # the library waits for whoever may write into a pipe
    try:
        with open_tensors(path, framework="numpy") as file:  # no values are read, so torch need not be there
            present = set(file.keys())
            for name, chunk in chunks:
                if chunk.key not in present:
                    raise DamagedCheckpointError(f"{path} does not hold '{chunk.key}', which its manifest lists.")
                values = file.get_slice(chunk.key)
                dtype = DTYPES[stored[name].dtype][1]
                if tuple(values.get_shape()) != chunk.shape or values.get_dtype() != dtype:
                    raise DamagedCheckpointError(f"{path} holds '{chunk.key}' otherwise than its manifest says.")
    except (SafetensorError, OSError) as error:
        raise DamagedCheckpointError(f"{path} is not a readable safetensors file: {error}.") from error


def parse_table(path: Path, text: bytes | bytearray, size: int) -> list[tuple[str, int, int]]:
    """(key, first byte, bytes) of each tensor, in order of place, from a header's JSON in a file of `size` bytes.

    Raises `DamagedCheckpointError` if it is none, or leaves gaps.
    """
    try:
        fields = json.loads(text)
        fields.pop("__metadata__", None)
        spans = {key: entry["data_offsets"] for key, entry in fields.items()}
        ordered = sorted(spans, key=lambda key: tuple(spans[key]))
        edges, origin = [0, *(spans[key][1] for key in ordered)], 8 + len(text)
        whole = all(type(edge) is int for edge in edges) and edges == sorted(edges) and origin + edges[-1] == size
        if not whole or [spans[key][0] for key in ordered] != edges[:-1]:
            raise ValueError("its table has gaps")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} is not a readable safetensors file: {error!r}.") from None
    return [(key, origin + begin, spans[key][1] - begin) for key, begin in zip(ordered, edges[:-1], strict=True)]
