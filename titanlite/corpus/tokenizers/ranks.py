"""Rank files, as Llama 3's `tokenizer.model`: lines of a token in base64 and its rank, applied by `tiktoken`.

A token's rank is its id, and which neighbours merge first. Special tokens are not in the file: they follow the ranks.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from titanlite.corpus.tokenizers import Ids
from titanlite.corpus.tokenizers.byte_pairs import LLAMA3_PATTERN, json_of_ranks, rank_engine, ranks_in
from titanlite.corpus.tokenizers.hugging_face import CONFIG, config_json
from titanlite.corpus.tokenizers.pieces import PieceTokenizer, choose_separator, read_file, require_distinct
from titanlite.errors import DataError

LLAMA3_SPECIAL_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>",
    *(f"<|reserved_special_token_{number}|>" for number in range(4)),
    "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>",
    *(f"<|reserved_special_token_{number}|>" for number in range(5, 251)),
)  # fmt: skip
"""Of Meta's release of April 2024; later ones give some of the reserved ones a meaning, and none another id."""
_LONGEST_RUN = 25_000
"""Of characters that are white space, or are not; as in Meta's release."""
_RUNS = re.compile(r"\s+|\S+")
_NO_RANKS = (
    "a rank file's lines are a token in base64, a space and its rank (a SentencePiece model has the same name and is "
    "none: have transformers save it as tokenizer.json)"
)


class RankTokenizer(PieceTokenizer):
    """Ranks, cut by Llama 3's pattern; `special` are its special tokens if there are any, and else Llama 3's."""

    library = "tiktoken"
    takes_any_bytes = True

    def __init__(self, path: Path, separator: str | None = None, special: Sequence[str] = ()) -> None:
        """Raises `DataError`."""
        require_distinct(special)
        content = read_file(path)
        self.ranks = _read_ranks(path, content)
        names = special or LLAMA3_SPECIAL_TOKENS
        ids = {name: number for number, name in enumerate(names, len(self.ranks))}
        super().__init__(path, content, ids, choose_separator(path, ids, separator), len(self.ranks) + len(ids))
        self.files = {"tokenizer.model": path}

    def encode_strings(self, texts: Sequence[str]) -> list[Ids]:
        return [self._encode_string(text) for text in texts]

    def piece_table(self) -> Mapping[int, bytes]:
        return {rank: token for token, rank in self.ranks.items()}

    def export(self) -> dict[str, bytes]:
        content = json_of_ranks(self.ranks, self.special_tokens).encode()
        return {"tokenizer.json": content, CONFIG: config_json({}, self.separator_name)}

    def _encode_string(self, text: str) -> Ids:
        try:
            ids = ranks_in(self._engine, text)
        except ValueError:
            ids = np.concatenate([ranks_in(self._engine, part) for part in _cut_runs(text)])
        return ids.astype(self.dtype)

    @cached_property
    def _engine(self) -> Any:
        return rank_engine(str(self.path), self.ranks, LLAMA3_PATTERN)


def _read_ranks(path: Path, content: bytes) -> dict[bytes, int]:
    """Tokens by rank, 0 to the last without a gap. Raises `DataError`."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            value = int(rank)
        except ValueError:
            raise DataError(f"{path}:{number}: {_NO_RANKS}.") from None
        if token in ranks or not token:
            raise DataError(f"{path}:{number}: the token {encoded.decode()} is {'there twice' if token else 'empty'}.")
        ranks[token] = value
    placed = sorted(ranks.items(), key=lambda item: item[1])
    for expected, (_, found) in enumerate(placed):
        if found != expected:
            which = f"rank {expected} is missing" if found > expected else f"rank {found} is there twice"
            raise DataError(f"{path}: {which}, or its token is; the file is cut or mixed up: fetch it again.")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise DataError(f"{path}: the byte {missing[0]:#04x} has no rank, and so not every text has ids.")
    return dict(placed)


def _cut_runs(text: str) -> Iterator[str]:
    """The text in parts, no run of characters longer than what the pattern can take."""
    begin = 0
    for run in _RUNS.finditer(text):
        for cut in range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN):
            yield text[begin:cut]
            begin = cut
    yield text[begin:]
