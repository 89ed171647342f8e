"""Token files: Megatron's indexed format, `PREFIX.bin` and `PREFIX.idx`, and what is known of them in `PREFIX.json`.

`.bin` is ids end to end. `.idx`, little-endian: magic, u64 version, u8 type of the ids, u64 sequences, u64 documents
plus 1; then i32 length and i64 byte position of each sequence, i64 first sequence of each document, and their number.
In ours a document is one sequence (more only beyond 2^31 tokens) and ends with the separator. No text is read here.
"""

from __future__ import annotations

import os
import struct
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import BaseModel, Field, ValidationError

from titanlite.corpus.tokenizers import Tokenizer, token_dtype
from titanlite.errors import DataError
from titanlite.files import open_file, replace_file, replacing
from titanlite.recipe.paths import expand

VERSION: Final = 1
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}  # Megatron's codes, but of floats
LONGEST_SEQUENCE = 2**31 - 1  # tokens; a length takes 32 bits, with a sign
HELD_OUT = "-validation"  # what the name of a file's held-out part ends with
LOOKED_AT = 1_000  # documents at either end of a file without a sidecar that must end with the separator
BLOCK = 2**20  # tokens, or documents, that are handled at a time
GAP = 64  # numbers between two wanted ones, up to which these are read together rather than apart
RESTORE = "prepare it again, or copy it again from where it is whole."

Int64 = npt.NDArray[np.int64]
Number = TypeVar("Number", bound=np.integer[Any])


class OpenFile:
    """An open file, the same one whatever its name comes to mean. Not mapped: one that is cut would be a SIGBUS."""

    def __init__(self, path: Path) -> None:
        """Raises `OSError`, also for what is no regular file."""
        self.path = path
        self._descriptor = open_file(path)
        weakref.finalize(self, os.close, self._descriptor).atexit = False  # a thread may still read then
        status = os.fstat(self._descriptor)
        self.size, self.modified_ns = status.st_size, status.st_mtime_ns

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on. Raises `DataError` naming file and byte if they are not there."""
        data = b""
        try:
            while len(data) < size:  # the system gives at most 2 GiB at a time, and nothing past the end
                more = os.pread(self._descriptor, size - len(data), offset + len(data))
                if not more:
                    ends = f"it ends at byte {os.fstat(self._descriptor).st_size:,}, and had {self.size:,} bytes before"
                    raise DataError(f"{self.path}: cut short while it is in use: {ends}; {RESTORE}")
                data += more
        except OSError as error:
            problem = f"cannot be read from byte {offset:,} on ({error.strerror})"
            raise DataError(f"{self.path}: {problem}; mend the disk, or its connection.") from error
        return data


@dataclass(frozen=True)
class FileArray(Generic[Number]):
    """`count` numbers of a file from byte `offset` on, by place, slice or array of places; read anew each time."""

    file: OpenFile
    offset: int
    dtype: np.dtype[Number]
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, np.ndarray):  # of places, none negative; neighbours are read together
            runs = [key]
            if len(key) and int(np.ptp(key)) >= 4 * len(key):
                runs = np.split(key, np.flatnonzero(np.abs(np.diff(key)) > GAP) + 1)
            firsts = [int(run.min(initial=self.count)) for run in runs]
            return np.concatenate(
                [self[at : int(run.max(initial=0)) + 1][run - at] for at, run in zip(firsts, runs, strict=True)]
            )
        if not isinstance(key, slice):
            start = range(self.count)[key]
            return self[start : start + 1][0]
        start, stop, _ = key.indices(self.count)
        size = self.dtype.itemsize
        return np.frombuffer(self.file.read(self.offset + start * size, max(0, stop - start) * size), self.dtype)


class _Section(BaseModel, extra="forbid", strict=True, frozen=True): ...


class TokenizerInfo(_Section):
    name: str
    fingerprint: str
    vocab_size: int = Field(ge=1)
    separator: int = Field(ge=0)

    @classmethod
    def of(cls, name: str, tokenizer: Tokenizer) -> TokenizerInfo:
        ids = {"vocab_size": tokenizer.vocab_size, "separator": tokenizer.separator}
        return cls(name=name, fingerprint=tokenizer.fingerprint, **ids)


class SourceInfo(_Section):
    """One input of `titanlite data prepare`, as it was named."""

    path: str
    files: int
    bytes: int  # on the disk, as they lie there: perhaps compressed
    documents: int  # texts read, before duplicates were dropped
    texts_xxh3_128: str  # sum, modulo 2^128, of each text's xxh3_128: the same in any order, and however packed


class TokenInfo(_Section):
    """The sidecar."""

    format: Literal["titanlite-tokens"]
    version: Literal[1]
    made_from: str  # hash of all that decides the file: inputs and settings
    tokenizer: TokenizerInfo
    dtype: Literal["uint16", "int32"]
    documents: int
    tokens: int  # with a separator after each document
    text_bytes: int
    lengths: dict[str, int]  # documents by their tokens with the separator: under "2^k" those of 2^k to 2^(k+1) - 1
    duplicates: int  # documents dropped as equal to an earlier one; of a held-out part and its training part together
    bad_lines: int
    bad_line_examples: tuple[str, ...]  # the first of them, as `file:line: what is wrong`
    sources: tuple[SourceInfo, ...]
    bin_bytes: int
    bin_xxh3_64: str
    idx_bytes: int
    idx_xxh3_64: str


class Paths(NamedTuple):
    """The files of one prefix."""

    bin: Path
    idx: Path
    sidecar: Path
    parts: Path  # folder of a `prepare` that has not ended


def paths_of(prefix: Path) -> Paths:
    """By adding to the name: prefixes such as `wiki.v2` keep their dots. Raises `DataError` for a folder's path."""
    if prefix.name in ("", ".."):
        raise DataError(f"{prefix}: is a folder; add the name of the token files, without a suffix.")
    return Paths(*(prefix.with_name(prefix.name + end) for end in (".bin", ".idx", ".json", ".parts")))


@dataclass(frozen=True)
class TokenFile:
    """An opened token file. Nothing of it is kept in memory, however large it is."""

    prefix: Path
    tokens: FileArray[np.integer[Any]]  # all documents, each followed by the separator, flat
    pointers: FileArray[np.int64]  # where each sequence begins, in bytes
    sequences: FileArray[np.int64]  # first sequence of each document, and the number of all
    info: TokenInfo | None  # the sidecar; None for a file that something else than titanlite made

    @classmethod
    def open(cls, prefix: Path | str) -> TokenFile:
        """Reads the index's header and ends alone. Raises `DataError` naming file and position of what is wrong."""
        prefix = expand(prefix)
        if prefix.suffix in (".bin", ".idx"):
            prefix = prefix.with_suffix("")
        paths = paths_of(prefix)
        try:
            tokens, pointers, sequences = _open_arrays(paths)
            info = _read_sidecar(paths, tokens, pointers.file.size) if paths.sidecar.exists() else None
        except FileNotFoundError as error:
            why = f"a token file is {paths.bin.name} and {paths.idx.name}, of `titanlite data prepare` or Megatron."
            if paths.parts.exists():
                why = f"`titanlite data prepare` has not ended (see {paths.parts}); start it again as before."
            raise DataError(f"{error.filename}: missing; {why}") from error
        except OSError as error:
            why = f"cannot be read ({error.strerror}); mend its permissions or the disk."
            raise DataError(f"{error.filename or paths.bin}: {why}") from error
        return cls(prefix, tokens, pointers, sequences, info)

    def __reduce__(self) -> Any:
        return TokenFile.open, (self.prefix,)  # another process opens it anew

    @property
    def documents(self) -> int:
        return len(self.sequences) - 1

    @property
    def fingerprint(self) -> str:
        """Equal where all tokens are; of a foreign file, where its size, its first and its last tokens are."""
        if self.info:
            return self.info.bin_xxh3_64
        seen = f"{len(self.tokens)} {self.documents} {self.tokens.dtype}".encode()
        seen += self.tokens[:BLOCK].tobytes() + self.tokens[-BLOCK:].tobytes()
        return f"foreign-{xxhash.xxh3_64_hexdigest(seen)}"

    def document_bounds(self, first: int, stop: int) -> Int64:
        """Where documents `first` to `stop` begin and where the last ends, in tokens. Raises `DataError` if damaged."""
        sequences = self.sequences[first : stop + 1]
        self._require_order(first, sequences, len(self.pointers))
        begins = self.pointers[np.minimum(sequences, len(self.pointers) - 1)]
        begins = np.where(sequences == len(self.pointers), self.tokens.file.size, begins)
        bounds: Int64 = begins // self.tokens.dtype.itemsize
        self._require_order(first, bounds, len(self.tokens))
        return bounds

    def _require_order(self, first: int, begins: Int64, last: int) -> None:
        """Of documents from `first` on, `begins` are from 0 to `last`, each at least the one before."""
        wrong = np.flatnonzero((begins < 0) | (begins > last) | np.append(False, begins[1:] < begins[:-1]))
        if wrong.size:
            where = f"document {first + wrong[0]:,} begins before the one before it, or outside of the .bin"
            raise _damaged(self.pointers.file.path, where)

    def document_ends(self) -> Int64:
        """End of each document, past its separator, in tokens; reads all of the index. Raises as `document_bounds`."""
        count = BLOCK // GAP  # whose pointers, with those between them that are read too, are at most BLOCK numbers
        firsts = range(0, self.documents, count)
        return np.concatenate([self.document_bounds(at, min(at + count, self.documents))[1:] for at in firsts])

    def require_tokenizer(self, name: str, tokenizer: Tokenizer) -> None:
        """Raise `DataError` unless the file is of the tokenizer that `data.tokenizer` calls `name`; of a foreign one,
        unless its first and last documents end with the separator and have no ids beyond the vocabulary.
        """
        if self.info is None:
            for first in {0, max(0, self.documents - LOOKED_AT)}:
                last = min(first + LOOKED_AT, self.documents)
                self._require_ids(first, last, tokenizer)
        elif (of := self.info.tokenizer).fingerprint != tokenizer.fingerprint:
            found = f"'{of.name}' ({of.vocab_size:,} ids, fingerprint {of.fingerprint})"
            wanted = f"'{name}' ({tokenizer.vocab_size:,} ids, fingerprint {tokenizer.fingerprint})"
            fix = f"set data.tokenizer, separator and special_tokens as for it, or prepare it with --tokenizer {name}."
            where = paths_of(self.prefix).sidecar
            raise DataError(f"{where}: the tokens are of tokenizer {found}, not of {wanted}; {fix}")

    def verify_hashes(self, pause: Callable[[float], bool] = lambda _: False) -> None:
        """Raises `DataError` naming the file whose hash is not the sidecar's. `pause` is called after each block with
        the seconds that it took, and returns whether to give up.
        """
        assert self.info is not None, "without a sidecar nothing is known of it"
        index, ids = self.pointers.file, self.tokens.file
        for file, expected in ((index, self.info.idx_xxh3_64), (ids, self.info.bin_xxh3_64)):
            digest = xxhash.xxh3_64()
            for offset in range(0, file.size, 2**22):
                begun = time.monotonic()
                digest.update(file.read(offset, min(2**22, file.size - offset)))
                if pause(time.monotonic() - begun):
                    return
            if digest.hexdigest() != expected:
                raise _damaged(file.path, f"its hash is not that of {paths_of(self.prefix).sidecar}")

    def _require_ids(self, first: int, stop: int, tokenizer: Tokenizer) -> None:
        """Documents `first` to `stop` end with the separator, and their first `BLOCK` ids are in the vocabulary."""
        path, bounds = self.tokens.file.path, self.document_bounds(first, stop).tolist()
        for number, (begin, end) in enumerate(pairwise(bounds), first):
            if begin < end and self.tokens[end - 1] != tokenizer.separator:
                where = f"{path}: document {number:,} (tokens {begin:,} to {end:,})"
                fix = "make it with --append-eod and the same tokenizer, or by `titanlite data prepare`."
                raise DataError(f"{where} does not end with the tokenizer's separator, {tokenizer.separator}; {fix}")
        start = bounds[0]
        block = self.tokens[start : min(start + BLOCK, bounds[-1])]
        beyond = np.flatnonzero((block < 0) | (block >= tokenizer.vocab_size))
        if beyond.size:
            at, last = start + int(beyond[0]), f"the tokenizer's ids end at {tokenizer.vocab_size - 1:,}"
            problem = f"token {at:,} (byte {at * block.itemsize:,}) is {self.tokens[at]}, and {last}"
            raise DataError(f"{path}: {problem}; the file is damaged, or of another tokenizer.")


class TokenWriter(ExitStack):
    """Writes a token file, unseen before `commit`; used by `with`, which on an error clears away what is there."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        super().__init__()
        self._paths = paths_of(prefix)
        self.dtype = token_dtype(vocab_size)
        self.documents = 0
        self._hash = xxhash.xxh3_64()
        self._lengths: list[Int64] = []  # of sequences, of one document or of a part of one
        self._sequences: list[Int64] = []  # how many each document takes
        self._histogram = np.zeros(64, np.int64)
        self._bin = self.enter_context(replacing(self._paths.bin))

    def extend(self, tokens: npt.ArrayLike) -> None:
        """The next tokens, flat."""
        block = np.ascontiguousarray(tokens, self.dtype)
        self._hash.update(block.data)
        self._bin.write(block.data)

    def end_documents(self, lengths: npt.ArrayLike) -> None:
        """Lengths of the next documents in tokens, separators among them."""
        counts = np.asarray(lengths, np.int64).reshape(-1)
        sequences = -(-counts // LONGEST_SEQUENCE)
        lasts = np.cumsum(sequences) - 1
        self._lengths.append(np.full(int(sequences.sum()), LONGEST_SEQUENCE, np.int64))
        self._lengths[-1][lasts] = counts - (sequences - 1) * LONGEST_SEQUENCE
        self._sequences.append(sequences)
        self._histogram += np.bincount(np.frexp(counts)[1] - 1, minlength=64)
        self.documents += len(counts)

    def commit(self, **info: Any) -> TokenInfo:
        """Finish, and let the file appear; `info` has the sidecar's fields that only the caller knows."""
        tokens, bin_bytes = sum(int(each.sum()) for each in self._lengths), self._bin.tell()
        assert bin_bytes == tokens * self.dtype.itemsize, "every token is in a document"
        with replacing(self._paths.idx) as file:
            digest = xxhash.xxh3_64()
            for block in self._index_blocks():
                digest.update(block)
                file.write(block)
            sidecar = TokenInfo(
                format="titanlite-tokens", version=VERSION, **info, dtype=self.dtype.name, documents=self.documents,
                tokens=tokens, bin_bytes=bin_bytes, bin_xxh3_64=self._hash.hexdigest(),
                lengths={f"2^{power}": int(count) for power, count in enumerate(self._histogram) if count},
                idx_bytes=file.tell(), idx_xxh3_64=digest.hexdigest(),
            )  # fmt: skip
            self._paths.idx.unlink(missing_ok=True)  # of what is replaced
            self.close()  # the .bin appears
            replace_file(self._paths.sidecar, sidecar.model_dump_json(indent=1).encode() + b"\n")
        return sidecar  # the index comes last: without it nothing, Megatron included, takes the rest for a token file

    def _index_blocks(self) -> Iterator[bytes]:
        code = next(code for code, name in TYPES.items() if name == self.dtype.name)
        sequences = sum(map(len, self._lengths))
        yield HEADER.pack(MAGIC, VERSION, code, sequences, self.documents + 1)
        yield from (lengths.astype("<i4").tobytes() for lengths in self._lengths)
        yield from ((begins * self.dtype.itemsize).tobytes() for begins in _running(self._lengths))
        yield from (begins.tobytes() for begins in _running(self._sequences))
        yield struct.pack("<q", sequences)


def _running(counts: list[Int64]) -> Iterator[Int64]:
    """What has come before each count, as `<i8`."""
    total = 0
    for block in counts:
        yield (np.cumsum(block) - block + total).astype("<i8")
        total += int(block.sum())


def _open_arrays(paths: Paths) -> tuple[FileArray[np.integer[Any]], FileArray[np.int64], FileArray[np.int64]]:
    """Ids, pointers and sequences of a `TokenFile`, whose sizes fit each other."""
    path, file = paths.idx, OpenFile(paths.idx)
    if file.size < HEADER.size:
        raise DataError(f"{path}: cut short: {file.size} bytes, and the header takes {HEADER.size}; {RESTORE}")
    magic, version, code, count, entries = HEADER.unpack(file.read(0, HEADER.size))
    if magic != MAGIC:
        raise DataError(f"{path}: not an index of Megatron's format: byte 0 begins {magic!r}, not {MAGIC!r}.")
    if version != VERSION:
        raise DataError(f"{path}: version {version} of the index (byte 9), and only {VERSION} is known.")
    if code not in TYPES:
        raise DataError(f"{path}: type {code} of ids (byte 17); token ids are one of {TYPES}.")
    expected = HEADER.size + 12 * count + 8 * entries
    _require_size(file, expected, f"{count:,} sequences and {entries:,} document entries (bytes 18 to 33) take")
    if not count or entries < 2:
        raise DataError(f"{path}: holds no documents ({count:,} sequences, {entries:,} document entries).")
    at, then = HEADER.size + 4 * count, HEADER.size + 12 * count
    lengths = FileArray(file, HEADER.size, np.dtype("<i4"), count)
    pointers = FileArray(file, at, np.dtype("<i8"), count)
    sequences = FileArray(file, then, np.dtype("<i8"), entries)
    if (sequences[0], sequences[-1]) != (0, count):
        found = f"{sequences[0]:,} and end with {sequences[-1]:,} (bytes {then:,} and {file.size - 8:,})"
        raise _damaged(path, f"documents begin with sequence {found}, not with 0 and {count:,}")
    dtype = np.dtype(TYPES[code]).newbyteorder("<")
    end = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize
    if pointers[0] != 0 or lengths[-1] < 0 or end % dtype.itemsize:
        found = f"{pointers[0]:,} and end at {end:,} of the .bin (read at bytes {at:,} and {then - 8:,})"
        raise _damaged(path, f"sequences begin at byte {found}")
    ids = OpenFile(paths.bin)
    _require_size(ids, end, "its index ends at byte")
    if end == 0:
        raise DataError(f"{paths.bin}: holds no tokens.")
    return FileArray(ids, 0, dtype, end // dtype.itemsize), pointers, sequences


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: damaged: {what}; {RESTORE}")


def _require_size(file: OpenFile, expected: int, why: str) -> None:
    if file.size != expected:
        found = f"{'cut short' if file.size < expected else 'too long'}: {file.size:,} bytes"
        raise DataError(f"{file.path}: {found}, and {why} {expected:,}; {RESTORE}")


def _read_sidecar(paths: Paths, tokens: FileArray[Any], idx_bytes: int) -> TokenInfo:
    path = paths.sidecar
    try:
        info = TokenInfo.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{key}: " for key in first["loc"])
        fix = "If it is damaged, prepare the file again; if another program's, give the token file another name."
        raise DataError(f"{path}: no sidecar that this titanlite knows: {where}{first['msg']}. {fix}") from error
    for what, found, expected in (
        (f"bytes of {paths.bin.name}", tokens.file.size, info.bin_bytes),
        (f"bytes of {paths.idx.name}", idx_bytes, info.idx_bytes),
        ("tokens", len(tokens), info.tokens),
        ("type of ids", tokens.dtype.name, info.dtype),
    ):
        if found != expected:
            raise DataError(f"{path}: belongs to other files: {what}: {expected} there, {found} here; {RESTORE}")
    return info
