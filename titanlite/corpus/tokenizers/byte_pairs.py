"""Byte-level BPE in its two notations: merges of characters (Hugging Face's JSON) and ranks of bytes (tiktoken's).

The two apply them differently: `tokenizers` merges the pairs that are listed, `tiktoken` any two neighbours that are a
token together, several times as fast. `ranks_of_json` finds out whether that comes to the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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

Fields = Mapping[str, Any]


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


# --- ranks to JSON


def byte_level_json(ranks: Mapping[bytes, int], special: Mapping[str, int]) -> dict[str, Any]:
    """The JSON of ranks that are cut by `LLAMA3_PATTERN`, and special tokens."""
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}
    to_characters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": name, **flags} for name, number in special.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_characters]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # a cut piece that is a token needs no merges
            "vocab": {characters_of_bytes(token): number for token, number in ranks.items()},
            "merges": [" ".join(map(characters_of_bytes, pair)) for pair in _all_merges(ranks)],
        },
    }


def _all_merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Pairs of tokens that are a token together, by its rank."""
    for token in sorted(ranks, key=ranks.__getitem__):
        for cut in range(1, len(token)):
            if token[:cut] in ranks and token[cut:] in ranks:
                yield token[:cut], token[cut:]


# --- JSON to ranks


@dataclass(frozen=True)
class Ranked:
    """A JSON's tokens as tiktoken wants them."""

    ranks: Mapping[bytes, int]
    ids: tuple[int, ...]
    """Of the tokens, by rank."""
    pattern: str


def ranks_of_json(fields: Fields, special: Iterable[str]) -> Ranked | None:
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
        pairs = [tuple(map(bytes_of_characters, _pair(merge))) for merge in model["merges"]]
    except (AttributeError, KeyError, TypeError):  # the library will say what is wrong
        return None
    if pattern is None:
        return None
    ranks = {bytes([byte]): byte for byte in range(256)}
    listed: set[tuple[bytes, ...]] = set()
    for pair in pairs:
        token = b"".join(pair)
        if not all(part in ranks for part in pair) or ranks.get(token, len(ranks) - 1) != len(ranks) - 1:
            return None
        ranks.setdefault(token, len(ranks))
        listed.add(pair)
    if ids.keys() != ranks.keys() or not all(_parts(token, ranks) in listed for token in ranks if len(token) > 1):
        return None
    return Ranked(ranks, tuple(ids[token] for token in ranks), pattern)


def _pattern(step: Any) -> str | None:
    """What a pre-tokenizer cuts by, if it is a pattern and then bytes as characters."""
    parts = step.get("pretokenizers", [step]) if isinstance(step, dict) else []
    *cuts, level = parts or [{}]
    if level.get("type") != "ByteLevel" or level.get("add_prefix_space", True):
        return None
    if not cuts:
        return GPT2_PATTERN if level.get("use_regex", True) else None
    (cut, *more), regex = cuts, cuts[0].get("pattern")
    told = (cut.get("type"), cut.get("behavior"), cut.get("invert"), level.get("use_regex", True), more)
    if told != ("Split", "Isolated", False, False, []) or not isinstance(regex, dict):
        return None
    return next((pattern for pattern in (LLAMA3_PATTERN, GPT2_PATTERN) if pattern == regex.get("Regex")), None)


def _pair(merge: str | Sequence[str]) -> Sequence[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _parts(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, ...]:
    """The token's bytes, merged as far as lower ranks go."""
    limit, parts = ranks[token], [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 2:
        found = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        lowest = min(found)
        if lowest >= limit:
            break
        place = found.index(lowest)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return tuple(parts)


# --- GPT-2's characters for bytes


def _byte_characters() -> dict[int, str]:
    """A character that can be printed for each byte: itself where it can, else one from 256 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {**{byte: chr(byte) for byte in printed}, **{byte: chr(256 + n) for n, byte in enumerate(others)}}


_CHARACTERS = _byte_characters()
_BYTES = {character: byte for byte, character in _CHARACTERS.items()}


def bytes_of_characters(token: str) -> bytes:
    """Raises `KeyError` for a character that stands for no byte."""
    return bytes(map(_BYTES.__getitem__, token))


def characters_of_bytes(token: bytes) -> str:
    return "".join(map(_CHARACTERS.__getitem__, token))
