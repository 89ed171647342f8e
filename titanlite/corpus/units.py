"""One unit of `titanlite data prepare`: a few files, or a part of one, turned into tokens in a part file.

What a unit writes depends on it and on the settings alone, so it matters neither who writes it nor when; and whatever
is there of it under its key is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from titanlite.corpus.corpora import Document, is_held_out
from titanlite.corpus.corpora.formats import Form, Part, documents, refuse
from titanlite.corpus.token_file import BLOCK, write_all
from titanlite.corpus.tokenizers import Ids, Tokenizer, Tokens, token_dtype
from titanlite.errors import DataError
from titanlite.files import replace_file, sync

PART_VERSION = 2
EXAMPLES = 10
"""Bad lines that are told of one by one."""
BATCH_BYTES = 2**20
BATCH_DOCUMENTS = 1_000
"""Texts are given to the tokenizer until they are so long or so many."""

RECORD = np.dtype([("tokens", "<i8"), ("bytes", "<i8"), ("low", "<u8"), ("high", "<u8"), ("held", "?")])
"""What is kept of each document: tokens with its separator, bytes and xxh3_128 of its text, and on which side it is."""


@dataclass(frozen=True)
class Settings:
    """What decides, beside the texts, what comes out of them."""

    tokenizer: str
    separator: str | None
    special_tokens: tuple[str, ...]
    fingerprint: str
    """The tokenizer's, as it was when `prepare` began."""
    text_key: str
    skip_bad_lines: bool
    held_out_percent: float

    @property
    def decisive(self) -> list[Any]:
        """Without what only says where the tokenizer lies."""
        return [self.fingerprint, self.text_key, self.skip_bad_lines, self.held_out_percent]


class Piece(NamedTuple):
    """A file, or a part of it, of a unit."""

    source: int
    """Which of the inputs names it, counted from the one that names the unit's first piece."""
    name: str
    path: str
    form: Form
    size: int
    modified_ns: int
    part: Part | None


class Unit(NamedTuple):
    """What is turned into one part file."""

    pieces: tuple[Piece, ...]
    source: int
    """Which of the inputs names its first piece."""
    bytes: int
    """Of the files; for the progress line."""

    def key(self, settings: Settings) -> str:
        """Name of its part: a hash of all that decides what is in it."""
        return key_of([PART_VERSION, settings.decisive, self.pieces])


def key_of(value: Any) -> str:
    """A hash of what JSON can say."""
    return hashlib.blake2b(json.dumps(value).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


@dataclass(frozen=True)
class PartFile:
    """A finished part."""

    tokens: Path
    records: Path
    summary: dict[str, Any]
    """Its number of documents and bytes of tokens; `bad` lines and `examples` of them; `sources`: which, documents and
    sum of the texts' hashes of each."""

    def load(self) -> npt.NDArray[np.void]:
        """A `RECORD` for each document. Raises `OSError`."""
        return np.fromfile(self.records, RECORD)


def part_at(folder: Path, key: str) -> PartFile | None:
    """The part of that key, if it is whole. Raises `OSError`."""
    tokens, records, about = _paths(folder, key)
    try:
        summary = json.loads(about.read_bytes())
        whole = (
            tokens.stat().st_size == summary["token_bytes"]
            and records.stat().st_size == summary["documents"] * RECORD.itemsize
        )
    except (FileNotFoundError, ValueError):
        return None
    return PartFile(tokens, records, summary) if whole else None


def write_part(unit: Unit, settings: Settings, tokenizer: Tokenizer, folder: Path) -> None:
    """Read and tokenise a unit; its part is then in `folder`.

    Raises `DataError` for texts that cannot be read, and `OSError` if the part cannot be written.
    """
    key = unit.key(settings)
    tokens, records, about = _paths(folder, key)
    bad, found = _BadLines(settings.skip_bad_lines), _Records(settings.held_out_percent)
    dtype = token_dtype(tokenizer.vocab_size)
    with _appearing(tokens) as file:
        for source, batch in _batches(unit, settings, bad):
            texts, ids = _encoded(batch, tokenizer, bad)
            found.add(source, texts, ids)
            for block in _packed(ids, tokenizer.separator, dtype):
                write_all(file, block.data)
        token_bytes = file.tell()
    with _appearing(records) as file:
        write_all(file, found.table().data)
    summary = {"documents": found.documents, "token_bytes": token_bytes, "bad": bad.count, "examples": bad.examples}
    replace_file(about, json.dumps({**summary, "sources": found.sources()}).encode())


def _paths(folder: Path, key: str) -> tuple[Path, Path, Path]:
    return folder / f"{key}.tokens", folder / f"{key}.records", folder / f"{key}.json"


@contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """A file to be written, that appears when it is whole and on the disk."""
    writing = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        with open(writing, "wb", buffering=0) as file:
            yield file
            sync(file.fileno(), writing)
        os.replace(writing, path)
    except BaseException:
        writing.unlink(missing_ok=True)
        raise


class _BadLines:
    """Takes lines that have no text: stops at the first, or counts them."""

    def __init__(self, skip: bool) -> None:
        self._skip = skip
        self.count = 0
        self.examples: list[str] = []

    def __call__(self, error: DataError) -> None:
        if not self._skip:
            refuse(error)
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(str(error).encode("utf-8", "backslashreplace").decode())


class _Records:
    """Collects what is kept of each document."""

    def __init__(self, held_out_percent: float) -> None:
        self._held_out_percent = held_out_percent
        self._tokens, self._bytes = array("q"), array("q")
        self._hashes, self._held = bytearray(), bytearray()
        self._sources: dict[int, list[int]] = {}  # of each source: documents, and the sum of their hashes

    @property
    def documents(self) -> int:
        return len(self._held)

    def add(self, source: int, texts: Sequence[Document], ids: Sequence[Ids]) -> None:
        """The next documents, all of one source."""
        percent = self._held_out_percent
        hashes = [xxhash.xxh3_128_digest(text.content) for text in texts]
        self._tokens.extend(len(numbers) + 1 for numbers in ids)
        self._bytes.extend(len(text.content) for text in texts)
        self._hashes += b"".join(hashes)
        self._held += bytes(is_held_out(text.name, percent) for text in texts) if percent else bytes(len(texts))
        seen = self._sources.setdefault(source, [0, 0])
        seen[0] += len(texts)
        seen[1] = (seen[1] + sum(int.from_bytes(digest, "big") for digest in hashes)) % 2**128

    def table(self) -> npt.NDArray[np.uint8]:
        """A `RECORD` for each document, as bytes."""
        table = np.empty(self.documents, RECORD)
        hashes = np.frombuffer(self._hashes, ">u8").reshape(-1, 2)
        table["tokens"], table["bytes"] = self._tokens, self._bytes
        table["high"], table["low"] = hashes[:, 0], hashes[:, 1]
        table["held"] = np.frombuffer(self._held, np.bool_)
        return table.view(np.uint8)

    def sources(self) -> list[list[Any]]:
        return [[source, documents, f"{total:032x}"] for source, (documents, total) in self._sources.items()]


def _batches(unit: Unit, settings: Settings, bad: _BadLines) -> Iterator[tuple[int, list[Document]]]:
    """The unit's documents, some at a time and each time of one source."""
    batch: list[Document] = []
    held = 0
    for index, piece in enumerate(unit.pieces):
        path = Path(piece.path)
        for document in documents(piece.name, path, piece.form, settings.text_key, "--text-key", piece.part, bad):
            batch.append(document)
            held += len(document.content)
            if held >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
                yield piece.source, batch
                batch, held = [], 0
        _require_unchanged(piece, path)
        if batch and (index + 1 == len(unit.pieces) or unit.pieces[index + 1].source != piece.source):
            yield piece.source, batch
            batch, held = [], 0


def _require_unchanged(piece: Piece, path: Path) -> None:
    """Raises `DataError` if a file is another one than when the units were made."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}) any more.") from error
    if (status.st_size, status.st_mtime_ns) != (piece.size, piece.modified_ns):
        raise DataError(f"{path}: changed while it was read; start again when nothing writes to it.")


def _encoded(batch: list[Document], tokenizer: Tokenizer, bad: _BadLines) -> tuple[list[Document], list[Ids]]:
    """The texts that have ids, and these; those that the tokenizer refuses are bad lines."""
    try:
        return batch, tokenizer.encode_batch([document.content for document in batch])
    except DataError:
        texts, ids = [], []
        for document in batch:  # one by one, to say which it is
            try:
                ids.append(tokenizer.encode(document.content))
                texts.append(document)
            except DataError as error:
                bad(DataError(f"{document.name}: {error}"))
        return texts, ids


def _packed(ids: Sequence[Ids], separator: int, dtype: npt.DTypeLike) -> Iterator[Ids]:
    """The documents' tokens with their separators, in blocks; of a long document no second copy is made."""
    if sum(map(len, ids)) <= BLOCK * 4:
        yield pack(ids, separator, dtype)
        return
    for numbers in ids:
        for start in range(0, len(numbers), BLOCK):
            yield numbers[start : start + BLOCK].astype(dtype)
        yield np.array([separator], dtype)


def pack(documents: Sequence[Ids], separator: int, dtype: npt.DTypeLike = np.uint16) -> Tokens:
    """The stream: each document followed by one `separator`."""
    stream: Tokens = np.empty(sum(map(len, documents)) + len(documents), dtype)
    end = 0
    for document in documents:
        start, end = end, end + len(document) + 1
        stream[start : end - 1] = document
        stream[end - 1] = separator
    return stream
