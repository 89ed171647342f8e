"""Reading a checkpoint's values into parts of tensors that are already there, whatever parts they were written in.

Names, shapes and dtypes are compared before the first value is overwritten; no pickle is ever opened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from titanlite.checkpoint.format import DTYPES, LEARNED, Chunk, DamagedCheckpointError, Manifest, TensorEntry
from titanlite.checkpoint.headers import Placed, check_header, placed_chunks
from titanlite.checkpoint.plan import Box, overlap, shared_out
from titanlite.checkpoint.ranks import ALONE, Ranks
from titanlite.checkpoint.read import read_parts, read_verified
from titanlite.checkpoint.save import dtype_name
from titanlite.checkpoint.storage import decode_manifest, manifest_bytes, verify_file
from titanlite.errors import CheckpointError
from titanlite.models.shard import Shard, is_finite, may_be_nonfinite

READERS = 4
"""Files that a rank reads at once, each hashed by a thread of its own."""


def load_state(
    folder: Path,
    into: Mapping[str, Shard],
    prefix: str = "",
    ranks: Ranks = ALONE,
    convert: bool = False,
    shared: bool = True,
) -> Manifest:
    """Copy the checkpoint's values into `into`, in place; called by every rank, each with its parts of the tensors.

    Each file is read whole by the rank that wants most of it, and compared with its hash; beside that, a rank reads its
    own parts and no more. It holds them and `READERS` blocks of `read.BLOCK_BYTES`. `prefix` limits the reading to the
    tensors whose names begin with it (`model.` for the weights alone). `convert` takes values of another floating-point
    dtype, rounded to that of `into`. Without `shared`, a rank sees a folder of its own with the files that it wants
    something of, and compares all of these with their hashes.

    Raises, on all ranks alike, `NewerFormatError`, `CheckpointError` naming every tensor that is missing, unexpected,
    or of another shape or dtype (`into` is then untouched), and `DamagedCheckpointError` if a file is not what the
    manifest says, or a weight or a moment is not finite: then `into` holds anything, and needs other values.
    """
    manifest = decode_manifest(folder, ranks.first(lambda: manifest_bytes(folder)))
    stored = {name: entry for name, entry in manifest.tensors.items() if name.startswith(prefix)}
    placed = placed_chunks(stored)
    found = ranks.each(lambda: _compared(stored, placed, into, convert))
    shares = json.loads(ranks.first(lambda: _agreed(folder, manifest, list(placed), found)))
    verified = shares[ranks.rank] if shared else wanted_files(manifest, into)
    ranks.each(lambda: _read(folder, manifest, placed, into, verified))
    ranks.each(lambda: _require_finite(folder, into))
    return manifest


def _require_finite(folder: Path, into: Mapping[str, Shard]) -> None:
    """Weights and moments that are no numbers train nothing and say nothing, however whole their files are."""
    learned = {name: each.tensor for name, each in into.items() if name.startswith(LEARNED)}
    if not may_be_nonfinite(learned.values()):
        return
    for name, tensor in learned.items():
        if not is_finite(tensor):
            raise DamagedCheckpointError(f"{folder} is of no use: {name} holds numbers that are not finite.")


def wanted_files(manifest: Manifest, into: Mapping[str, Shard]) -> list[str]:
    """The files that hold a part of `into`."""
    placed = placed_chunks(manifest.tensors)
    return [file for file, chunks in placed.items() if _wanted_bytes(manifest.tensors, chunks, into)]


def mismatches(stored: Mapping[str, TensorEntry], into: Mapping[str, Shard], convert: bool = False) -> list[str]:
    """One line for each tensor of `into` that is not as it is stored, or not near enough to `convert`."""
    problems = [f"{name}: missing in the checkpoint" for name in into if name not in stored]
    for name, entry in stored.items():
        if name not in into:
            continue
        shape, dtype = into[name].shape, dtype_name(into[name].tensor)
        convertible = convert and into[name].tensor.is_floating_point() and "float" in entry.dtype
        if shape != entry.shape:
            problems.append(f"{name}: shape {list(entry.shape)} in the checkpoint, {list(shape)} here")
        if dtype != entry.dtype and not convertible:
            problems.append(f"{name}: {entry.dtype} in the checkpoint, {dtype} here")
    return problems


def verify_files(folder: Path, manifest: Manifest, stored: Mapping[str, TensorEntry]) -> None:
    """Compare the files that hold `stored` with the manifest. Raises `DamagedCheckpointError`."""
    for file, chunks in placed_chunks(stored).items():
        verify_file(folder / file, manifest.files[file])
        check_header(folder / file, stored, chunks)


def _compared(stored: Mapping[str, TensorEntry], placed: Placed, into: Mapping[str, Shard], convert: bool) -> bytes:
    """What this rank finds wrong, which tensors it has no part of (those of other pipeline stages, say), and how much
    it wants of each file.
    """
    problems, unwanted = mismatches(stored, into, convert), [name for name in stored if name not in into]
    wanted = {} if problems else {file: _wanted_bytes(stored, chunks, into) for file, chunks in placed.items()}
    return json.dumps([problems, unwanted, {file: size for file, size in wanted.items() if size}]).encode()


def _agreed(folder: Path, manifest: Manifest, files: list[str], found: list[bytes]) -> bytes:
    """The files that fall to each rank, as JSON. Raises `CheckpointError` if a rank found something wrong, or no rank
    wants a tensor that is stored.
    """
    problems, unwanted, wanted = zip(*map(json.loads, found), strict=True)
    lines = dict.fromkeys(line for of_rank in problems for line in of_rank)
    nowhere = set(unwanted[0]).intersection(*unwanted[1:])
    lines |= {f"{name}: in the checkpoint, but not in this model": None for name in unwanted[0] if name in nowhere}
    if lines:
        raise CheckpointError(
            f"the checkpoint {folder} does not fit this model ({len(lines)} "
            f"{'difference' if len(lines) == 1 else 'differences'}):\n  " + "\n  ".join(lines)
        )
    return json.dumps(shared_out({file: manifest.files[file].bytes for file in files}, wanted)).encode()


def _wanted_bytes(stored: Mapping[str, TensorEntry], chunks: list[tuple[str, Chunk]], into: Mapping[str, Shard]) -> int:
    """Bytes of these chunks of a file that `into` has a part of."""
    parts = [(stored[name], _part(chunk, into.get(name))) for name, chunk in chunks]
    return sum(DTYPES[entry.dtype][0] * math.prod(part[1]) for entry, part in parts if part is not None)


def _part(chunk: Chunk, shard: Shard | None) -> Box | None:
    """What a chunk and a shard of the same tensor have in common."""
    return None if shard is None else overlap((chunk.offset, chunk.shape), shard.box)


def _read(folder: Path, manifest: Manifest, placed: Placed, into: Mapping[str, Shard], verified: Sequence[str]) -> None:
    """Fill this rank's parts, and read all of the files that are its to verify. Raises `DamagedCheckpointError`."""

    def fill(file: str) -> None:
        path, chunks = folder / file, placed[file]
        try:
            if file in verified:
                read_verified(path, manifest.files[file], manifest.tensors, chunks, into)
            elif own := [(name, chunk) for name, chunk in chunks if _part(chunk, into.get(name)) is not None]:
                read_parts(path, manifest.tensors, own, into)
        except OSError as error:
            raise DamagedCheckpointError(f"{path} cannot be read: {error.strerror}.") from error

    with ThreadPoolExecutor(READERS) as readers:
        list(readers.map(fill, placed))
