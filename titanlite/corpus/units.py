"""One unit of `titanlite data prepare`: a few files, or a part of one, turned into tokens in a part file.

What a unit writes depends on it and on the settings alone, so it matters neither who writes it nor when; and whatever
is there of it under its key is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from titanlite.corpus.corpora import Document, Part, is_held_out
from titanlite.corpus.corpora.files import FoundFile
from titanlite.corpus.corpora.formats import read_documents
from titanlite.corpus.token_file import BLOCK
from titanlite.corpus.tokenizers import Ids, Tokenizer, Tokens, open_tokenizer, token_dtype
from titanlite.errors import DataError
from titanlite.files import cause, replace_file, replacing, write_all

PART_VERSION = 2
PART_FILES = ("tokens", "records", "json")
EXAMPLES = 10  # Bad lines that are listed one by one
BATCH_BYTES = 2**20
BATCH_DOCUMENTS = 1_000  # Of texts that are given to the tokenizer at once, at most

RECORD = np.dtype([("tokens", "<i8"), ("bytes", "<i8"), ("low", "<u8"), ("high", "<u8"), ("held", "?")])
"""What is kept of each document: tokens with its separator, bytes and xxh3_128 of its text, and on which side it is."""


@dataclass(frozen=True)
class Settings:
    """What decides, beside the texts, what comes out."""

    tokenizer: str
    separator: str | None
    special_tokens: tuple[str, ...]
    fingerprint: str  # The tokenizer's, as it was when `prepare` began
    text_key: str
    skip_bad_lines: bool
    held_out_percent: float

    @property
    def decisive(self) -> list[Any]:
        return [self.fingerprint, self.text_key, self.skip_bad_lines, self.held_out_percent]


class Piece(NamedTuple):
    """A file, or a part of it."""

    source: int  # Which of the inputs names it
    file: FoundFile
    part: Part | None = None


class Unit(NamedTuple):
    """What is turned into one part file."""

    pieces: tuple[Piece, ...]
    bytes: int  # Of the files; for the progress line

    def __str__(self) -> str:
        first, last = self.pieces[0].file.path, self.pieces[-1].file.path
        return f"{first}" if first == last else f"{first} to {last}"

    @property
    def source(self) -> int:
        """Of its first piece: from it on the others' are counted, so that the part serves among other inputs too."""
        return self.pieces[0].source

    def key(self, settings: Settings) -> str:
        """Name of its part: a hash of all that decides what is in it."""
        pieces = [(at - self.source, file.name, str(file.path), *file[2:], part) for at, file, part in self.pieces]
        return key_of([PART_VERSION, settings.decisive, pieces])


def key_of(value: Any) -> str:
    """A hash of what JSON can say."""
    return hashlib.blake2b(json.dumps(value).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


@dataclass(frozen=True)
class PartFile:
    """A finished part."""

    tokens: Path
    records: Path
    summary: dict[str, Any]  # As `write_part` makes it

    def load(self) -> npt.NDArray[np.void]:
        """A `RECORD` for each document. Raises `OSError`."""
        return np.fromfile(self.records, RECORD)


def part_at(folder: Path, key: str) -> PartFile | None:
    """The part of that key, if it is whole. Raises `OSError`."""
    tokens, records, about = (folder / f"{key}.{end}" for end in PART_FILES)
    try:
        summary = json.loads(about.read_bytes())
        sizes = tokens.stat().st_size, records.stat().st_size
    except (FileNotFoundError, ValueError):
        return None
    whole = sizes == (summary["token_bytes"], summary["documents"] * RECORD.itemsize)
    return PartFile(tokens, records, summary) if whole else None


def write_part(unit: Unit, settings: Settings, tokenizer: Tokenizer, folder: Path) -> None:
    """Read and tokenize a unit; its part is then in `folder`.

    Raises `DataError` for texts that cannot be read, and `OSError` if the part cannot be written.
    """
    tokens, records, about = (folder / f"{unit.key(settings)}.{end}" for end in PART_FILES)
    bad, dtype = _BadLines(settings.skip_bad_lines), token_dtype(tokenizer.vocab_size)
    documents: Counter[int] = Counter()  # by source
    hashes: Counter[int] = Counter()
    writer = f"{os.getpid()}."  # an orphan of an earlier start may be at the same unit
    with replacing(tokens, writer) as token_file, replacing(records, writer) as record_file:
        for source, batch in _batches(unit, settings, bad):
            texts, ids = _encode(batch, tokenizer, bad)
            for block in _pack_blocks(ids, tokenizer.separator, dtype):
                write_all(token_file, block.data)
            table = _records_of(texts, ids, settings.held_out_percent)
            write_all(record_file, table.view(np.uint8).data)
            documents[source] += len(texts)
            hashes[source] += (sum(table["high"].tolist()) << 64) + sum(table["low"].tolist())
        token_bytes = token_file.tell()
    summary = {
        "documents": documents.total(), "token_bytes": token_bytes, "bad": bad.count, "examples": bad.examples,
        "sources": [
            [source - unit.source, count, f"{hashes[source] % 2**128:032x}"] for source, count in documents.items()
        ],
    }  # fmt: skip
    replace_file(about, json.dumps(summary).encode())


def write_unit(unit: Unit, settings: Settings, folder: Path) -> None:
    """A task: write the unit's part into `folder`. Raises `DataError`."""
    try:
        write_part(unit, settings, _open_tokenizer(settings), folder)
    except MemoryError:
        raise DataError(f"{unit}: does not fit into memory; take fewer --workers, or split it.") from None
    except OSError as error:
        raise DataError(
            f"cannot write to {folder}: {cause(error, folder)}. What is done stays done: make room, and the same "
            "command goes on."
        ) from error


@lru_cache(maxsize=1)
def _open_tokenizer(settings: Settings) -> Tokenizer:
    tokenizer = open_tokenizer(settings.tokenizer, settings.separator, settings.special_tokens)
    if tokenizer.fingerprint != settings.fingerprint:
        raise DataError(f"the tokenizer '{settings.tokenizer}' changed while it was used; start again.")
    return tokenizer


class _BadLines:
    """Takes lines that have no text: stops at the first, or counts them."""

    def __init__(self, skip: bool) -> None:
        self._skip = skip
        self.count = 0
        self.examples: list[str] = []

    def __call__(self, error: DataError) -> None:
        if not self._skip:
            raise error
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(str(error).encode("utf-8", "backslashreplace").decode())


def _records_of(texts: Sequence[Document], ids: Sequence[Ids], held_out_percent: float) -> npt.NDArray[np.void]:
    table = np.zeros(len(texts), RECORD)
    table["tokens"] = [len(numbers) + 1 for numbers in ids]
    table["bytes"] = [len(text.content) for text in texts]
    hashes = np.frombuffer(b"".join(xxhash.xxh3_128_digest(text.content) for text in texts), ">u8").reshape(-1, 2)
    table["high"], table["low"] = hashes[:, 0], hashes[:, 1]
    if held_out_percent:
        table["held"] = [is_held_out(text.name, held_out_percent) for text in texts]
    return table


def _batches(unit: Unit, settings: Settings, bad: _BadLines) -> Iterator[tuple[int, list[Document]]]:
    """The unit's documents, some at a time and each time of one source."""
    batch: list[Document] = []
    held = 0
    for index, (source, file, part) in enumerate(unit.pieces):
        for document in read_documents(file.name, file.path, file.format, settings.text_key, part, bad):
            batch.append(document)
            held += len(document.content)
            if held >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
                yield source, batch
                batch, held = [], 0
        _require_unchanged(file)
        if batch and (index + 1 == len(unit.pieces) or unit.pieces[index + 1].source != source):
            yield source, batch
            batch, held = [], 0


def _require_unchanged(file: FoundFile) -> None:
    """Raises `DataError` if a file is another one than when the units were made."""
    try:
        status = file.path.stat()
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read ({error.strerror}) any more.") from error
    if (status.st_size, status.st_mtime_ns) != (file.size, file.modified_ns):
        raise DataError(f"{file.path}: changed while it was read; start again when nothing writes to it.")


def _encode(batch: list[Document], tokenizer: Tokenizer, bad: _BadLines) -> tuple[list[Document], list[Ids]]:
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


def _pack_blocks(ids: Sequence[Ids], separator: int, dtype: npt.DTypeLike) -> Iterator[Ids]:
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
