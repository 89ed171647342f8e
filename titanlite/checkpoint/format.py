"""The manifest: what a checkpoint holds, and the strict reading of one that may come from anybody.

Pure data and its rules: tensors are tables of chunks, chunks lie in files, files have sizes and hashes. Nothing
here opens a file or knows torch.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter, defaultdict
from typing import Annotated, Any, Final, Literal, NoReturn

import xxhash
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from titanlite.errors import CheckpointError

FORMAT: Final = "titanlite-checkpoint"
VERSION: Final = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 2**31
MAX_TENSORS = 1_000_000
MAX_FILES = 1_000_000
MAX_CHUNKS = 2**23
"""At about 150 bytes each. 405B on 16,384 ranks (tp 8 x pp 16 x 128) make 2.8 million with AdamW's moments; 70B that
4,096 ranks cut make 7.4 million. The rule `layout.parts` refuses a run that would make more."""
MAX_DIMENSIONS = 4
"""The work for a chunk doubles with each (see `tiles`)."""

DTYPES: dict[str, tuple[int, str]] = {
    "float64": (8, "F64"),
    "float32": (4, "F32"),
    "float16": (2, "F16"),
    "bfloat16": (2, "BF16"),
    "float8_e4m3fn": (1, "F8_E4M3"),
    "float8_e5m2": (1, "F8_E5M2"),
    "int64": (8, "I64"),
    "int32": (4, "I32"),
    "int16": (2, "I16"),
    "int8": (1, "I8"),
    "uint8": (1, "U8"),
    "bool": (1, "BOOL"),
}
"""torch's name of each dtype that can be stored: bytes of one element, and safetensors' name."""
LEARNED = ("model.", "optimizer.")
"""What the names of weights and moments begin with: numbers that are not finite make them useless."""


class DamagedCheckpointError(CheckpointError):
    """One checkpoint is not whole: a file is missing, cut or changed. An older one may still serve."""


class NewerFormatError(CheckpointError):
    """Written by a later titanlite; going on from an older checkpoint instead would lose work in silence."""


def folder_name(step: int) -> str:
    """Name of the folder that holds the checkpoint taken after `step` steps."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a folder name stands for, or None if it is no checkpoint's."""
    match = re.fullmatch(r"step-([0-9]{8,18})", name)
    return int(match[1]) if match and folder_name(int(match[1])) == name else None


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError("has characters that cannot be printed")
    return name


def _not_the_manifest(name: str) -> str:
    if name == MANIFEST:
        raise ValueError("the manifest does not list itself")
    return name


Size = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**62)]
"""With room for what a run adds to it."""
Extents = Annotated[tuple[Size, ...], Field(max_length=MAX_DIMENSIONS)]
Name = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_printable)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$"), AfterValidator(_not_the_manifest)]
"""A plain name inside the checkpoint's own folder: no separator, no leading dot, so no way out of it."""
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Scalar = bool | int | float | str | None


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Chunk(_Table):
    """A box of a tensor and where its values lie: under `key` in the safetensors file `file`."""

    offset: Extents
    shape: Extents
    file: FileName
    key: Name


class TensorEntry(_Table):
    """One tensor by its global shape. Its chunks tile it exactly: no gap, no overlap. An empty tensor has none."""

    dtype: Literal[
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
        "int64", "int32", "int16", "int8", "uint8", "bool",
    ]  # fmt: skip
    shape: Extents
    chunks: tuple[Chunk, ...]

    @model_validator(mode="after")
    def _tiled(self) -> TensorEntry:
        if not tiles(self.shape, [(chunk.offset, chunk.shape) for chunk in self.chunks]):
            raise ValueError(f"its chunks do not cover the shape {list(self.shape)} exactly once")
        return self

    def chunk_bytes(self, chunk: Chunk) -> int:
        return math.prod(chunk.shape) * DTYPES[self.dtype][0]


class FileEntry(_Table):
    """Size and content hash of one file."""

    bytes: Size
    xxh3_128: Digest


class Manifest(_Table):
    """Everything that a checkpoint holds, and what made it."""

    format: Literal["titanlite-checkpoint"] = FORMAT
    version: Literal[1] = VERSION
    step: Annotated[int, Field(ge=0, lt=2**32)]
    """Optimizer steps done."""
    samples: Count
    """Samples consumed, which is the whole state of the data."""
    tokens: Count
    """Tokens trained on."""
    tensors: Annotated[dict[Name, TensorEntry], Field(max_length=MAX_TENSORS)]
    files: Annotated[dict[FileName, FileEntry], Field(max_length=MAX_FILES)]
    recipe: str
    """The resolved recipe, as TOML."""
    environment: dict[str, str]
    """What wrote it: versions, platform, device. For the reader's eye; loading does not depend on it."""
    values: dict[str, Scalar]
    """Small values beside the tensors, such as counters."""

    @model_validator(mode="after")
    def _placed(self) -> Manifest:
        places: set[tuple[str, str]] = set()
        held: dict[str, int] = defaultdict(int)
        for name, entry in self.tensors.items():
            for chunk in entry.chunks:
                if chunk.file not in self.files:
                    raise ValueError(f"tensor '{name}' lies in {chunk.file}, which is not among the files")
                if (chunk.file, chunk.key) in places:
                    raise ValueError(f"two chunks lie under '{chunk.key}' in {chunk.file}")
                places.add((chunk.file, chunk.key))
                held[chunk.file] += entry.chunk_bytes(chunk)
        for file, size in held.items():
            if size > self.files[file].bytes:
                raise ValueError(f"{file} has {self.files[file].bytes} bytes, too few for its {size} bytes of tensors")
        return self


def tiles(shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """True if the boxes (offset, shape) cover every cell of an array of `shape` exactly once.

    Linear in the number of boxes: a box's indicator function is fixed by its 2^d corners with alternating signs (its
    mixed difference), so the boxes sum to the whole if and only if their signed corners sum to the whole's.
    """
    corners: Counter[tuple[int, ...]] = Counter()
    for offset, extent in [*boxes, ((0,) * len(shape), shape)]:
        if len(offset) != len(shape) or len(extent) != len(shape):
            return False
        if any(start + size > limit for start, size, limit in zip(offset, extent, shape, strict=True)):
            return False
    for sign, placed in ((1, boxes), (-1, [((0,) * len(shape), shape)])):
        for offset, extent in placed:
            edges = [((start, 1), (start + size, -1)) for start, size in zip(offset, extent, strict=True)]
            for corner in itertools.product(*edges):
                corners[tuple(place for place, _ in corner)] += sign * math.prod(side for _, side in corner)
    return not any(corners.values())


def encode(manifest: Manifest) -> bytes:
    """The manifest as the JSON text of `manifest.json`, with a checksum of its own content.

    Raises `CheckpointError` rather than give what `decode` would not take.
    """
    fields = manifest.model_dump(mode="json")
    text = json.dumps({"checksum": _checksum(fields), **fields}, separators=(",", ":"), allow_nan=False).encode()
    chunks = sum(len(entry.chunks) for entry in manifest.tensors.values())
    if chunks > MAX_CHUNKS or len(text) > MAX_MANIFEST_BYTES:
        sizes = f"{chunks} parts in {len(text)} bytes, where {MAX_CHUNKS} in {MAX_MANIFEST_BYTES} can be read"
        raise CheckpointError(f"the table of the tensors is too large: {sizes}. Cut them over fewer ranks.")
    return text


def decode(data: bytes, source: str) -> Manifest:
    """Read a manifest's text; `source` names it in errors.

    Raises `NewerFormatError` if a later titanlite is needed, and `DamagedCheckpointError` for everything else that
    is not a whole, consistent manifest.
    """
    try:
        fields = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{source} is damaged: it is not JSON ({error}).") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise DamagedCheckpointError(f"{source} is not the manifest of a titanlite checkpoint.")
    version = fields.get("version")
    if isinstance(version, int) and version > VERSION:
        raise NewerFormatError(
            f"{source} needs titanlite format {version}, and this titanlite reads format {VERSION}. "
            "Use the titanlite that wrote it, or move that checkpoint away to go on from an earlier one."
        )
    for key, limit in (("tensors", MAX_TENSORS), ("files", MAX_FILES)):  # before each of them is looked at
        if isinstance(fields.get(key), dict) and len(fields[key]) > limit:
            raise DamagedCheckpointError(f"{source} is not valid: it lists more than {limit} {key}.")
    chunks = 0
    for entry in fields["tensors"].values() if isinstance(fields.get("tensors"), dict) else ():
        chunks += len(entry["chunks"]) if isinstance(entry, dict) and isinstance(entry.get("chunks"), list) else 0
    if chunks > MAX_CHUNKS:
        raise DamagedCheckpointError(f"{source} is not valid: it lists more than {MAX_CHUNKS} chunks.")
    checksum = fields.pop("checksum", None)
    if checksum != _checksum(fields):
        raise DamagedCheckpointError(f"{source} is damaged: its content does not match its checksum.")
    try:
        return Manifest.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        raise DamagedCheckpointError(f"{source} is not valid: {_first_errors(error)}.") from None


def _checksum(fields: dict[str, Any]) -> str:
    """xxh3-128 of the content, whatever its layout on the page."""
    return xxhash.xxh3_128(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _first_errors(error: ValidationError, limit: int = 5) -> str:
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    lines = [f"{'.'.join(str(part) for part in item['loc']) or 'manifest'}: {item['msg']}" for item in errors[:limit]]
    text = "; ".join(line[:300] for line in lines) + (
        f"; and {len(errors) - limit} more" if len(errors) > limit else ""
    )
    return "".join(
        sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text
    )  # it goes to a terminal
