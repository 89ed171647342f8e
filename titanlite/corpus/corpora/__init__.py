"""Where text comes from. A reader yields documents in a fixed order; tokens and splits are not its business.

A corpus of one's own is a function `read(section: Data) -> Iterator[Document]` and a line in `CORPORA`; a file format
is a `Reader` and a line in `READERS`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from titanlite.errors import DataError
from titanlite.registry import Registry

if TYPE_CHECKING:  # processes that read files need no recipes, which are slow to import
    from titanlite.recipe.sections import Data


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


class FoundFile(NamedTuple):
    name: str  # relative to what the entry fixes, so that it stays the same when the corpus moves
    path: Path
    format: str
    size: int
    modified_ns: int
    source: int = 0  # which of the entries names it
    part: Part | None = None  # if not all of it


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
                yield from read_documents(file, section.text_key)


def is_held_out(name: str, percent: float) -> bool:
    """Whether the document called `name` is for validation: by its name alone, so that it stays on its side."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < percent / 100 * 2**64
