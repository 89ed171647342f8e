"""Reading a checkpoint's values into parts of tensors that are already there, whatever parts they were written in.

Everything is compared and verified before the first value is overwritten; no pickle is ever opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from titanlite.checkpoint.format import Chunk, DamagedCheckpointError, Manifest, TensorEntry
from titanlite.checkpoint.headers import Placed, check_header, placed_chunks
from titanlite.checkpoint.plan import overlap, share_by_size, within
from titanlite.checkpoint.ranks import ALONE, Ranks
from titanlite.checkpoint.save import dtype_name
from titanlite.checkpoint.storage import decode_manifest, manifest_bytes, verify_file
from titanlite.errors import CheckpointError
from titanlite.models.shard import Shard


def load_state(folder: Path, into: Mapping[str, Shard], prefix: str = "", ranks: Ranks = ALONE) -> Manifest:
    """Copy the checkpoint's values into `into`, in place; called by every rank, each with its parts of the tensors.

    A rank reads its own parts and no more; the comparing of hashes, which reads whole files, is shared out. `prefix`
    limits the reading to the tensors whose names begin with it (`model.` for the weights alone).

    Raises, on all ranks alike, `NewerFormatError`, `CheckpointError` naming every tensor that is missing, unexpected,
    or of another shape or dtype, and `DamagedCheckpointError` if a file is not what the manifest says. In all these
    cases `into` is untouched, unless the disk failed on a file that had been read before.
    """
    manifest = decode_manifest(folder, ranks.first(lambda: manifest_bytes(folder)))
    stored = {name: entry for name, entry in manifest.tensors.items() if name.startswith(prefix)}
    found = ranks.each(lambda: _compared(stored, into))
    ranks.first(lambda: _require_fit(folder, found))
    ranks.each(lambda: verify_share(folder, manifest, stored, ranks))
    ranks.each(lambda: _read(folder, stored, into))
    return manifest


def mismatches(stored: Mapping[str, TensorEntry], into: Mapping[str, Shard]) -> list[str]:
    """One line for each tensor of `into` that is not as it is stored."""
    problems = [f"{name}: missing in the checkpoint" for name in into if name not in stored]
    for name, entry in stored.items():
        if name not in into:
            continue
        shape, dtype = into[name].shape, dtype_name(into[name].tensor)
        if shape != entry.shape:
            problems.append(f"{name}: shape {list(entry.shape)} in the checkpoint, {list(shape)} here")
        if dtype != entry.dtype:
            problems.append(f"{name}: {entry.dtype} in the checkpoint, {dtype} here")
    return problems


def _compared(stored: Mapping[str, TensorEntry], into: Mapping[str, Shard]) -> bytes:
    """What this rank finds wrong, and which tensors it has no part of (those of other pipeline stages, say)."""
    return json.dumps([mismatches(stored, into), [name for name in stored if name not in into]]).encode()


def _require_fit(folder: Path, found: list[bytes]) -> None:
    """Raises `CheckpointError` if a rank found something wrong, or no rank wants a tensor that is stored."""
    problems, unwanted = zip(*map(json.loads, found), strict=True)
    lines = dict.fromkeys(line for of_rank in problems for line in of_rank)
    nowhere = set(unwanted[0]).intersection(*unwanted[1:])
    lines |= {f"{name}: in the checkpoint, but not in this model": None for name in unwanted[0] if name in nowhere}
    if lines:
        raise CheckpointError(
            f"the checkpoint {folder} does not fit this model ({len(lines)} "
            f"{'difference' if len(lines) == 1 else 'differences'}):\n  " + "\n  ".join(lines)
        )


def verify_share(folder: Path, manifest: Manifest, stored: Mapping[str, TensorEntry], ranks: Ranks = ALONE) -> None:
    """Compare this rank's share of the files that hold `stored` with the manifest. Raises `DamagedCheckpointError`."""
    placed = placed_chunks(stored)
    for file in share_by_size({file: manifest.files[file].bytes for file in placed}, ranks.rank, ranks.size):
        verify_file(folder / file, manifest.files[file])
        check_header(folder / file, stored, placed[file])


def _read(folder: Path, stored: Mapping[str, TensorEntry], into: Mapping[str, Shard]) -> None:
    """Fill this rank's parts. Raises `DamagedCheckpointError` if a file that was whole can no longer be read."""
    wanted: Placed = {}
    for name, shard in into.items():
        for chunk in stored[name].chunks:
            if overlap((chunk.offset, chunk.shape), _box(shard)) is not None:
                wanted.setdefault(chunk.file, []).append((name, chunk))
    for file, chunks in wanted.items():
        try:
            with torch.no_grad():
                for target, values in _pairs(folder / file, into, chunks):
                    target.copy_(values)
        except (SafetensorError, OSError) as error:
            raise DamagedCheckpointError(f"{folder / file} cannot be read: {error}.") from error


def _pairs(
    path: Path, into: Mapping[str, Shard], chunks: list[tuple[str, Chunk]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of (the part of a target that a chunk covers, its values from the file)."""
    with safe_open(path, framework="pt") as file:
        for name, chunk in chunks:
            shard, stored = into[name], (chunk.offset, chunk.shape)
            part = overlap(stored, _box(shard))
            assert part is not None
            target = shard.tensor.detach()[within(part, _box(shard))]
            yield target, file.get_slice(chunk.key)[within(part, stored)] if chunk.shape else file.get_tensor(chunk.key)


def _box(shard: Shard) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return shard.offset, tuple(shard.tensor.shape)
