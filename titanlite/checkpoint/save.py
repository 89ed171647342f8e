"""Writing one checkpoint: each rank its part of the tensors to files of its own, then one manifest that makes them one.

Takes parts of tensors by name and knows no model and no optimizer; when to save and what to keep is the manager's
matter.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import titanlite
from titanlite.checkpoint.format import DTYPES, MANIFEST, MAX_MANIFEST_BYTES, Manifest, Scalar, encode
from titanlite.checkpoint.plan import group_by_size, pieces, within
from titanlite.checkpoint.ranks import ALONE, Ranks
from titanlite.checkpoint.storage import abandon, begin, commit, describe_file, pending, refusals_explained
from titanlite.durable import sync_path
from titanlite.errors import CheckpointError
from titanlite.models.shard import Shard

FILE_BYTES = 4 * 2**30
"""A new file begins when the one before would grow past this."""


def save_state(
    final: Path,
    *,
    step: int,
    samples: int,
    tokens: int,
    tensors: Mapping[str, Shard],
    values: Mapping[str, Scalar],
    recipe: str,
    ranks: Ranks = ALONE,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write the folder `final` atomically; called by every rank, each with its parts of all tensors.

    Returns once the checkpoint is committed. Whatever is no tensor is the first rank's. Tensors may be on any device;
    one file's worth is on the host at a time. Raises `CheckpointError` on every rank if a disk refuses on any, with
    nothing changed on it.
    """

    fields = {
        "step": step, "samples": samples, "tokens": tokens, "recipe": recipe, "values": dict(values),
        "environment": {**environment(tensors), "ranks": str(ranks.size)},
    }  # fmt: skip
    explained = refusals_explained(final)
    try:
        ranks.first(explained(lambda: begin(final)))
        tables = ranks.each(explained(lambda: write_pieces(pending(final), tensors, ranks.rank, file_bytes)))
        ranks.first(explained(lambda: _commit(final, joined(tables, **fields))))
    except Exception:  # on all ranks alike; what an interruption leaves, the next start clears
        ranks.first(lambda: abandon(final))
        raise


def write_pieces(folder: Path, tensors: Mapping[str, Shard], rank: int = 0, file_bytes: int = FILE_BYTES) -> bytes:
    """Write and sync what falls to this rank; its table of tensors and files, as JSON, for `joined`. Raises `OSError`.

    Tensors that share storage must be reduced to one name by the caller.
    """
    table: dict[str, dict[str, Any]] = {"tensors": {}, "files": {}}
    mine: dict[str, tuple[str, Shard]] = {}
    for name, shard in tensors.items():
        cut = _pieces(name, shard, file_bytes)
        if cut or 0 in shard.shape:
            table["tensors"][name] = {"dtype": _stored_dtype(name, shard), "shape": shard.shape, "chunks": []}
        mine.update({_key(name, piece): (name, piece) for piece in cut})
    sizes = {key: piece.tensor.nbytes for key, (_, piece) in mine.items()}
    for number, keys in enumerate(group_by_size(sizes, file_bytes)):
        file = f"tensors-{rank:05d}-{number:03d}.safetensors"
        _write_tensors(folder / file, {key: mine[key][1].tensor for key in keys})
        sync_path(folder / file)
        table["files"][file] = describe_file(folder / file).model_dump()
        for key in keys:
            name, piece = mine[key]
            chunk = {"offset": piece.offset, "shape": tuple(piece.tensor.shape), "file": file, "key": key}
            table["tensors"][name]["chunks"].append(chunk)
    return json.dumps(table).encode()


def joined(tables: Sequence[bytes], **fields: object) -> Manifest:
    """The manifest of what all ranks wrote; `fields` are its other fields.

    Raises `ValueError` unless the parts make whole tensors: then the ranks disagree on how the tensors are cut.
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
    return Manifest.model_validate_json(json.dumps({**fields, "tensors": tensors, "files": files}))


def environment(tensors: Mapping[str, Shard]) -> dict[str, str]:
    """What a run's numbers may depend on beside its recipe: versions, platform, and the device the tensors are on."""
    devices = (shard.tensor.device for shard in tensors.values())
    cuda = next((device for device in devices if device.type == "cuda"), None)
    return {
        "titanlite": titanlite.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "device": torch.cuda.get_device_name(cuda) if cuda is not None else "cpu",
    }


def dtype_name(tensor: torch.Tensor) -> str:
    """torch's own name of the dtype, such as `float32`."""
    return str(tensor.dtype).removeprefix("torch.")


def _pieces(name: str, shard: Shard, file_bytes: int) -> list[Shard]:
    """What this rank writes of its box."""
    tensor = shard.tensor.detach()
    box = (shard.offset, tuple(tensor.shape))
    cut = pieces(name, box, tensor.nbytes, shard.copies, shard.copy, file_bytes)
    return [Shard(tensor[within(piece, box)], piece[0], shard.shape) for piece in cut]


def _stored_dtype(name: str, shard: Shard) -> str:
    dtype = dtype_name(shard.tensor)
    if dtype not in DTYPES:
        raise ValueError(f"tensor '{name}' is {dtype}, which a checkpoint cannot hold")
    return dtype


def _key(name: str, piece: Shard) -> str:
    """What a piece is called in its file: as its tensor, with the offset if it is not all of it."""
    return name if piece.tensor.shape == piece.shape else f"{name}@{','.join(map(str, piece.offset))}"


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """One safetensors file with the permissions a new file has here. Raises `OSError`, whatever the library raised."""
    try:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # the library writes a private temporary file and renames it


def _commit(final: Path, manifest: Manifest) -> None:
    """Raises `OSError`, and `CheckpointError` rather than write what no reader would take."""
    data = encode(manifest)
    if len(data) > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"the table of the tensors is too large ({len(data)} bytes): they are cut too finely.")
    (pending(final) / MANIFEST).write_bytes(data)
    sync_path(pending(final) / MANIFEST)
    commit(final)
