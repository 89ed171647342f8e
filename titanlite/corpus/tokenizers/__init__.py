"""From text to token ids and back. A tokenizer depends on its own file alone, not on a corpus or batches.

Text is bytes throughout: a corpus may hold any bytes, and bits per byte need their count. What a tokenizer's file says
is read when it is opened; the library that applies it is imported when the first text is encoded.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from titanlite.errors import DataError, Finding, UsageError
from titanlite.recipe.paths import expand
from titanlite.registry import Registry, did_you_mean

if TYPE_CHECKING:
    from titanlite.recipe.sections import Data

Ids = npt.NDArray[np.integer[Any]]
"""Ids of a text, in whatever integers are cheapest for the tokenizer."""
Tokens = npt.NDArray[np.uint16 | np.int32]
"""Ids as they are kept; see `token_dtype`."""

_NARROW_LIMIT = 65_500
"""Megatron's: vocabularies from here on are kept in 4 bytes an id."""


class Tokenizer(ABC):
    vocab_size: int
    """Ids are in [0, vocab_size); the model's embedding has at least `vocab_size` rows."""
    separator: int
    """The id that stands between documents; no text encodes to it."""
    special_tokens: Mapping[str, int]
    """Ids that no text encodes to (but for one that stands for what is unknown), by name. The byte tokenizer's
    separator has none."""
    fingerprint: str
    """Hash of all that decides ids, 32 hexadecimal digits."""
    files: Mapping[str, Path]
    """The files that it was opened from, by the names under which a folder of them opens as the same tokenizer."""

    def encode(self, text: bytes) -> Ids:
        """Ids of `text`, without a separator, as a flat array that may be read-only. Raises `DataError`."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[bytes]) -> list[Ids]:
        """`encode` of each; faster where the texts are short."""

    @abstractmethod
    def decode(self, ids: npt.ArrayLike) -> bytes:
        """The bytes that `ids` stand for, one id after the other; special tokens stand for none.

        Raises `ValueError` for an id outside the vocabulary.
        """

    @abstractmethod
    def bytes_of(self, ids: npt.ArrayLike) -> int:
        """How many bytes `ids` stand for: `len(decode(ids))`."""

    @abstractmethod
    def export(self) -> dict[str, bytes]:
        """Names and contents of the files by which Hugging Face's transformers give the same ids; may be none."""

    def name_of(self, special: int) -> str | None:
        """Of a special token."""
        return next((name for name, number in self.special_tokens.items() if number == special), None)


TOKENIZERS = Registry(
    "tokenizer",
    {
        "bytes": "titanlite.corpus.tokenizers.pieces:ByteTokenizer",
        ".json": "titanlite.corpus.tokenizers.hugging_face:HuggingFaceTokenizer",
        ".model": "titanlite.corpus.tokenizers.byte_pairs:RankTokenizer",
        ".tiktoken": "titanlite.corpus.tokenizers.byte_pairs:RankTokenizer",
    },
)
"""A tokenizer's name, or the suffix of its file -> what opens it: (path, separator, special tokens) -> `Tokenizer`."""

END_OF_TEXT = (
    "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]", "<EOS_TOKEN>", "<|eos|>", "<｜end▁of▁sentence｜>",
)  # fmt: skip
"""Special tokens that are known to end a document."""
FILES = ("tokenizer.json", "tokenizer.model")
"""What a folder is searched for, in this order."""
FOLDER = "tokenizer"
"""Of a run: copies of its tokenizer's files."""


def tokenizer_of(section: Data) -> Tokenizer:
    """The tokenizer that a recipe names. Raises as `open_tokenizer`."""
    return open_tokenizer(section.tokenizer, section.separator, section.special_tokens)


def tokenizer_of_run(run: Path, section: Data) -> Tokenizer:
    """The tokenizer that the run in the folder `run` was trained with: by the run's own copy, if it has one."""
    kept = run / FOLDER
    return tokenizer_of(section.model_copy(update={"tokenizer": str(kept)}) if kept.is_dir() else section)


def open_tokenizer(name: str, separator: str | None = None, special_tokens: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names, a registered one or a path.

    Raises `UsageError` for an unknown name, and `DataError` for a file that cannot be used, or whose library is not
    installed.
    """
    require_distinct(special_tokens)
    path = Path(name) if name in TOKENIZERS else _file(expand(name))
    kind = name if name in TOKENIZERS else path.suffix.lower()
    tokenizer: Tokenizer = TOKENIZERS.get(kind)(path, separator, tuple(special_tokens))
    return tokenizer


def require_distinct(names: Sequence[str], key: str = "data.special_tokens") -> None:
    """Raise `DataError` if `key` names one twice."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{key} names '{twice[0]}' twice; take one of them out.")


def describe_separator(tokenizer: Tokenizer) -> str:
    """The separator's name, if it has one, and id."""
    name = tokenizer.name_of(tokenizer.separator)
    return f"id {tokenizer.separator}" if name is None else f"'{name}' (id {tokenizer.separator})"


def separator_warning(tokenizer: Tokenizer, chosen: str | None) -> Finding | None:
    """Where none was `chosen` as `data.separator` and the tokenizer's own ends a turn of a chat, say, not a text."""
    ends = [name for name in END_OF_TEXT if name in tokenizer.special_tokens]
    name = tokenizer.name_of(tokenizer.separator)
    if chosen is not None or name is None or name in END_OF_TEXT or not ends:
        return None
    file = list(tokenizer.files.values())[-1]
    problem = f"{file} makes '{name}' the separator of documents, and '{ends[0]}' is there too, known to end a text;"
    fix = f'write separator = "{ends[0]}", or "{name}" if it is what you want.'
    return Finding("data.separator", problem, fix, severity="warning")


UNKNOWN = "unknown"
"""Stands beside weights in place of a fingerprint where their tokenizer cannot be read here."""


def is_another(tokenizer: Tokenizer, recorded: object) -> bool:
    """Whether weights were trained with another tokenizer, by the fingerprint `recorded` beside them, if any is."""
    if recorded == UNKNOWN:
        return not tokenizer.files  # it was not the byte tokenizer, which has none
    return recorded is not None and recorded != tokenizer.fingerprint


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """2 bytes an id where they suffice by Megatron's rule, else 4; little-endian, as in the files."""
    return np.dtype("<u2" if vocab_size < _NARROW_LIMIT else "<i4")


def _file(path: Path) -> Path:
    if os.path.isdir(path):
        found = next((path / file for file in FILES if (path / file).is_file()), None)
        if found is None:
            raise UsageError(f"the folder '{path}' holds no tokenizer: neither {' nor '.join(FILES)}.")
        return found
    if not os.path.isfile(path):
        names = [entry for entry in TOKENIZERS if not entry.startswith(".")]
        hint = did_you_mean(str(path), names) or f"give {', '.join(map(repr, names))} or the path of a tokenizer."
        raise UsageError(f"there is no tokenizer '{path}' (looked for {os.path.abspath(path)}); {hint}")
    if path.suffix.lower() not in (suffixes := [entry for entry in TOKENIZERS if entry.startswith(".")]):
        raise UsageError(f"'{path}' is no tokenizer by its name; their files end in {', '.join(suffixes)}.")
    return path
