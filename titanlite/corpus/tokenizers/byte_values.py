"""The byte tokenizer: no file, no library, nothing learnt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from titanlite.corpus.tokenizers import Ids, Tokenizer
from titanlite.corpus.tokenizers.pieces import fingerprint_of, flat_ids, require_distinct
from titanlite.errors import DataError


class ByteTokenizer(Tokenizer):
    """The 256 byte values as they are, 256 between documents, and the special tokens from 257 on."""

    separator = 256

    def __init__(self, name: Path | None = None, separator: str | None = None, special: Sequence[str] = ()) -> None:
        if separator is not None:
            raise DataError("data.separator: the byte tokenizer's separator is 256 and has no name; leave it out.")
        require_distinct(special)
        self.files: dict[str, Path] = {}
        self.special_tokens = {token: number for number, token in enumerate(special, self.separator + 1)}
        self.vocab_size = self.separator + 1 + len(special)
        self.fingerprint = fingerprint_of("bytes", b"", self.special_tokens, self.separator)

    def encode_batch(self, texts: Sequence[bytes]) -> list[Ids]:
        return [np.frombuffer(text, np.uint8) for text in texts]  # the texts themselves, not copies

    def decode(self, ids: npt.ArrayLike) -> bytes:
        flat = flat_ids(ids, self.vocab_size)
        return bytes(flat[flat < self.separator].astype(np.uint8))

    def bytes_of(self, ids: npt.ArrayLike) -> int:
        return int(np.count_nonzero(np.asarray(ids) < self.separator))

    def export(self) -> dict[str, bytes]:
        return {}
