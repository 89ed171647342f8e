"""Where text comes from. A reader yields documents in a fixed order; tokens and splits are not its business.

A corpus of one's own is a function `read(section: Data) -> Iterator[Document]` and a line in `CORPORA`; a file format
is a `Reader` and a line in `READERS`.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from titanlite.errors import DataError
from titanlite.registry import Registry

if TYPE_CHECKING:  # processes that read files need no recipes, which are slow to import
    from titanlite.recipe.sections import Data

PACKED = {".gz": "gzip", ".zst": "zstd"}
BLOCK_BYTES = 2**20


class Document(NamedTuple):
    """One text."""

    name: str
    """Says where it comes from, and stays the same when the corpus moves: a relative path, or `path:line`."""
    content: bytes


class Part(NamedTuple):
    """Of a JSONL file the lines that begin in a range of its bytes; of a Parquet file a range of its row groups."""

    first: int
    stop: int
    before: int
    """Newlines, or rows, of the file before it: from them its documents have their numbers."""


class Reader(NamedTuple):
    """How the files of one format are read."""

    read: Callable[[Path, str, Part | None], Iterator[tuple[int, bytes | DataError]]]
    """Of a file, or a part of it, and `data.text_key`: number (of the line or row, from 1; 0 for a file that is one
    document) and text of each document, or what is wrong with that one. Raises `DataError` for a file that cannot be
    read."""
    divide: Callable[[Path, int, int], list[Part]] | None = None
    """Of a file, its size and how much a part is to have, in bytes: parts that together yield what the whole does; None
    for a format that cannot be read so."""


CORPORA = Registry("corpus", {"python-stdlib": "titanlite.corpus.corpora.files:read_stdlib"})
READERS = Registry(
    "corpus reader",
    {
        "text": "titanlite.corpus.corpora.readers:TEXT",
        "lines": "titanlite.corpus.corpora.readers:JSON_LINES",
        "parquet": "titanlite.corpus.corpora.readers:PARQUET",
        "arrow": "titanlite.corpus.corpora.readers:ARROW",
    },
)
"""By format. One whose name is a suffix, such as `.csv`, is that of all files with this suffix."""


def read_corpus(entries: Sequence[str], section: Data) -> Iterator[Document]:
    """All documents of `entries`, in order; those that name no registered corpus are paths. Raises `DataError`."""
    from titanlite.corpus.corpora.files import FileFinder
    from titanlite.corpus.corpora.readers import read_documents

    finder = FileFinder(section.text_key)
    for entry in entries:
        if entry in CORPORA:
            yield from CORPORA.get(entry)(section)
        else:
            for file in finder.find(entry):
                yield from read_documents(file.name, file.path, file.format, section.text_key)


def is_held_out(name: str, percent: float) -> bool:
    """Whether the document called `name` is for validation: by its name alone, so that it stays on its side."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < percent / 100 * 2**64


@contextmanager
def open_unpacked(path: Path, block_bytes: int = BLOCK_BYTES) -> Iterator[IO[bytes]]:
    """The file's content, unpacked by blocks. What is read within, and cannot be, is a `DataError` with the place."""
    codec = PACKED.get(path.suffix.lower())
    with wrap_os_errors(path), open(path, "rb", buffering=block_bytes if codec else -1) as file:
        if codec is None:
            yield file
            return
        import pyarrow

        # Unlike zstandard's reader, Arrow's does not take a file that was cut short for a whole one.
        yield io.BufferedReader(pyarrow.CompressedInputStream(file, codec), block_bytes)


def read_unpacked(path: Path, limit: int = -1) -> bytes:
    """The whole of it, or its first `limit` bytes."""
    with open_unpacked(path, BLOCK_BYTES if limit < 0 else limit) as file:
        return file.read(limit)


@contextmanager
def wrap_os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None:  # Arrow's, of packed files
            hint = " by zstd -d --long=31" if "too much memory" in str(error) else ""
            why = f"damaged or cut short ({error}); fetch or pack it again, or unpack it{hint}."
        else:
            why = f"cannot be read ({error.strerror}); mend it or its permissions, or leave it out."
        raise DataError(f"{path}: {why}") from error
