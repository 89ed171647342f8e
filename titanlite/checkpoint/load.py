"""Reading a checkpoint's tensors into tensors that are already there.

Everything is compared and verified before the first value is overwritten; no pickle is ever opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from titanlite.checkpoint.format import DTYPES, Chunk, DamagedCheckpointError, Manifest, TensorEntry
from titanlite.checkpoint.save import dtype_name
from titanlite.checkpoint.storage import verify_file
from titanlite.errors import CheckpointError


class Rows(Protocol):
    """Some consecutive rows of a tensor that is wanted no further (`parallel.shards.Shard` is one)."""

    @property
    def rows(self) -> torch.Tensor:
        """Where they go."""

    @property
    def first(self) -> int:
        """Index of the first of them in the whole tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""


Target = torch.Tensor | Rows


def read_tensors(folder: Path, manifest: Manifest, into: Mapping[str, Target], prefix: str = "") -> None:
    """Copy the checkpoint's values into `into`, in place; of a tensor that is wanted in part, only that is read.

    `prefix` limits the reading to the tensors whose names begin with it (`model.` for the weights alone). Raises
    `CheckpointError` naming every tensor that is missing, unexpected, or of another shape or dtype, and
    `DamagedCheckpointError` if a file is not what the manifest says; in both cases `into` is untouched.
    """
    stored = {name: entry for name, entry in manifest.tensors.items() if name.startswith(prefix)}
    problems = mismatches(stored, into)
    if problems:
        raise CheckpointError(
            f"the checkpoint {folder} does not fit this model ({len(problems)} "
            f"{'difference' if len(problems) == 1 else 'differences'}):\n  " + "\n  ".join(problems)
        )
    by_file: dict[str, list[tuple[str, Chunk]]] = {}
    for name, entry in stored.items():
        for chunk in entry.chunks:
            by_file.setdefault(chunk.file, []).append((name, chunk))
    for file, pieces in by_file.items():
        verify_file(folder / file, manifest.files[file])
        _check_header(folder / file, stored, pieces)
    for file, pieces in by_file.items():
        with torch.no_grad():
            for target, values in _pieces(folder / file, into, pieces):
                target.copy_(values)


def mismatches(stored: Mapping[str, TensorEntry], into: Mapping[str, Target]) -> list[str]:
    """One line for each tensor that stands in the way of loading."""
    problems = [f"{name}: missing in the checkpoint" for name in into if name not in stored]
    problems += [f"{name}: in the checkpoint, but not in this model" for name in stored if name not in into]
    for name, entry in stored.items():
        if name not in into:
            continue
        shape, dtype = tuple(into[name].shape), dtype_name(_held(into[name])[0])
        if shape != entry.shape:
            problems.append(f"{name}: shape {list(entry.shape)} in the checkpoint, {list(shape)} here")
        if dtype != entry.dtype:
            problems.append(f"{name}: {entry.dtype} in the checkpoint, {dtype} here")
    return problems


def _check_header(path: Path, stored: Mapping[str, TensorEntry], pieces: list[tuple[str, Chunk]]) -> None:
    """The file's own table must say what the manifest says. Raises `DamagedCheckpointError`."""
    try:
        with safe_open(path, framework="pt") as file:
            present = set(file.keys())
            for name, chunk in pieces:
                if chunk.key not in present:
                    raise DamagedCheckpointError(f"{path} does not hold '{chunk.key}', which its manifest lists.")
                piece = file.get_slice(chunk.key)
                dtype = DTYPES[stored[name].dtype][1]
                if tuple(piece.get_shape()) != chunk.shape or piece.get_dtype() != dtype:
                    raise DamagedCheckpointError(f"{path} holds '{chunk.key}' otherwise than its manifest says.")
    except (SafetensorError, OSError) as error:
        raise DamagedCheckpointError(f"{path} is not a readable safetensors file: {error}.") from error


def _pieces(
    path: Path, into: Mapping[str, Target], pieces: list[tuple[str, Chunk]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of (the part of a target that a chunk covers, its values mapped from the file)."""
    with safe_open(path, framework="pt") as file:
        for name, chunk in pieces:
            target, first = _held(into[name])
            if not chunk.shape:
                yield target, file.get_tensor(chunk.key)
                continue
            start = max(chunk.offset[0], first)
            stop = min(chunk.offset[0] + chunk.shape[0], first + target.shape[0])
            if start >= stop:
                continue
            target = target.narrow(0, start - first, stop - start)
            for dimension in range(1, target.dim()):
                target = target.narrow(dimension, chunk.offset[dimension], chunk.shape[dimension])
            yield target, file.get_slice(chunk.key)[start - chunk.offset[0] : stop - chunk.offset[0]]


def _held(target: Target) -> tuple[torch.Tensor, int]:
    """The tensor that is filled, and which row of the whole its first one is."""
    return (target.detach(), 0) if isinstance(target, torch.Tensor) else (target.rows.detach(), target.first)
