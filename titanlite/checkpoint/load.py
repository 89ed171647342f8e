"""Reading tensors' values into parts of tensors that are already there, whatever parts they were written in.

Block by block, hashed on the way where they are to be verified; also from Hugging Face folders. Nothing is mapped into
memory, and no pickle is ever opened.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from titanlite.checkpoint import format, storage
from titanlite.checkpoint.format import DTYPES, Box, overlap, row_blocks, whole_box, within
from titanlite.checkpoint.save import dtype_name
from titanlite.checkpoint.storage import open_regular, require_hash, verify_file
from titanlite.errors import CheckpointError, DamagedCheckpointError
from titanlite.models.shard import Shard, is_finite, may_be_nonfinite
from titanlite.parallel.ranks import ALONE, Ranks
from titanlite.text import pluralize

READERS = 4  # files that a rank reads at once, each hashed by a thread of its own


def load_state(
    folder: Path,
    into: Mapping[str, Shard],
    prefix: str = "",
    ranks: Ranks = ALONE,
    convert: bool = False,
    own: format.Manifest | None = None,
) -> format.Manifest:
    """Copy the checkpoint's values into `into`, in place; called by every rank, each with its parts of the tensors.

    Each file is read whole by the rank that wants most of it, and compared with its hash; beside that, a rank reads its
    own parts and no more. `prefix` limits the reading to tensors of such names (`model.`: the weights). `convert` takes
    values of another floating-point dtype, rounded. `own` is the manifest of folders that are each machine's own: a
    rank verifies all files that it wants something of, and no others need be there.

    Raises, on all ranks alike, `NewerFormatError`, `CheckpointError` naming every tensor that does not fit (`into` is
    then untouched), and `DamagedCheckpointError` if a file is not what the manifest says, or a weight or a moment is
    not finite: then `into` holds anything.
    """
    manifest = own or storage.decode_manifest(folder, ranks.run_on_rank0(lambda: storage.manifest_text(folder)))
    stored = {name: entry for name, entry in manifest.tensors.items() if name.startswith(prefix)}
    placed = format.chunks_by_file(stored)

    problems = find_mismatches(stored, into, convert)
    wanted = {} if problems else wanted_bytes(placed, into)
    own_report = [problems, [name for name in stored if name not in into], wanted]

    def share(found: list[list[Any]]) -> list[list[str]]:
        every_problem, unwanted, every_wanted = zip(*found, strict=True)
        lines = dict.fromkeys(itertools.chain(*every_problem))
        nowhere = set(unwanted[0]).intersection(*unwanted[1:])
        lines |= {f"{name}: in the checkpoint, but not in this model": None for name in unwanted[0] if name in nowhere}
        if lines:
            count = pluralize(len(lines), "difference")
            text = "\n  ".join([f"the checkpoint {folder} does not fit this model ({count}):", *lines])
            raise CheckpointError(text)
        return assign_files({file: manifest.files[file].bytes for file in placed}, every_wanted)

    shares = ranks.run_on_all_ranks(lambda: own_report, share)
    verified = set(shares[ranks.rank] if own is None else wanted)

    def fill(file: str) -> None:
        expected = manifest.files[file] if file in verified else None
        read_chunks(folder / file, placed[file], into, expected)

    def read() -> None:
        with ThreadPoolExecutor(READERS) as readers:
            list(readers.map(fill, [file for file in placed if file in wanted or file in verified]))

    def require_finite() -> None:
        learned = {name: shard.tensor for name, shard in into.items() if name.startswith(format.LEARNED)}
        for name, tensor in learned.items() if may_be_nonfinite(learned.values()) else ():
            if not is_finite(tensor):  # however whole the files are
                raise DamagedCheckpointError(f"{folder} is of no use: {name} holds numbers that are not finite.")

    ranks.run_on_all_ranks(read)
    ranks.run_on_all_ranks(require_finite)
    return manifest


def find_mismatches(
    stored: Mapping[str, format.TensorEntry], into: Mapping[str, Shard], convert: bool = False
) -> list[str]:
    """One line for each tensor of `into` that is not as it is stored, or not near enough to `convert`."""
    problems = [f"{name}: missing in the checkpoint" for name in into if name not in stored]
    for name in (name for name in stored if name in into):
        entry, shape, tensor = stored[name], into[name].shape, into[name].tensor
        dtype, convertible = dtype_name(tensor), convert and tensor.is_floating_point() and "float" in entry.dtype
        if shape != entry.shape:
            problems.append(f"{name}: shape {list(entry.shape)} in the checkpoint, {list(shape)} here")
        if dtype != entry.dtype and not convertible:
            problems.append(f"{name}: {entry.dtype} in the checkpoint, {dtype} here")
    return problems


def wanted_bytes(placed: Mapping[str, format.Chunks], into: Mapping[str, Shard]) -> dict[str, int]:
    """Bytes that `into` has a part of, of each file that holds any."""
    wanted = Counter[str]()
    for file, chunks in placed.items():
        for name, dtype, chunk in chunks:
            if name in into and (part := overlap(chunk.box, into[name].box)):
                wanted[file] += DTYPES[dtype][0] * math.prod(part[1])
    return wanted


def assign_files(sizes: Mapping[str, int], wanted: Sequence[Mapping[str, int]]) -> list[list[str]]:
    """The files that each rank reads whole, from how many bytes of each every rank wants.

    From the largest on, each goes where it adds least: to a rank that has few by then, or that wants most of it anyway.
    """
    holders: dict[str, list[int]] = {file: [] for file in sizes}
    for rank, files in enumerate(wanted):
        for file in files:
            holders[file].append(rank)
    loads = [0] * len(wanted)
    shares: list[list[str]] = [[] for _ in wanted]
    for file in sorted(sizes, key=lambda file: (-sizes[file], file)):
        candidates = [min(range(len(loads)), key=loads.__getitem__), *holders[file]]
        rank = min(candidates, key=lambda rank: (loads[rank] - wanted[rank].get(file, 0), rank))
        shares[rank].append(file)
        loads[rank] += sizes[file]
    return shares


# --- files

# Read at once, in whole rows (one, if that is larger): little enough to be in the processor's cache when it is hashed.
BLOCK_BYTES = 2**22
RUN_BYTES = 2**12  # rows of which no more than this is wanted are read whole, as a disk gives whole pages anyway


def read_chunks(
    path: Path, chunks: format.Chunks, into: Mapping[str, Shard], expected: format.FileEntry | None = None
) -> None:
    """Copy the parts that `into` has of a file's `chunks`, and read no others; with `expected`, which needs all chunks
    of the file, read every byte once, and compare with that. Raises `DamagedCheckpointError`.
    """
    with open_tensors(path, chunks, expected) as file:
        targets = {chunk.key: (into[name], chunk.box) for name, _, chunk in chunks if name in into}
        for key, tensor in file.table.items():
            if key in targets and (part := overlap(targets[key][1], targets[key][0].box)):
                shard, origin = targets[key]
                file.copy(tensor, origin, part if expected is None else origin, shard.tensor.detach(), shard.box)
            elif expected is not None:
                file.skip(tensor)


def find_nonfinite(path: Path, chunks: format.Chunks, expected: format.FileEntry) -> list[str]:
    """Read every byte of a file, compare with `expected`, and return the weights and moments that are not finite."""
    found: dict[str, None] = {}
    with open_tensors(path, chunks, expected) as file:
        learned = {chunk.key: name for name, _, chunk in chunks if name.startswith(format.LEARNED)}
        for key, tensor in file.table.items():
            if key not in learned:
                file.skip(tensor)
                continue
            origin = whole_box(tensor.shape)
            for block in row_blocks(origin, DTYPES[tensor.dtype][0], BLOCK_BYTES):
                values = file.block(tensor, origin, block)
                if not is_finite(values.float() if values.element_size() == 1 else values):
                    found[learned[key]] = None
    return list(found)


def read_box(folder: Path, entry: format.TensorEntry, box: Box) -> Tensor:
    """A box of a checkpoint's tensor, assembled from the chunks that it meets. Raises `DamagedCheckpointError`."""
    values = torch.empty(box[1], dtype=getattr(torch, entry.dtype))
    for chunk in entry.chunks:
        if part := overlap(chunk.box, box):
            with open_tensors(folder / chunk.file, [("", entry.dtype, chunk)]) as file:
                file.copy(file.table[chunk.key], chunk.box, part, values, box)
    return values


@contextmanager
def open_tensors(path: Path, chunks: format.Chunks, expected: format.FileEntry | None = None) -> Iterator[TensorFile]:
    """A file that must hold these chunks and, where it is `expected`, is read whole in the block, to compare its hash.

    Raises `DamagedCheckpointError`.
    """
    try:
        with open_regular(path, expected) as opened:
            file = TensorFile(path, opened, hashed=expected is not None)
            format.check_table(path, file.table, chunks)
            yield file
            if expected is not None and file.digest is not None:
                require_hash(path, file.digest.hexdigest(), expected)
    except DamagedCheckpointError:
        if expected is not None:
            verify_file(path, expected)  # if it is not the file that was written, that is what to say
        raise


class TensorFile:
    """A safetensors file, opened; with `hashed`, a digest of what is read, which must then be all, in its order."""

    def __init__(self, path: Path, file: FileIO, hashed: bool) -> None:
        self.path = path
        self._file = file
        self._scratch = torch.empty(0, dtype=torch.uint8)
        header, self.table = format.read_table(path, file)
        self.digest = xxhash.xxh3_128(header) if hashed else None

    def skip(self, tensor: format.StoredTensor) -> None:
        """Read the bytes of a tensor, for the digest alone."""
        block = self._memory(min(tensor.nbytes, BLOCK_BYTES)).numpy().data
        for first in range(0, tensor.nbytes, BLOCK_BYTES):
            self._fill(tensor.begin + first, block[: tensor.nbytes - first])

    def copy(self, tensor: format.StoredTensor, origin: Box, box: Box, target: Tensor, target_box: Box) -> None:
        """Read `box` of a tensor that is the box `origin` of a whole, and copy what `target`, the box `target_box` of
        the same whole, has of it. The numbers are rounded to the target's dtype.
        """
        dtype, itemsize = getattr(torch, tensor.dtype), DTYPES[tensor.dtype][0]
        direct = target.device.type == "cpu" and target.dtype == dtype
        for block in row_blocks(without_short_runs(origin, box, RUN_BYTES // itemsize), itemsize, BLOCK_BYTES):
            part = overlap(block, target_box)
            place = target[within(part, target_box)] if part else target
            if direct and part == block and place.is_contiguous():
                self._read_runs(tensor, origin, block, place)
                continue
            values = self.block(tensor, origin, block)
            if part:
                place.copy_(values[within(part, block)])

    def block(self, tensor: format.StoredTensor, origin: Box, block: Box) -> Tensor:
        """The values of a box, in memory that the next call overwrites."""
        dtype, itemsize = getattr(torch, tensor.dtype), DTYPES[tensor.dtype][0]
        values = self._memory(itemsize * math.prod(block[1])).view(dtype).view(block[1])
        self._read_runs(tensor, origin, block, values)
        return values

    def _memory(self, size: int) -> Tensor:
        """Bytes to read into, the same ones each time: the allocator would take some time and more memory than that."""
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return self._scratch[:size]

    def _read_runs(self, tensor: format.StoredTensor, origin: Box, block: Box, values: Tensor) -> None:
        memory, done = values.view(-1).view(torch.uint8).numpy().data, 0
        itemsize = values.element_size()
        for first, count in runs(origin, block):
            self._fill(tensor.begin + first * itemsize, memory[done : done + count * itemsize])
            done += count * itemsize

    def _fill(self, offset: int, memory: memoryview) -> None:
        """Fill `memory` from byte `offset` on."""
        done = 0
        self._file.seek(offset)
        while done < len(memory):
            count = self._file.readinto(memory[done:])
            if not count:
                raise DamagedCheckpointError(f"{self.path} is damaged: it was cut while it was read.")
            done += count
        if self.digest is not None:
            self.digest.update(memory)


def runs(whole: Box, box: Box) -> Iterator[tuple[int, int]]:
    """(first element, elements) of what lies together of a box in an array that holds `whole`, row-major; in order."""
    start = [a - b for a, b in zip(box[0], whole[0], strict=True)] or [0]
    size, shape = box[1] or (1,), whole[1] or (1,)  # a scalar is a row of one
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


# --- how far two checkpoints are apart, however each of them is cut

_BLOCK_VALUES = 2**22  # values compared at once, in float64; a row that has more is compared whole


@dataclass(frozen=True)
class Difference:
    """One tensor in two checkpoints: `dtype[shape]` in either, and None where there is none, or nothing to compare.

    NaN is the same as NaN; differences are infinite where only one of the two is finite, or a number.
    """

    name: str
    a: str | None
    b: str | None
    differing: int | None = None  # number of values that are not the same
    max_abs: float | None = None
    max_rel: float | None = None  # largest |a - b| / max(|a|, |b|)

    @property
    def is_none(self) -> bool:
        """Whether the tensor is the same in both, its dtype too."""
        return self.a == self.b and self.differing == 0


def compare_checkpoints(a: Path, b: Path, prefix: str = "") -> Iterator[Difference]:
    """Every tensor of either checkpoint whose name begins with `prefix`, in the first one's order. Hashes are not
    compared. Raises `DamagedCheckpointError`.
    """
    for folder in (a, b):
        for damage in storage.find_corruption(folder):
            raise DamagedCheckpointError(damage)
    left, right = storage.read_manifest(a).tensors, storage.read_manifest(b).tensors
    for name in dict.fromkeys([*left, *right]):
        if not name.startswith(prefix):
            continue
        one, other = left.get(name), right.get(name)
        x, y = (f"{entry.dtype}{list(entry.shape)}" if entry else None for entry in (one, other))
        if one is None or other is None or one.shape != other.shape:
            yield Difference(name, x, y)
            continue
        blocks = row_blocks(whole_box(one.shape), 1, _BLOCK_VALUES)
        parts = [_compare(read_box(a, one, block), read_box(b, other, block)) for block in blocks]
        counts, absolute, relative = zip(*parts, strict=True) if parts else ((), (), ())
        yield Difference(name, x, y, sum(counts), max(absolute, default=0.0), max(relative, default=0.0))


def _compare(x: Tensor, y: Tensor) -> tuple[int, float, float]:
    """Differing values, largest absolute and largest relative difference."""
    a, b = x.double(), y.double()
    exact = (x, y) if x.dtype == y.dtype == torch.int64 else (a, b)  # float64 cannot hold every int64
    same = (exact[0] == exact[1]) | (a.isnan() & b.isnan())
    differing = int((~same).sum())
    if differing == 0:
        return 0, 0.0, 0.0
    apart = (a - b).abs()[~same].nan_to_num(nan=math.inf, posinf=math.inf)
    larger = torch.maximum(a.abs(), b.abs())[~same]
    relative = torch.where(apart.isinf(), apart, apart / larger)
    return differing, float(apart.max()), float(relative.max())
