"""Tokenizers of Hugging Face's `tokenizers` library: one JSON file that says how text is cut. Its truncation, padding
and templates (begin-of-text and the like) are not applied: a corpus is ids of its text and separators, nothing else.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from titanlite.corpus.tokenizers import CONFIG, Ids, PieceTokenizer, config_json, read_file, wrap_library_errors
from titanlite.corpus.tokenizers.byte_pairs import bytes_of_characters, rank_engine, ranks_in, ranks_of_json
from titanlite.errors import DataError

# The unknown token of a BPE that has none: as no vocabulary has it, the library raises instead of dropping text.
_NO_TOKEN = "titanlite: no token for unknown text"
_MAX_GROWTH = 1000  # times that normalizer, cuts or decoder may make a text longer; known ones stay under 30

Fields = Mapping[str, Any]


class HuggingFaceTokenizer(PieceTokenizer):
    """What a `tokenizer.json` says; `special` are special tokens beside its own, after its last id."""

    library = "tokenizers"

    def __init__(self, path: Path, separator: str | None = None, special: Sequence[str] = ()) -> None:
        content = self._content = read_file(path)
        fields = _read_object(path, content)
        vocabulary, added = _vocabulary(path, fields), _added_tokens(path, fields)
        _require_little_growth(path, fields)
        model = fields["model"]
        if model.get("dropout"):  # by which a text has other ids at each call
            model["dropout"] = None
            self._content = json.dumps(fields).encode()
        self._added = frozenset(added)
        own = [name for name, (_, is_special) in added.items() if is_special]
        self._special = tuple(name for name in special if name not in own)
        ids, following = dict(vocabulary), len(vocabulary)  # from there the library counts on, holes or not
        for name in (*added, *self._special):
            number = ids.setdefault(name, following)
            if name in added and added[name][0] != number:
                given = f"id {added[name][0]} by the file, and is {number}"
                raise DataError(f"{path}: the added token '{name}' has {given}.")
            following = max(following, number + 1)
        config = path.with_name(CONFIG)
        self._config = _read_object(config, read_file(config)) if config.is_file() else {}
        declared = self._config.get("eos_token")
        declared = declared.get("content") if isinstance(declared, dict) else declared
        names, size = {name: ids[name] for name in (*own, *self._special)}, max([-1, *ids.values()]) + 1
        super().__init__(path, content, names, size, separator, declared if isinstance(declared, str) else None)
        self.unknown = model.get("unk_token")
        if isinstance(model["vocab"], list):  # Unigram's
            self.unknown = next((name for name, number in vocabulary.items() if number == model.get("unk_id")), None)
        self.files = {"tokenizer.json": path, **({CONFIG: config} if self._config else {})}
        decoders = [step.get("type") for step in _steps(fields, "decoder")]
        self._is_byte_level, self._falls_back_to_bytes = "ByteLevel" in decoders, "ByteFallback" in decoders
        self._lost_blank = _lost_blank(fields, vocabulary) if self._falls_back_to_bytes else None
        cuts = [step for step in _steps(fields, "pre_tokenizer") if step.get("type") == "ByteLevel"]
        self.takes_any_bytes = self._is_byte_level and not any(step.get("add_prefix_space", True) for step in cuts)

    def encode_strings(self, texts: Sequence[str]) -> list[Ids]:
        if self._fast is not None:
            engine, ids = self._fast
            with suppress(ValueError):
                return [ids[ranks_in(engine, text)] for text in texts]
        try:
            encodings = self._engine.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:
            if _NO_TOKEN not in str(error):
                raise
            problem = "has no token for some of this text, and none for unknown text (unk_token), so it would be lost"
            fix = "take one with all 256 bytes, as titanlite data train-tokenizer makes, or leave the text out."
            raise DataError(f"{self.path} {problem}; {fix}") from error
        return [np.array(encoding.ids, self.dtype) for encoding in encodings]

    def decode(self, ids: npt.ArrayLike) -> bytes:
        text = super().decode(ids)
        return text.replace(self._lost_blank, b" ") if self._lost_blank else text

    def bytes_of(self, ids: npt.ArrayLike) -> int:
        return len(self.decode(ids)) if self._lost_blank else super().bytes_of(ids)

    def piece_table(self) -> Mapping[int, bytes]:
        vocabulary: dict[str, int] = self._engine.get_vocab(with_added_tokens=True)
        if not self._is_byte_level:
            return self._decode_each(vocabulary)
        table = {number: token.encode() for token, number in vocabulary.items()}
        for token in vocabulary.keys() - self._added:
            with suppress(KeyError):  # as the library has it, a token with other characters stands for itself
                table[vocabulary[token]] = bytes_of_characters(token)
        return table

    def export(self) -> dict[str, bytes]:
        content = self._load_engine().to_str(pretty=True).encode() if self._special else self._content
        return {"tokenizer.json": content, CONFIG: config_json(self._config, self.name_of(self.separator))}

    @cached_property
    def _fast(self) -> tuple[Any, Ids] | None:
        """tiktoken and the ids of its ranks, if it certainly cuts all texts alike."""
        if found := ranks_of_json(json.loads(self._content), self.special_tokens):
            ranks, ids, pattern = found
            return rank_engine(str(self.path), ranks, pattern), np.array(ids, self.dtype)
        return None

    @cached_property
    def _engine(self) -> Any:
        engine = self._load_engine()
        if getattr(engine.model, "unk_token", "") is None:
            engine.model.unk_token = _NO_TOKEN
        return engine

    def _load_engine(self) -> Any:
        # One thread a process: ranks and workers share the machine, and threads would not live through a fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from tokenizers import Tokenizer

        with wrap_library_errors(self.path, self.library):
            engine = Tokenizer.from_str(self._content.decode())
            engine.add_special_tokens(list(self._special))
            engine.encode_special_tokens = True  # as text, that is: their names in a corpus are no special tokens
            engine.no_truncation()
            engine.no_padding()
        return engine

    def _decode_each(self, vocabulary: Mapping[str, int]) -> dict[int, bytes]:
        """What each id adds to the text after another one: at its beginning, decoders drop what parts words."""
        anchor = next((number for token, number in vocabulary.items() if token in ("a", "e", "1")), None)
        before = [] if anchor is None else [anchor]
        numbers = list(vocabulary.values())
        start = self._engine.decode(before, skip_special_tokens=False)
        texts = self._engine.decode_batch([[*before, number] for number in numbers], skip_special_tokens=False)
        table = {number: text.removeprefix(start).encode() for number, text in zip(numbers, texts, strict=True)}
        if self._falls_back_to_bytes:  # one alone decodes to a replacement character
            names = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
            table |= {vocabulary[name]: content for name, content in names.items() if name in vocabulary}
        return table


def _read_object(path: Path, content: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}).") from None
    if not isinstance(fields, dict):
        raise DataError(f"{path} is not a JSON object.")
    return fields


def _vocabulary(path: Path, fields: Fields) -> dict[str, int]:
    model = fields.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict) and all(type(number) is int and number >= 0 for number in vocabulary.values()):
        return vocabulary
    if isinstance(vocabulary, list) and all(isinstance(item, list) and item for item in vocabulary):  # Unigram's
        return {str(item[0]): number for number, item in enumerate(vocabulary)}
    raise DataError(f"{path} is not a tokenizer of the library 'tokenizers': it has no model with a vocab.")


def _added_tokens(path: Path, fields: Fields) -> dict[str, tuple[int, bool]]:
    """id and whether it is special, by name."""
    with suppress(TypeError, KeyError):
        found = {token["content"]: (token["id"], token["special"]) for token in fields.get("added_tokens") or []}
        if all(type(name) is str and type(number) is int and number >= 0 for name, (number, _) in found.items()):
            return found
    raise DataError(f"{path}: added_tokens is not a list of tokens with content, id and special.")


def _steps(fields: Fields, name: str) -> Iterator[Fields]:
    """The normalizer, pre-tokenizer or decoder, and the parts of sequences of them."""
    steps = [fields.get(name)]
    for step in steps:  # which become more on the way
        if isinstance(step, dict):
            yield step
            parts = step.get(f"{name}s", step.get(f"{name.replace('_', '')}s"))
            steps += parts if isinstance(parts, list) else []


def _require_little_growth(path: Path, fields: Fields) -> None:
    """Of steps that together make a text too long, the library's want of memory would end the process."""
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        growth = prod(max(1.0, _growth(step)) for step in _steps(fields, name))
        if growth > _MAX_GROWTH:
            raise DataError(f"{path}: its {name} may make a text {growth:,.0f} times as long; mend or replace it.")


def _growth(step: Fields) -> float:
    """Times that a step may make a text longer."""
    pattern, content = step.get("pattern"), step.get("content")
    if isinstance(pattern, dict) and isinstance(content, str):  # replace; a regex may match what is empty
        least = pattern.get("String")
        return len(content) / len(least) if isinstance(least, str) and least else 1.0 + len(content)
    if step.get("type") == "Precompiled":  # SentencePiece's map of characters, and after it what they become
        charsmap: Any = step.get("precompiled_charsmap")
        with suppress(TypeError, ValueError):  # the library will say what is wrong
            table = base64.b64decode(charsmap)
            return float(max(map(len, table[4 + int.from_bytes(table[:4], "little") :].split(b"\0"))))
    return 2.0 if step.get("type") == "ByteLevel" else 1.0


def _lost_blank(fields: Fields, vocabulary: Mapping[str, int]) -> bytes | None:
    """What the tokenizer puts for a blank, if the vocabulary lacks it and it becomes the tokens of its bytes."""
    for step in _steps(fields, "decoder"):
        pattern = step.get("pattern")
        mark = pattern.get("String") if isinstance(pattern, dict) and step.get("content") == " " else None
        mark = step.get("replacement") if step.get("type") == "Metaspace" else mark
        if isinstance(mark, str) and mark and mark not in vocabulary:
            return mark.encode()
    return None
