"""Small tokenizers, trained here by the `tokenizers` library: what tests of tokenizers from files start from."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = Path(__file__).read_text(encoding="utf-8") + Path(__file__).with_name("pool.py").read_text(encoding="utf-8")
PATTERN = (  # Llama 3's, as Meta published it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # how SentencePiece names the tokens of single bytes


def byte_level(size: int = 400, special: tuple[str, ...] = ("<|endoftext|>",), prefix: bool = False) -> Tokenizer:
    """Byte-level BPE: the alphabet of bytes first, then merges in the order of their ids, then the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
    )
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def sentencepiece_like(size: int = 400) -> Tokenizer:
    """As Llama 2's: a space before the text, marks for spaces, and bytes for characters that it does not know."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        [line for line in TEXT.split("\n") if line.isascii()],
        trainers.BpeTrainer(vocab_size=size, special_tokens=[*special, *BYTES], show_progress=False),
    )
    fields = json.loads(tokenizer.to_str())
    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["content"] in special]
    return Tokenizer.from_str(json.dumps(fields))


def word_pieces(size: int = 200) -> Tokenizer:
    """As BERT's: lower case, words, and what goes on inside a word marked."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.train_from_iterator(
        [TEXT], trainers.WordPieceTrainer(vocab_size=size, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    )
    return tokenizer


def unigram(size: int = 200) -> Tokenizer:
    """Whose separator is also a piece that text can be cut into."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def saved(tokenizer: Tokenizer, folder: Path, **config: Any) -> Path:
    """`tokenizer.json` in `folder`, and the fields of `config` beside it if there are any."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def ranks_of(tokenizer: Tokenizer) -> bytes:
    """The rank file of a `byte_level` tokenizer."""
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    lines = [(rank, base64.b64encode(as_bytes(token))) for token, rank in vocabulary.items()]
    return b"".join(b"%s %d\n" % (token, rank) for rank, token in sorted(lines))


def as_bytes(token: str) -> bytes:
    """What the characters of a byte-level token stand for, asked of the library itself."""
    return bytes(_BYTE_OF[character] for character in token)


def _byte_of() -> dict[str, int]:
    """Characters of all bytes that UTF-8 has: those to 0x7f alone, leads and trails; others stand for themselves."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found: dict[str, int] = {}
    for number in [*range(0x800), *range(0x800, 0xD800, 0x1000), 0xE000, 0xF000, *range(0x10000, 0x110000, 0x30000)]:
        encoded = chr(number).encode()
        found.update(zip(level.pre_tokenize_str(chr(number))[0][0], encoded, strict=True))
    found.update({chr(byte): byte for byte in set(range(256)) - set(found.values())})
    assert set(found) == set(pre_tokenizers.ByteLevel.alphabet())
    return found


_BYTE_OF = _byte_of()
