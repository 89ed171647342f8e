"""Byte-level BPE in two notations: merges of characters (Hugging Face's JSON) and ranks of bytes (tiktoken's).

A rank file, as Llama 3's `tokenizer.model`, has a token in base64 and its rank on each line; special tokens follow.
`tokenizers` merges the pairs that a JSON lists, `tiktoken` any two neighbours that are a token together, several times
as fast; `ranks_of_json` decides whether the ids are the same.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from titanlite.corpus.tokenizers import CONFIG, Ids, PieceTokenizer, config_json, read_file
from titanlite.errors import DataError

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""Words, numbers of up to three digits, signs and white space apart: Llama 3's, of GPT-4's family."""
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What `ByteLevel` cuts by if no pattern is given. Both libraries cut by these two alike; by others they may not."""
_SHORT = 2**18  # characters; on more, the faster of tiktoken's functions may break down
_OTHERWISE = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
"""Settings of a BPE that ranks cannot express."""
LLAMA3_SPECIAL_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>",
    *(f"<|reserved_special_token_{number}|>" for number in range(4)),
    "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>",
    *(f"<|reserved_special_token_{number}|>" for number in range(5, 251)),
)  # fmt: skip
"""Of Meta's release of April 2024; later ones give some of the reserved ones a meaning, and none another id."""
_LONGEST_RUN = 25_000  # of characters that are white space, or are not; as in Meta's release
_RUNS = re.compile(r"\s+|\S+")


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


def ranks_of_json(fields: Mapping[str, Any], special: Iterable[str]) -> tuple[dict[bytes, int], list[int], str] | None:
    """Ranks, the ids of each and the pattern by which tiktoken cuts every text as `tokenizers` does by these fields.

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
    return ranks, [ids[token] for token in ranks], pattern


def _pattern(step: Any) -> str | None:
    """What a pre-tokenizer cuts by, if it is a pattern and then bytes as characters."""
    *cuts, level = step.get("pretokenizers", [step])
    if level["type"] != "ByteLevel" or level.get("add_prefix_space", True) or len(cuts) > 1:
        return None
    if not cuts:
        return GPT2_PATTERN if level.get("use_regex", True) else None
    cut = cuts[0]
    is_plain = cut["type"] == "Split" and cut["behavior"] == "Isolated" and cut["invert"] is False
    regex = cut["pattern"].get("Regex")
    known = is_plain and level.get("use_regex", True) is False and regex in (LLAMA3_PATTERN, GPT2_PATTERN)
    return regex if known else None


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
_BYTES = {chr(byte): byte for byte in _PRINTED}
_BYTES |= {chr(256 + number): byte for number, byte in enumerate(sorted({*range(256)} - {*_PRINTED}))}
_CHARACTERS = {byte: character for character, byte in _BYTES.items()}


def bytes_of_characters(token: str) -> bytes:
    """Raises `KeyError` for a character that stands for no byte."""
    return bytes(map(_BYTES.__getitem__, token))


def characters_of_bytes(token: bytes) -> str:
    return "".join(map(_CHARACTERS.__getitem__, token))


class RankTokenizer(PieceTokenizer):
    """Ranks, cut by Llama 3's pattern; `special` are its special tokens if there are any, and else Llama 3's."""

    library = "tiktoken"
    takes_any_bytes = True

    def __init__(self, path: Path, separator: str | None = None, special: Sequence[str] = ()) -> None:
        content = read_file(path)
        self.ranks = _read_ranks(path, content)
        ids = {name: number for number, name in enumerate(special or LLAMA3_SPECIAL_TOKENS, len(self.ranks))}
        super().__init__(path, content, ids, len(self.ranks) + len(ids), separator)
        self.files = {"tokenizer.model": path}

    def piece_table(self) -> Mapping[int, bytes]:
        return {rank: token for token, rank in self.ranks.items()}

    def export(self) -> dict[str, bytes]:
        content = json_of_ranks(self.ranks, self.special_tokens).encode()
        return {"tokenizer.json": content, CONFIG: config_json({}, self.name_of(self.separator))}

    def encode_strings(self, texts: Sequence[str]) -> list[Ids]:
        found: list[Ids] = []
        for text in texts:
            try:
                ids = ranks_in(self._engine, text)
            except ValueError:
                ids = np.concatenate([ranks_in(self._engine, part) for part in _cut_runs(text)])
            found.append(ids.astype(self.dtype))
        return found

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
            token, value = base64.b64decode(encoded, validate=True), int(rank)
        except ValueError:
            hint = "a SentencePiece model has the same name and is none: have transformers save it as tokenizer.json"
            what = "a rank file's lines are a token in base64, a space and its rank"
            raise DataError(f"{path}:{number}: {what} ({hint}).") from None
        if token in ranks or not token:
            raise DataError(f"{path}:{number}: the token {encoded.decode()} is {'there twice' if token else 'empty'}.")
        ranks[token] = value
    placed = dict(sorted(ranks.items(), key=lambda item: item[1]))
    for expected, found in enumerate(placed.values()):
        if found != expected:
            which = f"rank {expected} is missing" if found > expected else f"rank {found} is there twice"
            raise DataError(f"{path}: {which}, or its token is; the file is cut or mixed up: fetch it again.")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise DataError(f"{path}: the byte {missing[0]:#04x} has no rank, and so not every text has ids.")
    return placed


def _cut_runs(text: str) -> Iterator[str]:
    """The text in parts, no run of characters longer than what the pattern can take."""
    begin = 0
    for run in _RUNS.finditer(text):
        for cut in range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN):
            yield text[begin:cut]
            begin = cut
    yield text[begin:]
