"""One unit of `titanlite data prepare`: a few files, or a part of one, turned into tokens in a part file. That depends
on the unit and the request alone, neither on who writes it nor when; what is there under its key is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from titanlite.corpus.corpora import Document, FoundFile, is_held_out
from titanlite.corpus.corpora.readers import read_documents, wrap_read_errors
from titanlite.corpus.token_file import BLOCK, HELD_OUT, TokenizerInfo, paths_of
from titanlite.corpus.tokenizers import Ids, Tokenizer, Tokens, open_tokenizer, token_dtype
from titanlite.errors import DataError
from titanlite.files import replace_file, replacing, wrap_os_errors

PART_VERSION = 2
EXAMPLES = 10  # bad lines that are listed one by one
BATCH_BYTES, BATCH_DOCUMENTS = 2**20, 1_000  # of texts that are given to the tokenizer at once, at most

# What is kept of each document: tokens with its separator, bytes and xxh3_128 of its text, and whether it is held out.
RECORD = np.dtype([("tokens", "<i8"), ("bytes", "<i8"), ("low", "<u8"), ("high", "<u8"), ("held", "?")])


@dataclass(frozen=True)
class Request:
    inputs: tuple[str, ...]  # files, folders and globs
    out: Path  # the prefix
    tokenizer: TokenizerInfo
    separator: str | None
    special_tokens: tuple[str, ...]
    text_key: str
    held_out_percent: float
    skip_bad_lines: bool = False
    drop_duplicates: bool = False
    workers: int = 1
    force: bool = False  # whether token files of other inputs or settings, that are there, are to go
    shared: bool = False  # whether others may be making the same: the first does, and they wait and take what it made

    @property
    def decisive(self) -> list[Any]:
        """What decides, beside the texts, what a unit writes."""
        return [self.tokenizer.fingerprint, self.text_key, self.skip_bad_lines, self.held_out_percent]

    @property
    def outputs(self) -> list[Path]:
        """Prefixes: what is held out, if anything is, and the rest."""
        held = [self.out.with_name(self.out.name + HELD_OUT)] if self.held_out_percent else []
        return [*held, self.out]


class Unit(NamedTuple):
    """What is turned into one part file."""

    files: tuple[FoundFile, ...]
    bytes: int  # of the files; for the progress line

    def __str__(self) -> str:
        first, last = self.files[0].path, self.files[-1].path
        return f"{first}" if first == last else f"{first} to {last}"

    @property
    def source(self) -> int:
        """Of its first file: from it on the others' are counted, so that the part serves among other inputs too."""
        return self.files[0].source

    def part_paths(self, request: Request) -> tuple[Path, Path, Path]:
        """The files of its part: tokens, records, and the rest in JSON; named by all that decides what is in them."""
        files = [
            (file.source - self.source, file.name, str(file.path), file.format, file.size, file.modified_ns, file.part)
            for file in self.files
        ]
        key = key_of([PART_VERSION, request.decisive, files])
        parts = paths_of(request.out).parts
        return parts / f"{key}.tokens", parts / f"{key}.records", parts / f"{key}.json"


def key_of(value: Any) -> str:
    """A hash of what JSON can say."""
    return hashlib.blake2b(json.dumps(value).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


class PartFile(NamedTuple):
    tokens: Path
    records: Path  # a `RECORD` for each document
    summary: dict[str, Any]  # as `write_part` makes it
    source: int  # from which on the summary counts sources


def find_part(unit: Unit, request: Request) -> PartFile | None:
    """The unit's part, if it is whole. Raises `OSError`."""
    tokens, records, about = unit.part_paths(request)
    try:
        summary = json.loads(about.read_bytes())
        sizes = tokens.stat().st_size, records.stat().st_size
    except (FileNotFoundError, ValueError):
        return None
    whole = sizes == (summary["token_bytes"], summary["documents"] * RECORD.itemsize)
    return PartFile(tokens, records, summary, unit.source) if whole else None


def write_unit(unit: Unit, request: Request) -> None:
    """A task: write the unit's part. Raises `DataError`."""
    folder, then = paths_of(request.out).parts, " What is done stays done: make room, and the same command goes on."
    try:
        with wrap_os_errors(f"cannot write to {folder}", folder, then, DataError):
            write_part(unit, request, _open_tokenizer(request))
    except MemoryError:
        raise DataError(f"{unit}: does not fit into memory; take fewer --workers, or split it.") from None


@lru_cache(maxsize=1)
def _open_tokenizer(request: Request) -> Tokenizer:
    name = request.tokenizer.name
    tokenizer = open_tokenizer(name, request.separator, request.special_tokens)
    if tokenizer.fingerprint != request.tokenizer.fingerprint:
        raise DataError(f"the tokenizer '{name}' changed while it was used; start again.")
    return tokenizer


def write_part(unit: Unit, request: Request, tokenizer: Tokenizer) -> None:
    """Raises `DataError` for texts that cannot be read, and `OSError` if the part cannot be written."""
    tokens, records, about = unit.part_paths(request)
    dtype, bad, examples = token_dtype(tokenizer.vocab_size), 0, list[str]()
    documents, hashes = Counter[int](), Counter[int]()  # by source
    writer = f"{os.getpid()}."  # an orphan of an earlier start may be at the same unit

    def on_bad(error: DataError) -> None:
        nonlocal bad
        if not request.skip_bad_lines:
            raise error
        bad += 1
        if bad <= EXAMPLES:
            examples.append(str(error).encode("utf-8", "backslashreplace").decode())

    with replacing(tokens, writer) as token_file, replacing(records, writer) as record_file:
        for batch in _batches(unit, request.text_key, on_bad):
            texts, ids = _encode(batch, tokenizer, on_bad)
            for block in _pack_blocks(ids, tokenizer.separator, dtype):
                token_file.write(block.data)
            digests = [xxhash.xxh3_128_digest(text.content) for _, text in texts]
            for (source, _), digest in zip(texts, digests, strict=True):
                documents[source] += 1
                hashes[source] += int.from_bytes(digest, "big")
            table = np.zeros(len(texts), RECORD)
            table["tokens"] = [len(numbers) + 1 for numbers in ids]
            table["bytes"] = [len(text.content) for _, text in texts]
            table["high"], table["low"] = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2).T
            if request.held_out_percent:
                table["held"] = [is_held_out(text.name, request.held_out_percent) for _, text in texts]
            record_file.write(table.view(np.uint8).data)
        token_bytes = token_file.tell()
    sources = [[source - unit.source, count, f"{hashes[source] % 2**128:032x}"] for source, count in documents.items()]
    summary = {"documents": documents.total(), "token_bytes": token_bytes, "bad": bad, "examples": examples}
    replace_file(about, json.dumps({**summary, "sources": sources}).encode())


Texts = list[tuple[int, Document]]  # with the source of each


def _batches(unit: Unit, text_key: str, on_bad: Callable[[DataError], None]) -> Iterator[Texts]:
    """The unit's documents, some at a time."""
    batch: Texts = []
    held = 0
    for file in unit.files:
        for document in read_documents(file, text_key, on_bad):
            batch.append((file.source, document))
            held += len(document.content)
            if held >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
                yield batch
                batch, held = [], 0
        with wrap_read_errors(file.path):
            status = file.path.stat()
        if (status.st_size, status.st_mtime_ns) != (file.size, file.modified_ns):  # as when the units were made
            raise DataError(f"{file.path}: changed while it was read; start again when nothing writes to it.")
    if batch:
        yield batch


def _encode(batch: Texts, tokenizer: Tokenizer, on_bad: Callable[[DataError], None]) -> tuple[Texts, list[Ids]]:
    """The texts that have ids, and these; those that the tokenizer refuses are bad lines."""
    try:
        return batch, tokenizer.encode_batch([document.content for _, document in batch])
    except DataError:
        texts, ids = [], []
        for source, document in batch:  # one by one, to say which it is
            try:
                ids.append(tokenizer.encode(document.content))
                texts.append((source, document))
            except DataError as error:
                on_bad(DataError(f"{document.name}: {error}"))
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
    lengths = np.fromiter(map(len, documents), np.int64, len(documents)) + 1
    stream: Tokens = np.full(lengths.sum(), separator, dtype)
    for document, end in zip(documents, np.cumsum(lengths).tolist(), strict=True):
        stream[end - 1 - len(document) : end - 1] = document
    return stream
