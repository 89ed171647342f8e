"""Best-fit packing: documents put together into windows so that none that fits into one is cut. Numpy alone.

Best-fit decreasing (as of Ding et al. 2024, 'Fewer truncations improve language modeling'): the longest document
first, each into the fullest window that still has room for it. Windows with equal room are all alike, so equal
documents are dealt to equal windows at once: the work grows with the lengths that there are, not with the documents.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from titanlite.corpus.tokenizers import Tokens
from titanlite.data.packing import Sliced, joined

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BestFit:
    """Where the pieces of a stream lie in windows; made by `best_fit`. A piece is a document with the separator that
    follows it, or a part of one that is too long for a window.

    In memory, 12 bytes a piece and 8 a window; some five times as much while it is made.
    """

    sequence_length: int
    separator: int
    starts: Int64
    """First token of each piece, window by window; within one, in the order of the stream."""
    lengths: npt.NDArray[np.int32]
    """Tokens of each."""
    ends: Int64
    """Pieces up to the end of each window."""
    documents: int
    cut: int
    """Documents that did not fit into a window."""

    @property
    def windows(self) -> int:
        return len(self.ends)

    @property
    def labels(self) -> int:
        """Of all windows together: every token of the stream is one once."""
        return int(self.lengths.sum(dtype=np.int64))

    def first(self, index: int) -> int:
        """Where in the stream the first piece of window `index` begins."""
        return int(self.starts[self.ends[index - 1] if index else 0])

    def window(self, stream: Sliced, index: int) -> Tokens:
        """Inputs and labels of window `index`: at most `sequence_length` + 1 tokens; what is missing is padding.

        The separator, then pieces. But of a document that is cut, a part that fills the window comes after the token
        before it, as it does where windows are cut out of the stream. The rest of it comes after the separator.
        """
        first = self.ends[index - 1] if index else 0
        starts, lengths = self.starts[first : self.ends[index]], self.lengths[first : self.ends[index]]
        begins, ends = starts.tolist(), (starts + lengths).tolist()
        before = max(begins[0] - 1, 0)
        tokens = joined(stream, [before, *begins], [before + 1, *ends])
        if lengths[0] < self.sequence_length or starts[0] == 0:
            tokens[0] = self.separator
        return tokens


def best_fit(document_ends: Int64, sequence_length: int, separator: int) -> BestFit:
    """Pack documents that follow each other in a stream from its first token on, up to `document_ends` (which never
    fall), each with the separator at its end.

    A document longer than a window becomes parts of `sequence_length` tokens, which fill windows of their own, and a
    rest that is packed like a document. All of it is whole numbers, and the same everywhere.
    """
    lengths = np.diff(document_ends, prepend=0)
    parts = -(-lengths // sequence_length)  # none of a document without any token
    starts = np.repeat(document_ends - lengths, parts)
    first = np.cumsum(parts) - parts
    starts += sequence_length * (np.arange(len(starts)) - np.repeat(first, parts))
    part_lengths = np.minimum(np.repeat(document_ends, parts) - starts, sequence_length).astype(np.int32)
    window, windows = _windows(part_lengths, sequence_length)
    order = np.argsort(window, kind="stable")
    return BestFit(
        sequence_length=sequence_length,
        separator=separator,
        starts=starts[order],
        lengths=part_lengths[order],
        ends=np.cumsum(np.bincount(window, minlength=windows)),
        documents=int(np.count_nonzero(lengths)),
        cut=int(np.count_nonzero(lengths > sequence_length)),
    )


def _windows(lengths: npt.NDArray[np.int32], room: int) -> tuple[Int64, int]:
    """The window, from 0, that each piece goes to, and their number. Of equal pieces, the first go first."""
    # Of 16 bits, numpy sorts in linear time.
    by_length = np.argsort((room - lengths).astype(np.min_scalar_type(room)), kind="stable")
    counts = np.bincount(lengths, minlength=room + 1)
    dealt = np.empty(len(lengths), np.int64)  # windows of the pieces, the longest first
    begun = _Begun(room)
    windows = done = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            space = begun.tightest(length)
            each = (space or room) // length  # pieces that the fullest window takes before it is another's turn
            wanted = -(-left // each)
            if space:
                chosen = begun.take(space, wanted)
            else:
                space, chosen = room, np.arange(windows, windows + wanted)
                windows += wanted
            placed = min(left, each * len(chosen))
            dealt[done : done + placed] = np.repeat(chosen, each)[:placed]
            full = placed // each
            begun.put(space - each * length, chosen[:full])
            begun.put(space - (placed - each * full) * length, chosen[full:])
            left, done = left - placed, done + placed
    result = np.empty_like(dealt)
    result[by_length] = dealt
    return result, windows


class _Begun:
    """Windows that have room left, by how much."""

    def __init__(self, room: int) -> None:
        self._windows: defaultdict[int, list[Int64]] = defaultdict(list)
        self._any = bytearray(room + 1)
        """By room: whether there are any. Searched as bytes are, which is faster than a tree for any sane length."""

    def tightest(self, length: int) -> int:
        """The least room, of any window, that `length` fits into; 0: there is none."""
        return max(0, self._any.find(1, length))

    def take(self, space: int, most: int) -> Int64:
        """So many of the windows with this room, or all."""
        taken: list[Int64] = []
        held = self._windows[space]
        while held and most:
            block = held.pop()
            taken.append(block[:most])
            if len(block) > most:
                held.append(block[most:])
            most -= len(taken[-1])
        self._any[space] = bool(held)
        return np.concatenate(taken)

    def put(self, space: int, windows: Int64) -> None:
        if space and len(windows):
            self._windows[space].append(windows)
            self._any[space] = True
