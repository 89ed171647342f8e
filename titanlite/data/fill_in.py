"""Fill-in-the-middle (Bavarian et al. 2022): the middle of some documents is moved to their end when they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from titanlite.corpus.token_file import Int64
from titanlite.corpus.tokenizers import Tokenizer, Tokens
from titanlite.data.order import mix64
from titanlite.data.packing import Stream
from titanlite.errors import DataError


def fill_in(
    streams: Sequence[Stream], rate: float, names: Sequence[str], tokenizer: Tokenizer, seed: int, source: str
) -> tuple[FilledIn, ...]:
    """All streams of a source of this name, whose documents are numbered through; `rate` of those that have text are
    rearranged. Raises `DataError` for a marker that is no special token of the tokenizer.
    """
    for index, name in enumerate(names):
        if name not in tokenizer.special_tokens:
            there = f"(it has: {', '.join(tokenizer.special_tokens) or 'none'})"
            what = f"data.fim_tokens.{index}: the tokenizer has no special token '{name}' {there}"
            raise DataError(f"{what}; add it to data.special_tokens, or name others.")
    markers = tuple(tokenizer.special_tokens[name] for name in names)
    if len({*markers, tokenizer.separator}) < 4:
        raise DataError("data.fim_tokens: give three different tokens, none of them the separator of documents.")
    key = int.from_bytes(hashlib.blake2b(f"fim/{seed}/{source}".encode(), digest_size=8).digest(), "little")
    ends = [each.document_ends() for each in streams]
    firsts = accumulate(map(len, ends), initial=0)
    return tuple(FilledIn(*each, rate, markers, key) for each in zip(streams, ends, firsts, strict=False))


@dataclass(frozen=True)
class FilledIn:
    """A stream as it is read; its own tokens, as `[a:b]` or by their places. In memory, 16 bytes a document."""

    stream: Stream
    own_ends: Int64  # end of each document in the stream, past its separator
    first_document: int  # number in the source of the stream's first document
    rate: float
    markers: tuple[int, ...]  # tokens before the prefix, the suffix and the middle
    key: int  # 64 bits; with a document's number they decide whether it is rearranged, and where it is cut

    @property
    def tokens(self) -> FilledIn:
        return self

    @property
    def fingerprint(self) -> str:
        return self.stream.fingerprint

    @cached_property
    def _ends(self) -> Int64:
        text = np.diff(self.own_ends, prepend=0) > 1
        chosen = text & (self._draw(np.arange(len(self.own_ends)), 0) < self.rate)
        return self.own_ends + 3 * np.cumsum(chosen)

    def document_ends(self) -> Int64:
        """With three markers more for each document that is rearranged."""
        return self._ends

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, key: slice | Int64) -> Tokens:
        at = np.arange(*key.indices(len(self))) if isinstance(key, slice) else key
        document = np.searchsorted(self._ends, at, side="right")
        begin, start = (np.where(document > 0, ends[document - 1], 0) for ends in (self._ends, self.own_ends))
        place, size = at - begin, self.own_ends[document] - start
        # Before any of its tokens, or before the separator.
        one, other = ((self._draw(document, which) * size).astype(np.int64) for which in (1, 2))
        first, second = np.minimum(one, other), np.maximum(one, other)
        suffix, middle = first + 1, first + 1 + size - second  # places of their markers
        after = np.where(place < middle, second - first - 2, np.where(place < size + 2, second - size - 2, -3))
        shift = np.where(place < suffix, -1, after)
        rearranged = self._ends[document] - begin != size
        tokens = self.stream.tokens[np.maximum(start + place + shift * rearranged, 0)]  # for a marker, any token
        for marker, where in zip(self.markers, (0, suffix, middle), strict=True):
            tokens[rearranged & (place == where)] = marker
        return tokens

    def _draw(self, documents: Int64, which: int) -> npt.NDArray[np.float64]:
        """A number in [0, 1) for each document of the stream; another one for each `which`, of 0, 1 and 2."""
        numbers = (self.first_document + documents).astype(np.uint64)
        hashes = mix64(np.uint64(self.key) + numbers * np.uint64(3) + np.uint64(which))
        drawn: npt.NDArray[np.float64] = (hashes >> np.uint64(11)) * 2.0**-53  # all bits that a float64 has: never 1
        return drawn
