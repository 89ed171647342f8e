"""The manifest: what a checkpoint holds, and the strict reading of one from an untrusted source. No torch.

By hand: a large run has millions of chunks, for each of which pydantic takes 20 times as long and 3 times the memory.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from titanlite.errors import CheckpointError, DamagedCheckpointError, NewerFormatError
from titanlite.plan.memory import MAX_CHUNKS

FORMAT = "titanlite-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 2**31
MAX_TENSORS = 1_000_000
MAX_FILES = 1_000_000
MAX_DIMENSIONS = 4  # the work for a chunk doubles with each (see `tiles`)

# torch's name of each dtype that can be stored: bytes of one element, and safetensors' name.
DTYPES = {
    "float64": (8, "F64"), "float32": (4, "F32"), "float16": (2, "F16"), "bfloat16": (2, "BF16"),
    "float8_e4m3fn": (1, "F8_E4M3"), "float8_e5m2": (1, "F8_E5M2"),
    "int64": (8, "I64"), "int32": (4, "I32"), "int16": (2, "I16"), "int8": (1, "I8"), "uint8": (1, "U8"),
    "bool": (1, "BOOL"),
}  # fmt: skip
LEARNED = ("model.", "optimizer.")  # what the names of weights and moments begin with, which must be finite
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")  # no separator, no leading dot: no way out of the folder
_DIGEST = re.compile(r"[0-9a-f]{32}")
Extents = tuple[int, ...]
Box = tuple[Extents, Extents]  # a part of a tensor: its offset and its shape
Scalar = bool | int | float | str | None


def folder_name(step: int) -> str:
    """Name of the folder that holds the checkpoint taken after `step` steps."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a folder name stands for, or None if it is no checkpoint's."""
    match = re.fullmatch(r"step-([0-9]{8,18})", name)
    return int(match[1]) if match and folder_name(int(match[1])) == name else None


class Chunk(NamedTuple):
    """A box of a tensor and where its values lie: under `key` in the safetensors file `file`."""

    offset: Extents
    shape: Extents
    file: str
    key: str

    @property
    def box(self) -> Box:
        return self.offset, self.shape


class TensorEntry(NamedTuple):
    """One tensor by its global shape. Its chunks tile it exactly: no gap, no overlap. An empty tensor has none."""

    dtype: str
    shape: Extents
    chunks: tuple[Chunk, ...]


class FileEntry(NamedTuple):
    """Size and content hash of one file."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class CheckpointMetadata:
    """What a checkpoint says beside its tensors."""

    step: int
    samples: int = 0  # consumed, which is the whole state of the data
    tokens: int = 0
    recipe: str = ""  # the resolved one, as TOML
    values: Mapping[str, Scalar] = field(default_factory=dict)  # small ones, such as counters
    environment: Mapping[str, str] = field(default_factory=dict)
    """What wrote it: versions, platform, device. For the reader's eye; loading does not depend on it."""


@dataclass(frozen=True)
class Manifest(CheckpointMetadata):
    """Everything that a checkpoint holds, and what made it."""

    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)


_FIELDS = ("step", "samples", "tokens", "tensors", "files", "recipe", "environment", "values")  # in their order


def manifest_from(fields: Mapping[str, Any]) -> Manifest:
    """The manifest of JSON fields (without format, version and checksum). Raises `ValueError` that names the place."""
    _require(fields.keys() == {*_FIELDS}, "manifest", f"the keys {_FIELDS} and no others, not {sorted(fields)}")
    for key, limit in (("step", 2**32), ("samples", 2**62), ("tokens", 2**62)):  # with room for what a run adds to them
        _require(_is_size(fields[key], limit), key, f"a whole number from 0 to {limit - 1}")
    for key in ("tensors", "files", "environment", "values"):
        _require(isinstance(fields[key], dict), key, "an object")
    environment, values, recipe = fields["environment"], fields["values"], fields["recipe"]
    _require(isinstance(recipe, str), "recipe", "text")
    _require(all(isinstance(value, str) for value in environment.values()), "environment", "texts")
    valid = all(value is None or isinstance(value, str | int | float) for value in values.values())
    fit = all(abs(value) < 2**63 for value in values.values() if isinstance(value, int))  # in a float too
    _require(valid and fit, "values", "numbers of 64 bits, texts, true, false or null")
    # Neither NaN nor half of a surrogate pair, which no text holds, is JSON:
    json.dumps([recipe, environment, values], ensure_ascii=False, allow_nan=False).encode()
    files = {name: _file(name, entry) for name, entry in fields["files"].items()}
    tensors = {name: _tensor(name, entry) for name, entry in fields["tensors"].items()}
    _require_room(tensors, files)
    return Manifest(**{**fields, "files": files, "tensors": tensors})


def _require(valid: bool, place: str, what: str) -> None:
    if not valid:
        raise ValueError(f"{place}: must be {what}")


def _is_size(value: Any, limit: int = 2**63) -> bool:
    return type(value) is int and 0 <= value < limit


def _is_name(value: Any) -> bool:
    return type(value) is str and 0 < len(value) <= 1000 and value.isprintable()


def _is_extents(value: Any) -> bool:
    return type(value) is list and len(value) <= MAX_DIMENSIONS and all(map(_is_size, value))


def _file(name: str, entry: Any) -> FileEntry:
    valid = _FILE_NAME.fullmatch(name) is not None and name != MANIFEST
    _require(valid, "files", "named by plain names, none the manifest's")
    valid = isinstance(entry, dict) and entry.keys() == {*FileEntry._fields} and _is_size(entry["bytes"])
    valid = valid and type(entry["xxh3_128"]) is str and _DIGEST.fullmatch(entry["xxh3_128"]) is not None
    _require(valid, f"files.{name}", "bytes, a size, and xxh3_128, 32 hex digits")
    return FileEntry(**entry)


def _tensor(name: str, entry: Any) -> TensorEntry:
    _require(_is_name(name), "tensors", "named by 1 to 1000 characters that can be printed")
    valid = isinstance(entry, dict) and entry.keys() == {*TensorEntry._fields} and isinstance(entry["chunks"], list)
    valid = valid and _is_extents(entry["shape"]) and type(entry["dtype"]) is str and entry["dtype"] in DTYPES
    what = f"a known dtype, a shape of at most {MAX_DIMENSIONS} sizes, and a list of chunks"
    _require(valid, f"tensors.{name}", what)
    chunks = tuple(_chunk(name, fields) for fields in entry["chunks"])
    if not tiles(tuple(entry["shape"]), [chunk.box for chunk in chunks]):
        raise ValueError(f"tensors.{name}: its chunks do not cover the shape {entry['shape']} exactly once")
    return TensorEntry(entry["dtype"], tuple(entry["shape"]), chunks)


def _chunk(tensor: str, fields: Any) -> Chunk:
    if isinstance(fields, dict) and fields.keys() == {*Chunk._fields}:
        offset, shape, file, key = fields["offset"], fields["shape"], fields["file"], fields["key"]
        if _is_extents(offset) and _is_extents(shape) and type(file) is str and _is_name(key):
            return Chunk(tuple(offset), tuple(shape), file, key)
    raise ValueError(f"tensors.{tensor}: a chunk must be offset and shape (sizes), file and key (names)")


def _require_room(tensors: Mapping[str, TensorEntry], files: Mapping[str, FileEntry]) -> None:
    """Every chunk lies in a listed file, at a place of its own, and no file is too small for its chunks."""
    places: set[tuple[str, str]] = set()
    held: dict[str, int] = defaultdict(int)
    for name, entry in tensors.items():
        for chunk in entry.chunks:
            if chunk.file not in files:
                raise ValueError(f"tensor '{name}' lies in a file {chunk.file}, which is not among the files")
            if (chunk.file, chunk.key) in places:
                raise ValueError(f"two chunks lie under '{chunk.key}' in {chunk.file}")
            places.add((chunk.file, chunk.key))
            held[chunk.file] += math.prod(chunk.shape) * DTYPES[entry.dtype][0]
    for file, size in held.items():
        if size > files[file].bytes:
            raise ValueError(f"{file} has {files[file].bytes} bytes, too few for its {size} bytes of tensors")


def encode(manifest: Manifest) -> bytes:
    """The text of `manifest.json`. Raises `CheckpointError` rather than give what `decode` would not take."""
    tensors = {
        name: {**entry._asdict(), "chunks": [chunk._asdict() for chunk in entry.chunks]}
        for name, entry in manifest.tensors.items()
    }
    files = {name: entry._asdict() for name, entry in manifest.files.items()}
    values = {**{key: getattr(manifest, key) for key in _FIELDS}, "tensors": tensors, "files": files}
    fields = {"format": FORMAT, "version": VERSION, **values}
    text = json.dumps({"checksum": _checksum(fields), **fields}, separators=(",", ":"), allow_nan=False).encode()
    chunks = sum(len(entry.chunks) for entry in manifest.tensors.values())
    if chunks > MAX_CHUNKS or len(text) > MAX_MANIFEST_BYTES:
        sizes = f"{chunks} parts in {len(text)} bytes, where {MAX_CHUNKS} in {MAX_MANIFEST_BYTES} can be read"
        raise CheckpointError(f"the table of the tensors is too large: {sizes}. Cut them over fewer ranks.")
    return text


def decode(data: bytes | str, source: str) -> Manifest:
    """Read a manifest's text; `source` names it in errors. Raises `NewerFormatError` and `DamagedCheckpointError`."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{source} is damaged: it is not JSON ({error}).") from None
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
        raise DamagedCheckpointError(f"{source} is not the manifest of a titanlite checkpoint.")
    version = fields.pop("version", None)
    if isinstance(version, int) and version > VERSION:
        raise NewerFormatError(
            f"{source} needs titanlite format {version}, and this titanlite reads format {VERSION}. "
            "Use the titanlite that wrote it, or move that checkpoint away to go on from an earlier one."
        )
    tensors, files = (table if isinstance(table := fields.get(key), dict) else {} for key in ("tensors", "files"))
    lists = [entry.get("chunks") for entry in tensors.values() if isinstance(entry, dict)]
    chunks = sum(len(listed) for listed in lists if isinstance(listed, list))
    if len(tensors) > MAX_TENSORS or len(files) > MAX_FILES or chunks > MAX_CHUNKS:  # before each is looked at
        most = f"{MAX_TENSORS} tensors, {MAX_FILES} files or {MAX_CHUNKS} chunks"
        raise DamagedCheckpointError(f"{source} is not valid: it lists more than {most}.")
    if fields.pop("checksum", None) != _checksum({"format": FORMAT, "version": version, **fields}):
        raise DamagedCheckpointError(f"{source} is damaged: its content does not match its checksum.")
    try:
        _require(type(version) is int and version == VERSION, "version", str(VERSION))
        return manifest_from(fields)
    except ValueError as error:
        text = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in str(error)[:300])
        raise DamagedCheckpointError(f"{source} is not valid: {text}.") from None  # the text goes to a terminal


def _checksum(fields: Mapping[str, Any]) -> str:
    """xxh3-128 of the content, whatever its layout on the page."""
    return xxhash.xxh3_128(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# --- the table at the head of a safetensors file

Chunks = list[tuple[str, str, Chunk]]  # name and dtype of a tensor, and a part of it
MAX_HEADER_BYTES = 10**8  # the library's own limit


class StoredTensor(NamedTuple):
    """One tensor of a file."""

    dtype: str  # torch's name, or safetensors' code of a dtype that no checkpoint holds
    shape: tuple[int, ...]
    begin: int  # first byte in the file
    nbytes: int


def chunks_by_file(tensors: Mapping[str, TensorEntry]) -> dict[str, Chunks]:
    """What lies in each file."""
    placed: dict[str, Chunks] = {}
    for name, entry in tensors.items():
        for chunk in entry.chunks:
            placed.setdefault(chunk.file, []).append((name, entry.dtype, chunk))
    return placed


def read_table(path: Path, file: FileIO) -> tuple[bytes, dict[str, StoredTensor]]:
    """The bytes before the values, and the tensors by key in order of place: they fill the file without a gap.

    Not by the library, which maps files into memory: to cut one that is being read would kill the process. Raises
    `DamagedCheckpointError` and `OSError`.
    """
    file_bytes, header = os.fstat(file.fileno()).st_size, file.read(8) or b""
    count = int.from_bytes(header, "little")
    names = {code: name for name, (_, code) in DTYPES.items()}
    try:
        if count > min(file_bytes, MAX_HEADER_BYTES):
            raise ValueError("its table is too large")
        header += file.read(count) or b""
        fields = json.loads(header[8:])
        fields.pop("__metadata__", None)
        table, end = {}, len(header)
        for key, entry in sorted(fields.items(), key=lambda item: tuple(item[1]["data_offsets"])):
            first, last = entry["data_offsets"]
            dtype, shape = names.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"])
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
    return header, table


def check_table(path: Path, table: Mapping[str, StoredTensor], chunks: Chunks) -> None:
    """A file must hold the chunks that its manifest puts there. Raises `DamagedCheckpointError`."""
    for _, dtype, chunk in chunks:
        found = table.get(chunk.key)
        if found is None:
            raise DamagedCheckpointError(f"{path} does not hold '{chunk.key}', which its manifest lists.")
        if (found.dtype, found.shape) != (dtype, chunk.shape):
            raise DamagedCheckpointError(f"{path} holds '{chunk.key}' otherwise than its manifest says.")


# --- boxes


def whole_box(shape: Sequence[int]) -> Box:
    """All of a tensor."""
    return (0,) * len(shape), tuple(shape)


def overlap(one: Box, other: Box) -> Box | None:
    """The part that two boxes of the same tensor have in common; None if there is none."""
    starts = tuple(map(max, zip(one[0], other[0], strict=True)))
    stops = (min(a + m, b + n) for a, m, b, n in zip(*one, *other, strict=True))
    size = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
    return (starts, size) if all(extent > 0 for extent in size) else None


def within(part: Box, box: Box) -> tuple[slice, ...]:
    """The slices that cut `part` out of an array that holds `box`."""
    return tuple(slice(a - b, a - b + n) for a, n, b in zip(*part, box[0], strict=True))


def row_blocks(box: Box, itemsize: int, limit: int) -> Iterator[Box]:
    """Boxes of whole rows that make up `box` in order, each of at most `limit` bytes if a row is."""
    offset, size = box
    if 0 in size:
        return
    if not size:
        yield box
        return
    step = max(1, limit // (itemsize * math.prod(size[1:])))
    for first in range(0, size[0], step):
        yield (offset[0] + first, *offset[1:]), (min(step, size[0] - first), *size[1:])


def tiles(shape: Extents, boxes: list[Box]) -> bool:
    """Whether the boxes cover every cell of an array of `shape` exactly once.

    In linear time: a box's indicator function is fixed by its 2^d corners with alternating signs (its mixed
    difference), so the boxes sum to the whole if and only if their signed corners sum to the whole's.
    """
    corners: Counter[Extents] = Counter()
    for sign, (offset, extent) in [(-1, ((0,) * len(shape), shape)), *((1, box) for box in boxes)]:
        if not len(offset) == len(extent) == len(shape):
            return False
        if any(start + size > limit for start, size, limit in zip(offset, extent, shape, strict=True)):
            return False
        edges = [((start, 1), (start + size, -1)) for start, size in zip(offset, extent, strict=True)]
        for corner in itertools.product(*edges):
            corners[tuple(place for place, _ in corner)] += sign * math.prod(side for _, side in corner)
    return not any(corners.values())
