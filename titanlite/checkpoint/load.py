"""Reading a checkpoint's values into parts of tensors that are already there, whatever parts they were written in.

Names, shapes and dtypes are compared before the first value is overwritten.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from titanlite.checkpoint.format import DTYPES, LEARNED, DamagedCheckpointError, Manifest, TensorEntry
from titanlite.checkpoint.headers import ChunksByFile, chunks_by_file
from titanlite.checkpoint.plan import assign_files, overlap
from titanlite.checkpoint.ranks import ALONE, Ranks
from titanlite.checkpoint.read import read_chunks
from titanlite.checkpoint.save import dtype_name
from titanlite.checkpoint.storage import decode_manifest, manifest_text
from titanlite.errors import CheckpointError
from titanlite.models.shard import Shard, is_finite, may_be_nonfinite
from titanlite.text import pluralize

READERS = 4
"""Files that a rank reads at once, each hashed by a thread of its own."""


def load_state(
    folder: Path,
    into: Mapping[str, Shard],
    prefix: str = "",
    ranks: Ranks = ALONE,
    convert: bool = False,
    own: Manifest | None = None,
) -> Manifest:
    """Copy the checkpoint's values into `into`, in place; called by every rank, each with its parts of the tensors.

    Each file is read whole by the rank that wants most of it, and compared with its hash; beside that, a rank reads its
    own parts and no more. It holds them and `READERS` blocks of `read.BLOCK_BYTES`. `prefix` limits the reading to the
    tensors whose names begin with it (`model.` for the weights alone). `convert` takes values of another floating-point
    dtype, rounded to that of `into`. `own` is the manifest of folders that are each machine's own: a rank compares all
    files with their hashes that it wants something of, and no others need be there.

    Raises, on all ranks alike, `NewerFormatError`, `CheckpointError` naming every tensor that is missing, unexpected,
    or of another shape or dtype (`into` is then untouched), and `DamagedCheckpointError` if a file is not what the
    manifest says, or a weight or a moment is not finite: then `into` holds anything, and needs other values.
    """
    manifest = own or decode_manifest(folder, ranks.run_on_rank0(lambda: manifest_text(folder)))
    stored = {name: entry for name, entry in manifest.tensors.items() if name.startswith(prefix)}
    placed = chunks_by_file(stored)

    def compare() -> list[Any]:
        """What this rank finds wrong, the tensors it has no part of, and the bytes that it wants of each file."""
        problems = find_mismatches(stored, into, convert)
        wanted = {} if problems else wanted_bytes(stored, placed, into)
        return [problems, [name for name in stored if name not in into], wanted]

    def share(found: list[list[Any]]) -> list[list[str]]:
        problems, unwanted, wanted = zip(*found, strict=True)
        _require_fit(folder, problems, unwanted)
        return assign_files({file: manifest.files[file].bytes for file in placed}, wanted)

    shares = ranks.run_on_all_ranks(compare, share)
    verified = set(shares[ranks.rank] if own is None else wanted_bytes(stored, placed, into))

    def fill(file: str) -> None:
        read_chunks(
            folder / file, manifest.tensors, placed[file], into, manifest.files[file] if file in verified else None
        )

    def read() -> None:
        wanted = wanted_bytes(stored, placed, into)
        with ThreadPoolExecutor(READERS) as readers:
            list(readers.map(fill, [file for file in placed if file in wanted or file in verified]))

    ranks.run_on_all_ranks(read)
    ranks.run_on_all_ranks(lambda: _require_finite(folder, into))
    return manifest


def find_mismatches(stored: Mapping[str, TensorEntry], into: Mapping[str, Shard], convert: bool = False) -> list[str]:
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


def _require_fit(folder: Path, problems: tuple[list[str], ...], unwanted: tuple[list[str], ...]) -> None:
    """Raises `CheckpointError` if a rank found something wrong, or no rank wants a tensor that is stored."""
    lines = dict.fromkeys(line for of_rank in problems for line in of_rank)
    nowhere = set(unwanted[0]).intersection(*unwanted[1:])
    lines |= {f"{name}: in the checkpoint, but not in this model": None for name in unwanted[0] if name in nowhere}
    if lines:
        count = pluralize(len(lines), "difference")
        raise CheckpointError(f"the checkpoint {folder} does not fit this model ({count}):\n  " + "\n  ".join(lines))


def _require_finite(folder: Path, into: Mapping[str, Shard]) -> None:
    """Raises `DamagedCheckpointError` for weights and moments that are not finite, however whole their files are."""
    learned = {name: each.tensor for name, each in into.items() if name.startswith(LEARNED)}
    if not may_be_nonfinite(learned.values()):
        return
    for name, tensor in learned.items():
        if not is_finite(tensor):
            raise DamagedCheckpointError(f"{folder} is of no use: {name} holds numbers that are not finite.")


def wanted_bytes(stored: Mapping[str, TensorEntry], placed: ChunksByFile, into: Mapping[str, Shard]) -> dict[str, int]:
    """Bytes that `into` has a part of, of each file that holds any."""
    wanted: dict[str, int] = {}
    for file, chunks in placed.items():
        for name, chunk in chunks:
            part = overlap((chunk.offset, chunk.shape), into[name].box) if name in into else None
            if part is not None:
                wanted[file] = wanted.get(file, 0) + DTYPES[stored[name].dtype][0] * math.prod(part[1])
    return wanted
