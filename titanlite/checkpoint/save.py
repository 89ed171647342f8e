"""Writing one checkpoint: each rank its part of the tensors to files of its own, then one manifest that makes them one.

Takes parts of tensors by name and knows no model and no optimizer; when to save and what to keep is the manager's
matter.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import titanlite
from titanlite.checkpoint.format import DTYPES, Manifest, Scalar, encode
from titanlite.checkpoint.plan import FILE_BYTES, Box, group_by_size, pieces, within
from titanlite.checkpoint.ranks import ALONE, Ranks
from titanlite.checkpoint.storage import abandon, begin, commit, pending, refusals_explained
from titanlite.checkpoint.stream import Source, write_tensors
from titanlite.models.shard import Shard


@dataclass(frozen=True)
class Piece:
    """A box of a whole tensor that this rank writes."""

    name: str
    offset: tuple[int, ...]
    values: Tensor
    """On any device; a view of what is trained, or a copy of it."""


@dataclass(frozen=True)
class Portion:
    """What falls to this rank of a checkpoint."""

    table: Mapping[str, Mapping[str, object]]
    """dtype and whole shape of the tensors that it writes something of, and of empty ones."""
    pieces: Mapping[str, Piece]
    """By the keys that they have in their files."""
    file_bytes: int
    """Size of its files."""

    @property
    def nbytes(self) -> int:
        return sum(piece.values.nbytes for piece in self.pieces.values())


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says beside its tensors; see `format.Manifest`. Of all ranks' the first one's counts."""

    step: int
    samples: int = 0
    tokens: int = 0
    recipe: str = ""
    values: Mapping[str, Scalar] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def portion_of(tensors: Mapping[str, Shard], file_bytes: int = FILE_BYTES) -> Portion:
    """What this rank writes of a state, by views: each box that several ranks hold is shared out among them.

    Tensors that share storage must be reduced to one name by the caller.
    """
    table: dict[str, Mapping[str, object]] = {}
    cut: dict[str, Piece] = {}
    for name, shard in tensors.items():
        tensor, box = shard.tensor.detach(), shard.box
        mine = pieces(name, box, tensor.nbytes, shard.copies, shard.copy, file_bytes)
        if mine or 0 in shard.shape:
            table[name] = {"dtype": _stored_dtype(name, tensor), "shape": shard.shape}
        for part in mine:
            cut[_key(name, part, shard.shape)] = Piece(name, part[0], tensor[within(part, box)])
    return Portion(table, cut, file_bytes)


class Staging:
    """Host memory for copies of one run's portion, kept from save to save: from the second on its pages are there."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, portion: Portion) -> Portion:
        """The same portion as it is now, in the host's memory; what is trained may change once this returns."""
        values = {key: piece.values for key, piece in portion.pieces.items()}
        if self._buffers.keys() != values.keys():
            self._buffers = {key: _host_memory_like(tensor) for key, tensor in values.items()}
        for key, tensor in values.items():
            self._buffers[key].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in values.values()):
            torch.cuda.current_stream().synchronize()
        copies = {key: replace(piece, values=self._buffers[key]) for key, piece in portion.pieces.items()}
        return replace(portion, pieces=copies)


def save_state(final: Path, portion: Portion, facts: Facts, ranks: Ranks = ALONE) -> str:
    """Write the folder `final` atomically; called by every rank, each with its portion.

    Returns once the checkpoint is committed, with what `commit` says of it. Raises `CheckpointError` on every rank if a
    disk refuses on any, with nothing changed on it.
    """
    explained = refusals_explained(final, portion.nbytes)
    try:
        ranks.first(explained(lambda: begin(final)))
        tables = ranks.each(explained(lambda: write_portion(pending(final), portion, ranks.rank)))
        return ranks.first(explained(lambda: commit(final, manifest_text(tables, facts)).encode())).decode()
    except Exception:  # on all ranks alike; what an interruption leaves, the next start clears
        ranks.first(lambda: abandon(final))
        raise


def write_portion(folder: Path, portion: Portion, rank: int = 0) -> bytes:
    """Write and sync a portion; its table of tensors and files, as JSON, for `joined`. Raises `OSError`."""
    tensors: dict[str, Any] = {name: {**entry, "chunks": []} for name, entry in portion.table.items()}
    files = {}
    sizes = {key: piece.values.nbytes for key, piece in portion.pieces.items()}
    for number, keys in enumerate(group_by_size(sizes, portion.file_bytes)):
        file = f"tensors-{rank:05d}-{number:03d}.safetensors"  # see writer_of
        files[file] = write_tensors(folder / file, {key: _source(portion.pieces[key].values) for key in keys})
        for key in keys:
            piece = portion.pieces[key]
            chunk = {"offset": piece.offset, "shape": tuple(piece.values.shape), "file": file, "key": key}
            tensors[piece.name]["chunks"].append(chunk)
    listed = {file: entry.model_dump() for file, entry in files.items()}
    return json.dumps({"tensors": tensors, "files": listed}).encode()


def writer_of(file: str) -> int:
    """The rank that wrote a file of a checkpoint, by its name."""
    return int(file.split("-")[1])


def manifest_text(tables: Sequence[bytes], facts: Facts) -> bytes:
    """The manifest of what all ranks wrote, from their tables in the order of the ranks.

    Raises `ValueError` unless the parts make whole tensors (then the ranks disagree on how these are cut), and
    `CheckpointError` rather than give what no reader would take.
    """
    tensors: dict[str, Any] = {}
    files: dict[str, Any] = {}
    for table in map(json.loads, tables):
        files.update(table["files"])
        for name, part in table["tensors"].items():
            entry = tensors.setdefault(name, {**part, "chunks": []})
            if (entry["dtype"], entry["shape"]) != (part["dtype"], part["shape"]):
                raise ValueError(f"tensor '{name}' is {entry['dtype']}{entry['shape']} on one rank, and not on another")
            entry["chunks"] += part["chunks"]
    told = {**vars(facts), "environment": {**facts.environment, "ranks": str(len(tables))}}
    return encode(Manifest.model_validate_json(json.dumps({**told, "tensors": tensors, "files": files})))


def environment(device: torch.device) -> dict[str, str]:
    """What a run's numbers may depend on beside its recipe: versions, platform, and the device that it trains on."""
    return {
        "titanlite": titanlite.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def dtype_name(tensor: Tensor) -> str:
    """torch's own name of the dtype, such as `float32`."""
    return str(tensor.dtype).removeprefix("torch.")


def _stored_dtype(name: str, tensor: Tensor) -> str:
    dtype = dtype_name(tensor)
    if dtype not in DTYPES:
        raise ValueError(f"tensor '{name}' is {dtype}, which a checkpoint cannot hold")
    return dtype


def _key(name: str, part: Box, shape: tuple[int, ...]) -> str:
    """What a piece is called in its file: as its tensor, with the offset if it is not all of it."""
    return name if part[1] == shape else f"{name}@{','.join(map(str, part[0]))}"


def _source(values: Tensor) -> Source:
    shape = tuple(values.shape)
    origin = ((0,) * len(shape), shape)
    return Source(dtype_name(values), shape, lambda box: values[within(box, origin)].cpu())


def _host_memory_like(tensor: Tensor) -> Tensor:
    # Pinned: only to such memory does a GPU copy without the host's help.
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
