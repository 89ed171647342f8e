"""The byte tokenizer, and what those from files have in common: pieces of text, special tokens, a separator.

Each id stands for the same bytes wherever it is, so bytes are counted by a table, and a text can be decoded id by id.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from titanlite.corpus.tokenizers import END_OF_TEXT, Ids, Tokenizer, token_dtype
from titanlite.errors import DataError
from titanlite.registry import did_you_mean
from titanlite.text import list_some

CONFIG = "tokenizer_config.json"
MAX_FILE_BYTES = 2**28  # Ten times what the largest vocabularies take
MAX_IDS = 2**24
_NOT_UTF8 = re.compile("([\udc80-\udcff]+)")  # What `surrogateescape` makes of bytes that are not UTF-8


@contextmanager
def wrap_library_errors(path: Path, library: str) -> Iterator[None]:
    """Raise as `DataError` what a library raises; a panic of one in Rust is no `Exception`."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{path} cannot be used by the library '{library}': {error}.") from error


class ByteTokenizer(Tokenizer):
    """The 256 byte values as they are, 256 between documents, and the special tokens from 257 on."""

    separator = 256

    def __init__(self, name: Path | None = None, separator: str | None = None, special: Sequence[str] = ()) -> None:
        if separator is not None:
            raise DataError("data.separator: the byte tokenizer's separator is 256 and has no name; leave it out.")
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


class PieceTokenizer(Tokenizer):
    """A vocabulary of pieces, and a library's way of cutting text into them."""

    library: str
    unknown: str | None = None  # The special token that stands for text without any other
    takes_any_bytes: bool  # Whether what is not UTF-8 can be encoded too, byte by byte

    def __init__(
        self, path: Path, content: bytes, special: Mapping[str, int], vocab_size: int,
        separator: str | None, declared: str | None = None,
    ) -> None:  # fmt: skip
        """The separator is what the recipe wants, or else what the file declares to end a text."""
        if vocab_size > MAX_IDS:
            raise DataError(f"{path} has ids up to {vocab_size - 1:,}, and no vocabulary is so large.")
        self.path, self.special_tokens, self.vocab_size = path, dict(special), vocab_size
        self.separator = special[_choose_separator(path, special, separator, declared)]
        self.fingerprint = fingerprint_of(type(self).__name__, content, special, self.separator)
        self.dtype = token_dtype(vocab_size)

    @abstractmethod
    def encode_strings(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text in the tokenizer's `dtype`; special tokens' names in it are text like any other."""

    @abstractmethod
    def piece_table(self) -> Mapping[int, bytes]:
        """What ids stand for; those that are missing, and special tokens, stand for nothing."""

    @cached_property
    def pieces(self) -> tuple[bytes, ...]:
        """What each id stands for, [vocab_size]."""
        with wrap_library_errors(self.path, self.library):
            table, special = self.piece_table(), set(self.special_tokens.values())
        return tuple(b"" if number in special else table.get(number, b"") for number in range(self.vocab_size))

    def encode_batch(self, texts: Sequence[bytes]) -> list[Ids]:
        with wrap_library_errors(self.path, self.library):
            try:
                found = self.encode_strings([text.decode() for text in texts])
            except UnicodeDecodeError:
                found = [self._encode_any_bytes(text) for text in texts]
            special = [ids[self._never_text[ids]] for ids in found]
        if name := next((self.name_of(ids[0]) for ids in special if len(ids)), None):
            raise DataError(
                f"{self.path} turns text that reads '{name}' into the special token of that name; choose one that "
                "is not also a word of its vocabulary as data.separator, or in data.special_tokens."
            )
        return found

    def decode(self, ids: npt.ArrayLike) -> bytes:
        return b"".join(map(self.pieces.__getitem__, flat_ids(ids, self.vocab_size).tolist()))

    def bytes_of(self, ids: npt.ArrayLike) -> int:
        return int(self._lengths[flat_ids(ids, self.vocab_size)].sum())

    @cached_property
    def _lengths(self) -> npt.NDArray[np.int64]:
        return np.fromiter(map(len, self.pieces), np.int64, self.vocab_size)

    @cached_property
    def _byte_ids(self) -> dict[int, int]:
        """Ids that stand for one byte that is no character by itself."""
        return {piece[0]: number for number, piece in enumerate(self.pieces) if len(piece) == 1 and piece[0] >= 0x80}

    @cached_property
    def _never_text(self) -> npt.NDArray[np.bool_]:
        never = np.zeros(self.vocab_size, np.bool_)
        never[[number for name, number in self.special_tokens.items() if name != self.unknown]] = True
        return never

    def _encode_any_bytes(self, text: bytes) -> Ids:
        """The parts that are UTF-8 as texts of their own, each byte between them as its own id."""
        parts = split_utf8(text)
        if len(parts) > 1 and not self.takes_any_bytes:
            where = f"byte {ord(parts[1][0]) - 0xDC00:#04x} at position {len(parts[0].encode()) + 1} of the text"
            raise DataError(
                f"not UTF-8: {where}, and {self.path} takes nothing else; convert the text, or leave it out."
            )
        found: list[Ids] = [np.empty(0, self.dtype)] * len(parts)
        found[::2] = self.encode_strings(parts[::2])
        for number, part in enumerate(parts[1::2]):
            data = part.encode("utf-8", "surrogateescape")
            if missing := set(data) - self._byte_ids.keys():
                what = f"the byte {min(missing):#04x}, which is in the text and not UTF-8 there"
                raise DataError(f"{self.path} has no token for {what}; convert the text to UTF-8.")
            found[2 * number + 1] = np.array([self._byte_ids[byte] for byte in data], self.dtype)
        return np.concatenate(found)


def split_utf8(text: bytes) -> list[str]:
    """What is UTF-8 in `text`, perhaps empty, and what is not (as `surrogateescape` has it), in turns."""
    return _NOT_UTF8.split(text.decode("utf-8", "surrogateescape"))


def flat_ids(ids: npt.ArrayLike, vocab_size: int) -> npt.NDArray[np.int64]:
    """`ids` as a flat array. Raises `ValueError` for one outside the vocabulary."""
    flat = np.asarray(ids, dtype=np.int64).reshape(-1)
    if flat.size and (flat.min() < 0 or flat.max() >= vocab_size):
        raise ValueError(f"ids must be in [0, {vocab_size}), found {flat.min()} to {flat.max()}")
    return flat


def fingerprint_of(kind: str, content: bytes, special: Mapping[str, int], separator: int) -> str:
    """Hash of all that decides a tokenizer's ids."""
    parts = [kind, xxhash.xxh3_128_hexdigest(content), sorted(special.items()), separator]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())


def read_file(path: Path) -> bytes:
    """The whole of a tokenizer's file. Raises `DataError` if it cannot be read, is empty or far too large."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); mend its permissions or data.tokenizer.") from error
    if len(content) > MAX_FILE_BYTES:
        raise DataError(f"{path} has over {MAX_FILE_BYTES:,} bytes, too many for a tokenizer; mend data.tokenizer.")
    if not content.strip():
        raise DataError(f"{path} is empty; give a tokenizer's file.")
    return content


def config_json(fields: Mapping[str, Any], separator: str | None) -> bytes:
    """`tokenizer_config.json` for transformers: its own fields, and the separator as the token that ends a text."""
    defaults = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return json.dumps({**defaults, **fields, "eos_token": separator}, indent=2).encode() + b"\n"


def _choose_separator(path: Path, special: Mapping[str, int], wanted: str | None, declared: str | None) -> str:
    """What stands between documents: the special token that the recipe wants, the one that the file declares to end a
    text, or the one that is known to. Raises `DataError` if there is none or more than one.
    """
    listed = list_some([*map(repr, special)], 12) or "none"
    if (name := declared if wanted is None else wanted) is not None:
        if name not in special:
            key = "eos_token of tokenizer_config.json beside it" if wanted is None else "data.separator"
            hint = did_you_mean(name, list(special)) or f"it has {listed}."
            raise DataError(f"{path} has no special token '{name}' ({key}); {hint}")
        return name
    known = [name for name in END_OF_TEXT if name in special]
    if len(known) == 1:
        return known[0]
    found = f"several special tokens that may end a document: {', '.join(map(repr, known))}"
    found = found if known else f"no special token that is known to end a document; it has {listed}"
    raise DataError(f"{path} has {found}. Name the one to put between documents as data.separator.")
