"""Where text comes from. A reader yields documents in a fixed order; it knows no tokens and no splits.

A corpus of one's own is a function `reader(section: Data) -> Iterator[Document]` and a line in `CORPORA`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from titanlite.registry import Registry

if TYPE_CHECKING:  # processes that read files need no recipes, which are slow to import
    from titanlite.recipe.sections import Data


class Document(NamedTuple):
    """One text."""

    name: str
    """Says where it comes from, and stays the same when the corpus moves: a relative path, or `path:line`."""
    content: bytes


CORPORA = Registry("corpus", {"python-stdlib": "titanlite.corpus.corpora.python_stdlib:read_stdlib"})


def read_corpus(entries: Sequence[str], section: Data) -> Iterator[Document]:
    """All documents of `entries`, in order; those that name no registered corpus are paths.

    Raises `DataError` at whatever cannot be read, naming the file, the line and the way out.
    """
    from titanlite.corpus.corpora.files import FileReader

    files = FileReader(section.text_key)
    for entry in entries:
        yield from CORPORA.get(entry)(section) if entry in CORPORA else files.read(entry)


def is_held_out(name: str, percent: float) -> bool:
    """Whether the document called `name` is for validation: by its name alone, so that it stays on its side."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < percent / 100 * 2**64
