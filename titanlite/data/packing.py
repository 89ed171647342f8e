"""Documents into windows of equal length: cut out of one stream, or packed so that none that fits is cut. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from titanlite.corpus.token_file import FileArray, Int64
from titanlite.corpus.tokenizers import Tokens


class Sliced(Protocol):
    """Tokens, all of which need not be in one place: as `[a:b]`, or by the place of each."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: slice | Int64, /) -> Tokens: ...


class Stream(Protocol):
    """Documents, each followed by the separator: all `tokens`, flat, the `fingerprint` equal where they are, and the
    end of each document, past its separator, in tokens.
    """

    @property
    def tokens(self) -> Sliced: ...

    @property
    def fingerprint(self) -> str: ...

    def document_ends(self) -> Int64: ...


@dataclass(frozen=True)
class Cut:
    """A stream of `tokens` tokens, cut: window w holds tokens w*L to w*L + L inclusive, so that its inputs are the
    first L, its labels the last L, and over all windows each token but the stream's first is a label once. Fewer than L
    tokens at the end are not used.
    """

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


@dataclass(frozen=True)
class BestFit:
    """Where the pieces of a stream lie in windows, as `pack_best_fit` puts them: documents with the separator that
    follows, or parts of one that is too long for a window. 12 bytes a piece and 8 a window.
    """

    sequence_length: int
    separator: int
    starts: Int64  # first token of each piece, window by window; within one, in the order of the stream
    lengths: npt.NDArray[np.int32]  # tokens of each
    ends: Int64  # pieces up to the end of each window
    documents: int
    cut: int  # documents that did not fit into a window

    @property
    def windows(self) -> int:
        return len(self.ends)

    def first(self, index: int) -> int:
        """Where in the stream the first piece of window `index` begins."""
        return int(self.starts[self.ends[index - 1] if index else 0])

    def window(self, stream: Sliced, index: int) -> Tokens:
        """Inputs and labels of window `index`: the separator, then pieces, at most `sequence_length` + 1 tokens. Of a
        document that is cut, a part that fills the window comes after the token before it instead, as in `Cut`.
        """
        first = self.ends[index - 1] if index else 0
        starts, lengths = self.starts[first : self.ends[index]], self.lengths[first : self.ends[index]]
        before = max(int(starts[0]) - 1, 0)
        begins, ends = [before, *starts.tolist()], [before + 1, *(starts + lengths).tolist()]
        if isinstance(stream, np.ndarray | FileArray):
            tokens = np.concatenate([stream[begin:end] for begin, end in zip(begins, ends, strict=True)])
        else:  # what is computed costs less at once
            tokens = stream[np.concatenate([*map(np.arange, begins, ends)])]
        if lengths[0] < self.sequence_length or starts[0] == 0:
            tokens[0] = self.separator
        return tokens


def document_begins(inputs: Int64, separator: int, padding_begins: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Which of `inputs`, `[sequences, seq_len]`, begin a document, for attention kept inside documents.

    As a label the separator ends a document; as an input it opens the next one, at position 0. So the first token
    of a document is predicted from the separator alone, no label is lost, nothing is seen across the boundary, and
    `separator + prompt` is how generation begins a document. So does each sequence, with what is left of a document
    that its edge cuts, and the padding that each ends with, whose place is in `padding_begins`: all of it is one.
    """
    begins: npt.NDArray[np.bool_] = inputs == separator
    begins[:, 0] = True
    for row, first in enumerate(padding_begins):
        begins[row, first + 1 :] = False
    return begins


def document_positions(begins: npt.NDArray[np.bool_]) -> Int64:
    """Each token's place in its document, of the shape of `begins`, `[sequences, seq_len]`. What a sequence's edge cuts
    is counted from there: only differences matter to rotary embeddings.
    """
    index = np.arange(begins.shape[-1], dtype=np.int64)
    return index - np.maximum.accumulate(np.where(begins, index, 0), axis=-1)


def document_offsets(begins: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Where documents begin in each microbatch of `begins`, `[microbatches, microbatch, seq_len]`, whose sequences lie
    end to end: `[microbatches, size]`, filled up with the number of its tokens.

    Compiled code is for one size, so that it is a power of two, with room for a document in 512 tokens and more only
    where a microbatch has more.
    """
    microbatches, microbatch, length = begins.shape
    found = [np.flatnonzero(each) for each in begins]
    size = offsets_size(microbatch, length, max(map(len, found)))
    offsets = np.full((microbatches, size), microbatch * length, np.int32)
    for row, places in zip(offsets, found, strict=True):
        row[: len(places)] = places
    return offsets


def offsets_size(microbatch: int, sequence_length: int, documents: int = 0) -> int:
    """The size of `document_offsets` for the most documents that a microbatch of a batch has."""
    usual = microbatch * (1 + sequence_length // 512)
    return 1 << max(usual, documents).bit_length()


def pack_best_fit(document_ends: Int64, sequence_length: int, separator: int) -> BestFit:
    """Pack documents that follow each other in a stream from its first token on, each with the separator at its end, by
    best-fit decreasing (Ding et al. 2024, 'Fewer truncations improve language modeling'): the longest first, each into
    the fullest window that still has room for it. All of it is whole numbers, and the same everywhere.

    A document longer than a window becomes parts of `sequence_length` tokens, which fill windows of their own, and a
    rest that is packed like a document. It takes some five times the memory of its result.
    """
    lengths = np.diff(document_ends, prepend=0)
    parts = -(-lengths // sequence_length)  # none of a document without any token
    starts = np.repeat(document_ends - lengths, parts)
    first = np.cumsum(parts) - parts
    starts += sequence_length * (np.arange(len(starts)) - np.repeat(first, parts))
    part_lengths = np.minimum(np.repeat(document_ends, parts) - starts, sequence_length).astype(np.int32)
    window = _assign_windows(part_lengths, sequence_length)
    order = np.argsort(window, kind="stable")
    return BestFit(
        sequence_length=sequence_length,
        separator=separator,
        starts=starts[order],
        lengths=part_lengths[order],
        ends=np.cumsum(np.bincount(window)),
        documents=int(np.count_nonzero(lengths)),
        cut=int(np.count_nonzero(lengths > sequence_length)),
    )


def _assign_windows(lengths: npt.NDArray[np.int32], room: int) -> Int64:
    """The window, from 0, that each piece goes to. Of equal pieces, the first go first.

    Windows with equal room are all alike, so equal pieces are dealt to equal windows at once: the work grows with the
    lengths that there are, not with the pieces.
    """
    # Of 16 bits, numpy sorts in linear time.
    by_length = np.argsort((room - lengths).astype(np.min_scalar_type(room)), kind="stable")
    counts = np.bincount(lengths, minlength=room + 1)
    dealt = [np.empty(0, np.int64)]  # windows of the pieces, the longest first
    begun: list[list[Int64]] = [[] for _ in range(room + 1)]  # windows by the room that they have left
    is_any = bytearray(room + 1)  # whether there are any; searched as bytes are, which is faster than a tree
    windows = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            space = max(0, is_any.find(1, length))  # the least that `length` fits into; 0: there is none
            each = (space or room) // length  # pieces that the fullest window takes before it is another's turn
            wanted = -(-left // each)
            if space:
                taken: list[Int64] = []
                while begun[space] and wanted:  # the last that were begun; the rest is not copied, there may be many
                    block = begun[space].pop()
                    taken.append(block[:wanted])
                    if len(block) > wanted:
                        begun[space].append(block[wanted:])
                    wanted -= len(taken[-1])
                chosen, is_any[space] = np.concatenate(taken), bool(begun[space])
            else:
                space, chosen = room, np.arange(windows, windows + wanted)
                windows += wanted
            dealt.append(np.repeat(chosen, each)[:left])
            full, more = divmod(len(dealt[-1]), each)
            for pieces, block in ((each, chosen[:full]), (more, chosen[full:])):
                if len(block) and (rest := space - pieces * length):
                    begun[rest].append(block)
                    is_any[rest] = True
            left -= len(dealt[-1])
    result = np.empty(len(lengths), np.int64)
    result[by_length] = np.concatenate(dealt)
    return result
