"""One source of tokens, its windows by number: texts tokenized here and now, or files of `titanlite data prepare`."""

from __future__ import annotations

import glob
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import xxhash

from titanlite.corpus.corpora import is_held_out, read_corpus
from titanlite.corpus.corpora.files import match_files
from titanlite.corpus.prepare import open_tokenized
from titanlite.corpus.token_file import HELD_OUT, Int64, TokenFile, paths_of
from titanlite.corpus.tokenizers import Ids, Tokenizer, Tokens, open_tokenizer, token_dtype
from titanlite.corpus.units import pack
from titanlite.data.packing import BestFit, Cut, Stream, pack_best_fit
from titanlite.errors import DataError
from titanlite.recipe.paths import expand
from titanlite.recipe.sections import Data, Packing


@dataclass(frozen=True)
class Texts:
    """A stream in memory."""

    tokens: Tokens
    separator: int

    @property
    def fingerprint(self) -> str:
        return xxhash.xxh3_64_hexdigest(self.tokens.data)

    def document_ends(self) -> Int64:
        return np.flatnonzero(self.tokens == self.separator) + 1


@dataclass(frozen=True)
class Source:
    """Streams, one after the other, each with windows of its own."""

    name: str
    streams: tuple[Stream, ...]
    tokenizer: Tokenizer
    sequence_length: int
    document_mask: bool  # batches carry positions and document numbers
    packing: Packing = "cut"

    @cached_property
    def _packed(self) -> list[Cut | BestFit]:
        """How each stream lies in windows."""
        length, separator = self.sequence_length, self.tokenizer.separator
        if self.packing == "cut":
            return [Cut(len(each.tokens), length) for each in self.streams]
        return [pack_best_fit(each.document_ends(), length, separator) for each in self.streams]

    @cached_property
    def _begins(self) -> list[int]:
        """The first window of each stream, and the number of all."""
        return list(accumulate((each.windows for each in self._packed), initial=0))

    @property
    def windows(self) -> int:
        return self._begins[-1]

    @property
    def tokens(self) -> int:
        return sum(len(each.tokens) for each in self.streams)

    @cached_property
    def fingerprint(self) -> str:
        """Equal where all windows are; of one stream, that stream's."""
        first, *others = (each.fingerprint for each in self.streams)
        return xxhash.xxh3_64_hexdigest(" ".join([first, *others]).encode()) if others else first

    def window(self, index: int) -> Tokens:
        """Inputs and labels of window `index`: `[sequence_length + 1]` tokens, fewer where it is to be padded."""
        stream, packed, number = self.locate(index)
        tokens = packed.window(stream.tokens, number)
        if tokens.max() >= self.tokenizer.vocab_size or (tokens.dtype.kind == "i" and tokens.min() < 0):
            raise DataError(
                f"source {self.name}, {getattr(stream, 'prefix', 'its texts')}: ids {tokens.min()} to {tokens.max()} "
                f"from token {packed.first(number):,} on, and the tokenizer's are 0 to "
                f"{self.tokenizer.vocab_size - 1:,}; the file is damaged, or of another tokenizer."
            )
        return tokens

    def locate(self, index: int) -> tuple[Stream, Cut | BestFit, int]:
        """The stream that window `index` lies in, how that is packed, and which of its windows it is."""
        at = bisect_right(self._begins, index) - 1
        return self.streams[at], self._packed[at], index - self._begins[at]

    def packing_report(self) -> str | None:
        """What best-fit packing wastes and cuts, in words."""
        packed = [each for each in self._packed if isinstance(each, BestFit)]
        if not packed:
            return None
        padding = 1 - self.tokens / (self.windows * self.sequence_length)  # each token is a label once
        cut, documents = sum(each.cut for each in packed), sum(each.documents for each in packed)
        return (
            f"source {self.name} is packed into {self.windows:,} sequences and {100 * padding:.3g} % padding; {cut:,} "
            f"of {documents:,} documents ({100 * cut / documents:.3g} %) are longer than a sequence and cut"
        )

    def beginning(self, tokens: int) -> Tokens:
        """The first `tokens` tokens, or all of fewer."""
        begins = accumulate((len(each.tokens) for each in self.streams), initial=0)
        left = (max(0, tokens - begin) for begin in begins)
        return np.concatenate([each.tokens[:most] for each, most in zip(self.streams, left, strict=False)])


def open_streams(
    paths: Sequence[str],
    key: str,
    section: Data,
    tokenizer: Tokenizer,
    *,
    hold_out: bool = True,
    texts_folder: Path | None = None,
) -> tuple[tuple[Stream, ...], tuple[Stream, ...]]:
    """The texts and token files that `paths` names (`key`: in the recipe): what is trained on, and with `hold_out` what
    is kept for validation; either may hold nothing. Raises `DataError` naming what cannot be read.

    Documents are held out by a hash of their names alone; where one side would get none (of a single text file, say),
    the last `validation_percent` of each. The held-out part of a token file is beside it, as `data prepare` made it.
    Texts that are too many for every rank's memory are tokenized into files in `texts_folder`, if one is given.
    """
    training: list[Stream] = []
    validation: list[Stream] = []
    found = [(path, find_token_files(path)) for path in paths]
    named: dict[Path, str] = {}
    for path, prefix in ((path, prefix) for path, prefixes in found for prefix in prefixes):
        file = open_token_file(prefix, section, tokenizer)
        place = file.tokens.file.path.resolve()
        if place in named:
            raise DataError(f"{prefix}: {key} names it twice, by '{named[place]}' and by '{path}'; take one out.")
        named[place] = path
        training.append(file)
        held_out = prefix.with_name(prefix.name + HELD_OUT)
        if hold_out and paths_of(held_out).idx.exists():
            held_out_file = open_token_file(held_out, section, tokenizer)
            if (file.info and file.info.made_from) != (held_out_file.info and held_out_file.info.made_from):
                raise DataError(
                    f"{held_out}: belongs to another prepare than {prefix}, so what it holds may be trained on; "
                    "prepare both again with --held-out, or delete it."
                )
            validation.append(held_out_file)
    if texts := [path for path, prefixes in found if not prefixes]:
        percent = section.validation_percent if hold_out else 0.0
        files = texts_folder and open_tokenized(texts, section, tokenizer, percent, texts_folder)
        kept, *held = files or _read(texts, key, section, tokenizer, percent)
        training.append(kept)
        validation += held
    return tuple(each for each in training if len(each.tokens)), tuple(each for each in validation if len(each.tokens))


def find_token_files(path: str) -> list[Path]:
    """Prefixes of the token files that `path` names, itself or as a glob, in order; their held-out parts left out."""
    paths = None if expand(path).name in ("", "..") else paths_of(expand(path))
    if paths and (paths.idx.exists() or paths.parts.exists()):
        return [expand(path)]
    if not glob.has_magic(path):
        return [expand(path).with_suffix("")] if path.endswith((".bin", ".idx")) else []
    pattern = str(expand(path)).removesuffix(".idx").removesuffix(".bin")
    found = sorted(Path(match).with_suffix("") for match in match_files(f"{pattern}.idx"))
    known = {str(part) for prefix in found for part in paths_of(prefix)}
    if others := [match for match in match_files(str(expand(path))) if found and match not in known]:
        raise DataError(f"{path}: matches token files, and other files such as {others[0]}; name them apart.")
    return [prefix for prefix in found if not prefix.name.endswith(HELD_OUT)]


def open_token_file(prefix: Path, section: Data, tokenizer: Tokenizer) -> TokenFile:
    """A token file, if it is of the recipe's tokenizer. Raises `DataError`."""
    file = TokenFile.open(prefix)
    made_with = file.info.tokenizer.fingerprint if file.info else tokenizer.fingerprint
    if made_with == tokenizer.fingerprint or not _with_fewer_special_tokens(made_with, section, tokenizer):
        file.require_tokenizer(section.tokenizer, tokenizer)
    return file


def _with_fewer_special_tokens(fingerprint: str, section: Data, tokenizer: Tokenizer) -> bool:
    """Whether it is of the tokenizer before the last `special_tokens` were appended: no text encodes to these."""
    for count in range(len(section.special_tokens)):
        with suppress(DataError):  # the separator is one of those to come
            fewer = open_tokenizer(section.tokenizer, section.separator, section.special_tokens[:count])
            kept = fewer.special_tokens.items() <= tokenizer.special_tokens.items()
            if kept and (fewer.separator, fewer.fingerprint) == (tokenizer.separator, fingerprint):
                return True
    return False


def _read(paths: Sequence[str], key: str, section: Data, tokenizer: Tokenizer, percent: float) -> tuple[Texts, Texts]:
    """Both sides of texts, of which `percent` are held out."""
    kept: list[Ids] = []
    held: list[Ids] = []
    for document in read_corpus(paths, section):
        try:
            ids = tokenizer.encode(document.content)
        except DataError as error:
            raise DataError(f"{document.name}: {error}") from None
        (held if is_held_out(document.name, percent) else kept).append(ids)
    if not kept and not held:
        raise DataError(f"{key} = {list(paths)!r} holds no text at all; give one with text in it.")
    if percent and not (kept and held):  # of each document, the beginning and the last `percent`
        cut = [(ids, len(ids) - round(len(ids) * percent / 100)) for ids in kept or held]
        kept, held = [ids[:end] for ids, end in cut if end], [ids[end:] for ids, end in cut if end < len(ids)]
    dtype, separator = token_dtype(tokenizer.vocab_size), tokenizer.separator
    return Texts(pack(kept, separator, dtype), separator), Texts(pack(held, separator, dtype), separator)
