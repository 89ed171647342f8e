"""Byte-level BPE in its two notations: merges of characters (Hugging Face's JSON) and ranks of bytes (tiktoken's).

The two apply them differently: `tokenizers` merges the pairs that are listed, `tiktoken` any two neighbours that are a
token together, several times as fast. `ranks_of_json` decides whether the ids are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""Words, numbers of up to three digits, signs and white space apart: Llama 3's, of GPT-4's family."""
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What `ByteLevel` cuts by if no pattern is given. Both libraries cut by these two alike; by others they may not."""
_SHORT = 2**18
"""Characters that are too few for that: on longer ones, the faster of tiktoken's functions would break down."""
_OTHERWISE = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
"""Settings of a BPE that ranks cannot express."""


def rank_engine(name: str, ranks: Mapping[bytes, int], pattern: str) -> Any:
    """tiktoken's `Encoding`, with no special tokens; the pattern is one of the two here."""
    from tiktoken import Encoding

    return Encoding(name, pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens={})


def ranks_in(engine: Any, text: str) -> npt.NDArray[np.integer[Any]]:
    """The ranks of a text. Raises `ValueError` for one with a million spaces: the regular expressions give up."""
    if len(text) < _SHORT:
        return np.array(engine.encode_ordinary(text), np.int32)
    ranks: npt.NDArray[np.uint32] = engine.encode_to_numpy(text, disallowed_special=())
    return ranks


def byte_level_tokenizer(model: Any, special: Iterable[str] = ()) -> Any:
    """The `tokenizers` library's tokenizer of a BPE `model` of bytes, which cuts by `LLAMA3_PATTERN`."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def json_of_ranks(ranks: Mapping[bytes, int], special: Iterable[str]) -> str:
    """The JSON of ranks that are cut by `LLAMA3_PATTERN`, and special tokens that follow them."""
    from tokenizers import models

    merges = [  # pairs of tokens that are a token together, by its rank
        (characters_of_bytes(token[:cut]), characters_of_bytes(token[cut:]))
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocabulary = {characters_of_bytes(token): rank for token, rank in ranks.items()}
    model = models.BPE(vocabulary, merges, ignore_merges=True)  # a cut piece that is a token needs no merges
    return str(byte_level_tokenizer(model, special).to_str(pretty=True))


@dataclass(frozen=True)
class Ranked:
    """A JSON's tokens as tiktoken wants them."""

    ranks: Mapping[bytes, int]
    ids: tuple[int, ...]
    """Of the tokens, by rank."""
    pattern: str


def ranks_of_json(fields: Mapping[str, Any], special: Iterable[str]) -> Ranked | None:
    """Ranks and the pattern by which tiktoken cuts every text as `tokenizers` does by these fields, or None.

    Certain if each token's parts have lower ranks than it, and merges of lower ranks turn the token's own bytes into
    one of its listed pairs. For then, whatever stands around them, neighbours that tiktoken would merge to a token have
    come to be as they would from the token's bytes alone: they are that pair, and `tokenizers` merges it too.
    """
    model = fields["model"]
    others = any(not token["special"] for token in fields.get("added_tokens") or [])
    if model.get("type") != "BPE" or any(map(model.get, _OTHERWISE)) or others or fields.get("normalizer") is not None:
        return None
    try:
        pattern = _pattern(fields.get("pre_tokenizer"))
        ids = {bytes_of_characters(token): model["vocab"][token] for token in model["vocab"].keys() - set(special)}
        merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        pairs = [tuple(map(bytes_of_characters, merge)) for merge in merges]
    except (AttributeError, KeyError, TypeError, ValueError):  # the library will say what is wrong
        return None
    if pattern is None:
        return None
    ranks = {bytes([byte]): byte for byte in range(256)}
    for pair in pairs:
        token = b"".join(pair)
        if not all(part in ranks for part in pair) or ranks.get(token, len(ranks) - 1) != len(ranks) - 1:
            return None
        ranks.setdefault(token, len(ranks))
    listed = set(pairs)
    if ids.keys() != ranks.keys() or not all(_merge_below(token, ranks) in listed for token in ranks if len(token) > 1):
        return None
    return Ranked(ranks, tuple(ids[token] for token in ranks), pattern)


def _pattern(step: Any) -> str | None:
    """What a pre-tokenizer cuts by, if it is a pattern and then bytes as characters."""
    *cuts, level = step.get("pretokenizers", [step])
    if level["type"] != "ByteLevel" or level.get("add_prefix_space", True) or len(cuts) > 1:
        return None
    if not cuts:
        return GPT2_PATTERN if level.get("use_regex", True) else None
    cut = cuts[0]
    if (cut["type"], cut["behavior"], cut["invert"], level.get("use_regex", True)) != (
        "Split",
        "Isolated",
        False,
        False,
    ):
        return None
    regex = cut["pattern"].get("Regex")
    return regex if regex in (LLAMA3_PATTERN, GPT2_PATTERN) else None


def _merge_below(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, ...]:
    """The token's bytes, merged as far as ranks lower than its own go."""
    limit, parts = ranks[token], [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 2:
        found = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        lowest = min(found)
        if lowest >= limit:
            break
        place = found.index(lowest)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return tuple(parts)


# GPT-2's characters for bytes: each byte that can be printed is itself, the others are characters from 256 on.
_PRINTED = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
_CHARACTERS = {byte: chr(byte) for byte in _PRINTED} | {byte: chr(256 + n) for n, byte in enumerate(_OTHERS)}
_BYTES = {character: byte for byte, character in _CHARACTERS.items()}


def bytes_of_characters(token: str) -> bytes:
    """Raises `KeyError` for a character that stands for no byte."""
    return bytes(map(_BYTES.__getitem__, token))


def characters_of_bytes(token: bytes) -> str:
    return "".join(map(_CHARACTERS.__getitem__, token))
