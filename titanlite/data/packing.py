"""Documents into one stream of tokens, and the stream into windows of equal length. Numpy alone.

`Cut` is concatenate and cut (the other way is `best_fit`): document, separator, document, separator, ...; window w
holds tokens w*L to w*L + L inclusive, L + 1 of them, so that its inputs are the first L, its labels the last L, and
over all windows each token but the stream's first is a label once. Fewer than L tokens at the stream's end fill no
window and are not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from titanlite.corpus.file_array import FileArray
from titanlite.corpus.tokenizers import Tokens

Int64 = npt.NDArray[np.int64]


class Sliced(Protocol):
    """Tokens, all of which need not be in one place: as `[a:b]`, or by the place of each."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: slice | Int64, /) -> Tokens: ...


def joined(tokens: Sliced, begins: Sequence[int], ends: Sequence[int]) -> Tokens:
    """A copy of some stretches of `tokens`, one after the other."""
    if isinstance(tokens, np.ndarray | FileArray):
        return np.concatenate([tokens[begin:end] for begin, end in zip(begins, ends, strict=True)])
    return tokens[np.concatenate([*map(np.arange, begins, ends)])]  # what is computed costs less at once


class Stream(Protocol):
    """Documents, each followed by the separator."""

    @property
    def tokens(self) -> Sliced:
        """All of them, flat."""

    @property
    def fingerprint(self) -> str:
        """Equal where all tokens are."""

    def document_ends(self) -> Int64:
        """End of each document, past its separator, in tokens."""


@dataclass(frozen=True)
class Cut:
    """A stream of so many tokens, cut."""

    tokens: int
    sequence_length: int

    @property
    def windows(self) -> int:
        return max(0, (self.tokens - 1) // self.sequence_length)

    def first(self, index: int) -> int:
        """Where in the stream window `index` begins."""
        return index * self.sequence_length

    def window(self, stream: Sliced, index: int) -> Tokens:
        """Tokens of window `index`, `[sequence_length + 1]`; of an array, a view."""
        start = self.first(index)
        return stream[start : start + self.sequence_length + 1]


def document_layout(inputs: Int64, separator: int) -> tuple[Int64, Int64]:
    """Positions and document numbers of `inputs`, `[..., seq_len]` both, for attention kept inside documents.

    As a label the separator ends a document; as an input it opens the next one, at position 0. So the first token
    of a document is predicted from the separator alone, no label is lost, nothing is seen across the boundary, and
    `separator + prompt` is how generation begins a document. (Were the separator the last input of its document,
    the next one's first token would be predicted from a text that has nothing to do with it, or not at all.)
    A document that the window's edge cuts counts its positions from the edge: only differences of positions matter
    to rotary embeddings, and they never exceed the window. Documents are numbered from 0 within each window.
    """
    opens = inputs == separator
    index = np.arange(inputs.shape[-1], dtype=np.int64)
    starts = np.maximum.accumulate(np.where(opens, index, 0), axis=-1)
    # A separator in first place opens number 1; number 0 is then absent, which harms nobody who compares numbers.
    return index - starts, np.cumsum(opens, axis=-1, dtype=np.int64)
