"""From text to token ids and back. A tokenizer knows no files and no batches.

Text is bytes throughout: a corpus may hold any bytes, and bits per byte need their count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from titanlite.registry import Registry

Ids = npt.NDArray[np.integer[Any]]
"""Ids of a text, in whatever integers are cheapest for the tokenizer."""
Tokens = npt.NDArray[np.uint16 | np.int32]
"""Ids as they are kept; see `token_dtype`."""

_NARROW_LIMIT = 65_500
"""Megatron's: vocabularies from here on are kept in 4 bytes an id."""


class Tokenizer(Protocol):
    """What the rest of the data room, validation and `titanlite generate` ask of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Ids are in [0, vocab_size); the model's embedding has at least so many rows."""

    @property
    def separator(self) -> int:
        """The id that stands between documents; no text encodes to it."""

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides ids, 32 hexadecimal digits."""

    def encode(self, text: bytes) -> Ids:
        """Ids of `text`, without a separator, as a flat array that may be read-only. Raises `DataError`."""

    def encode_batch(self, texts: Sequence[bytes]) -> list[Ids]:
        """`encode` of each; faster where the texts are short."""

    def decode(self, ids: npt.ArrayLike) -> bytes:
        """The bytes that `ids` stand for; separators stand for none."""

    def bytes_of(self, ids: npt.ArrayLike) -> int:
        """How many bytes `ids` stand for: `len(decode(ids))`."""


class ByteTokenizer:
    """The 256 byte values as they are, and 256 between documents."""

    vocab_size = 257
    separator = 256
    fingerprint = "0" * 32

    def encode(self, text: bytes) -> Ids:
        return np.frombuffer(text, np.uint8)  # the text itself, not a copy

    def encode_batch(self, texts: Sequence[bytes]) -> list[Ids]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: npt.ArrayLike) -> bytes:
        """As the protocol says; raises `ValueError` for an id outside the vocabulary."""
        flat = np.asarray(ids, dtype=np.int64).reshape(-1)
        if flat.size and (flat.min() < 0 or flat.max() >= self.vocab_size):
            raise ValueError(f"ids must be in [0, {self.vocab_size}), found {flat.min()} to {flat.max()}")
        return bytes(flat[flat != self.separator].astype(np.uint8))

    def bytes_of(self, ids: npt.ArrayLike) -> int:
        return int(np.count_nonzero(np.asarray(ids) != self.separator))


TOKENIZERS = Registry("tokenizer", {"bytes": "titanlite.data.tokenizers:ByteTokenizer"})


def open_tokenizer(name: str, separator: str | None = None, special_tokens: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names. Raises `UsageError` for an unknown name."""
    tokenizer: Tokenizer = TOKENIZERS.get(name)()
    return tokenizer


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """2 bytes an id where they suffice by Megatron's rule, else 4."""
    return np.uint16 if vocab_size < _NARROW_LIMIT else np.int32
