"""From text to token ids and back. A tokenizer depends on its own file alone, not on a corpus or batches.

Text is bytes throughout: a corpus may hold any bytes, and bits per byte need their count. What a tokenizer's file says
is read when it is opened; the library that applies it is imported when the first text is encoded.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash

from titanlite.errors import DataError, Finding, UsageError
from titanlite.files import wrap_os_errors
from titanlite.recipe.paths import expand
from titanlite.registry import Registry, did_you_mean
from titanlite.text import list_some

if TYPE_CHECKING:
    from titanlite.recipe.sections import Data

Ids = npt.NDArray[np.integer[Any]]  # of a text, in whatever integers are cheapest for the tokenizer
Tokens = npt.NDArray[np.uint16 | np.int32]  # ids as they are kept; see `token_dtype`

_NARROW_LIMIT = 65_500  # Megatron's: vocabularies from here on are kept in 4 bytes an id

TOKENIZERS = Registry(
    "tokenizer",
    {
        "bytes": "titanlite.corpus.tokenizers:ByteTokenizer",
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
FILES = ("tokenizer.json", "tokenizer.model")  # what a folder is searched for, in this order
FOLDER = "tokenizer"  # of a run: copies of its tokenizer's files
UNKNOWN = "unknown"  # stands beside weights in place of a fingerprint where their tokenizer cannot be read here
CONFIG = "tokenizer_config.json"
MAX_FILE_BYTES = 2**28  # ten times what the largest vocabularies take
MAX_IDS = 2**24
_NOT_UTF8 = re.compile("([\udc80-\udcff]+)")  # what `surrogateescape` makes of bytes that are not UTF-8


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

    def bytes_of(self, ids: npt.ArrayLike) -> int:
        """How many bytes `ids` stand for."""
        return len(self.decode(ids))

    def export(self) -> dict[str, bytes]:
        """Names and contents of the files by which Hugging Face's transformers give the same ids; may be none."""
        return {}

    def name_of(self, special: int) -> str | None:
        """Of a special token."""
        return next((name for name, number in self.special_tokens.items() if number == special), None)


@contextmanager
def wrap_library_errors(path: Path, library: str) -> Iterator[None]:
    """Raise as `DataError` what a library raises; a panic of one in Rust is no `Exception`."""
    try:
        yield
    except BaseException as error:
        is_own = isinstance(error, DataError | MemoryError) or not isinstance(error, Exception)
        if is_own and type(error).__name__ != "PanicException":
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


class PieceTokenizer(Tokenizer):
    """A vocabulary of pieces, and a library's way of cutting text into them."""

    library: str
    unknown: str | None = None  # the special token that stands for text without any other
    takes_any_bytes: bool  # whether what is not UTF-8 can be encoded too, byte by byte

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
            fix = "choose one that is no word of its vocabulary as data.separator, or in data.special_tokens."
            raise DataError(f"{self.path} turns text that reads '{name}' into the special token of that name; {fix}")
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
            raise DataError(f"not UTF-8: {where}, and {self.path} takes nothing else; convert it or leave it out.")
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
    fix = " Mend its permissions or data.tokenizer."
    with wrap_os_errors(f"cannot read {path}", path, fix, DataError), open(path, "rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES or not content.strip():
        problem = f"has over {MAX_FILE_BYTES:,} bytes" if content.strip() else "is empty"
        raise DataError(f"{path} {problem}; give a tokenizer's file.")
    return content


def config_json(fields: Mapping[str, Any], separator: str | None) -> bytes:
    """`tokenizer_config.json` for transformers: its own fields, and the separator as the token that ends a text."""
    defaults = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return json.dumps({**defaults, **fields, "eos_token": separator}, indent=2).encode() + b"\n"


def _choose_separator(path: Path, special: Mapping[str, int], wanted: str | None, declared: str | None) -> str:
    """What the recipe wants, what the file declares to end a text, or the one special token that is known to."""
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
    several = f"several special tokens that may end a document: {', '.join(map(repr, known))}"
    found = several if known else f"no special token that is known to end a document; it has {listed}"
    raise DataError(f"{path} has {found}. Name the one to put between documents as data.separator.")


def tokenizer_of(section: Data) -> Tokenizer:
    """The tokenizer that a recipe names. Raises as `open_tokenizer`."""
    return open_tokenizer(section.tokenizer, section.separator, section.special_tokens)


def tokenizer_of_run(run: Path, section: Data) -> Tokenizer:
    """The tokenizer that the run in the folder `run` was trained with: by the run's own copy, if it has one."""
    kept = run / FOLDER
    return tokenizer_of(section.model_copy(update={"tokenizer": str(kept)}) if kept.is_dir() else section)


def open_tokenizer(name: str, separator: str | None = None, special_tokens: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names, a registered one or a path. Raises `UsageError` for an unknown name,
    and `DataError` for a file that cannot be used.
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
        if found := [path / file for file in FILES if (path / file).is_file()]:
            return found[0]
        raise UsageError(f"the folder '{path}' holds no tokenizer: neither {' nor '.join(FILES)}.")
    if not os.path.isfile(path):
        names = [entry for entry in TOKENIZERS if not entry.startswith(".")]
        hint = did_you_mean(str(path), names) or f"give {', '.join(map(repr, names))} or the path of a tokenizer."
        raise UsageError(f"there is no tokenizer '{path}' (looked for {os.path.abspath(path)}); {hint}")
    if path.suffix.lower() not in (suffixes := [entry for entry in TOKENIZERS if entry.startswith(".")]):
        raise UsageError(f"'{path}' is no tokenizer by its name; their files end in {', '.join(suffixes)}.")
    return path
