"""Tokenizers from files against the libraries' own answers, and against each other."""

from __future__ import annotations

import base64
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import bpe
from tokenizers import Tokenizer as Library
from tokenizers import models

from titanlite.corpus.prepare import find_inputs, prepare
from titanlite.corpus.token_file import TokenizerInfo
from titanlite.corpus.tokenizers import Tokenizer, describe_separator, open_tokenizer, separator_warning, token_dtype
from titanlite.corpus.tokenizers.byte_pairs import GPT2_PATTERN, LLAMA3_PATTERN, json_of_ranks, rank_engine
from titanlite.corpus.units import Request
from titanlite.data.sources import open_streams
from titanlite.errors import DataError, UsageError
from titanlite.recipe.sections import Data

pytestmark = pytest.mark.quick

LONG_RUN = "x" + " " * 60_000 + "y" + "." * 30_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tokenizer a folder: `level` and `ranks` (the same), `pieces` (SentencePiece's way), `words`, `unigram`."""
    folder = tmp_path_factory.mktemp("tokenizers")
    level = bpe.byte_level()
    bpe.saved(level, folder / "level")
    bpe.saved(bpe.sentencepiece_like(), folder / "pieces")
    bpe.saved(bpe.word_pieces(), folder / "words")
    bpe.saved(bpe.unigram(), folder / "unigram")
    (folder / "ranks").mkdir()
    (folder / "ranks" / "tokenizer.model").write_bytes(bpe.ranks_of(level))
    return folder


@pytest.fixture(scope="module")
def level(folder: Path) -> Tokenizer:
    return open_tokenizer(str(folder / "level"))


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Tokenizer:
    return open_tokenizer(str(folder / "ranks"))


@pytest.fixture(scope="module")
def pieces(folder: Path) -> Tokenizer:
    return open_tokenizer(str(folder / "pieces" / "tokenizer.json"))


@pytest.fixture(scope="module")
def library(folder: Path) -> Library:
    """`level` as the library itself reads it."""
    library = Library.from_file(str(folder / "level" / "tokenizer.json"))
    library.encode_special_tokens = True
    return library


# --- byte-level: what goes in comes out, whatever it is


@settings(max_examples=60, deadline=None)
@given(
    text=st.binary(max_size=60) | st.text(max_size=40).map(str.encode),
    which=st.sampled_from(["bytes", "level", "ranks"]),
)
def test_any_bytes_come_back(level: Tokenizer, ranks: Tokenizer, text: bytes, which: str) -> None:
    tokenizer = {"bytes": open_tokenizer("bytes"), "level": level, "ranks": ranks}[which]
    ids = tokenizer.encode(text)
    assert ids.dtype == (np.uint8 if which == "bytes" else np.uint16) and ids.ndim == 1
    assert which != "bytes" or ids.tolist() == list(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_of(ids) == len(text)
    assert tokenizer.separator not in ids


@pytest.mark.parametrize("pattern", [LLAMA3_PATTERN, GPT2_PATTERN])
def test_both_libraries_cut_at_every_character_alike(pattern: str) -> None:
    """Issue 14, item 8: tokenizers 0.21.0, once allowed, takes newer letters, digits and signs for something else.

    Each character follows a letter, a digit and a sign, with which its first byte merges if they are not cut apart.
    """
    ranks = {bytes([byte]): byte for byte in range(256)}
    for before in b"a1!":
        ranks.update({bytes([before, lead]): len(ranks) + lead - 0xC2 for lead in range(0xC2, 0xF5)})
    fields = json.loads(json_of_ranks(ranks, []))
    fields["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}
    library = Library.from_str(json.dumps(fields))
    engine = rank_engine("all", ranks, pattern)
    characters = [*range(0x80, 0x3400), *range(0xA000, 0xAC00), *range(0xF900, 0x20000), *range(0xE0000, 0xE0200)]
    characters += [*range(0x3400, 0xA000, 8), *range(0xAC00, 0xD800, 8), *range(0x20000, 0x34000, 8)]  # large scripts
    lines = [f"a{chr(number)}1{chr(number)}!{chr(number)}\n" for number in characters]
    texts = ["".join(lines[first : first + 50]) for first in range(0, len(lines), 50)]
    theirs = library.encode_batch_fast(texts, add_special_tokens=False)
    different = [text for text, found in zip(texts, theirs, strict=True) if found.ids != engine.encode_ordinary(text)]
    assert not different[:1]


@pytest.mark.parametrize("text", [bpe.TEXT, LONG_RUN, "don't I'LL 12345 \r\n\r\n  x\u00a0\u3000y", ""])
def test_ids_are_the_library_s(level: Tokenizer, ranks: Tokenizer, library: Library, text: str) -> None:
    expected = library.encode(text, add_special_tokens=False).ids
    assert level.encode(text.encode()).tolist() == expected
    assert ranks.encode(text.encode()).tolist() == expected


def test_a_run_too_long_for_the_pattern_is_cut(ranks: Tokenizer) -> None:
    """tiktoken gives up on a million spaces; the text comes back all the same."""
    text = b"begin" + b" " * 1_000_000 + b"end"
    assert ranks.decode(ranks.encode(text)) == text
    assert ranks.encode(b"one\n" * 100_000).tolist() == ranks.encode(b"one\n").tolist() * 100_000


def test_bytes_that_are_not_utf8_are_their_own_tokens(level: Tokenizer) -> None:
    around, inside = b"print(self)", b"\xff\xc3\x28\xed\xa0\x80"
    ids = level.encode(around + inside + around).tolist()
    alone = level.encode(around).tolist()
    assert ids[: len(alone)] == ids[-len(alone) :] == alone
    assert [level.decode(number) for number in ids[len(alone) : -len(alone)]] == [inside[n : n + 1] for n in range(6)]


def test_a_batch_is_its_texts(level: Tokenizer, ranks: Tokenizer) -> None:
    texts = [b"one two", b"", b"\xffthree", "vier fünf".encode()]
    for tokenizer in (level, ranks, open_tokenizer("bytes")):
        batch = tokenizer.encode_batch(texts)
        assert [ids.tolist() for ids in batch] == [tokenizer.encode(text).tolist() for text in texts]
        assert tokenizer.encode_batch([]) == []


def test_tokenizers_reach_other_processes(level: Tokenizer, ranks: Tokenizer, pieces: Tokenizer) -> None:
    """Where workers are not forked, they get a copy."""
    for tokenizer in (level, ranks, pieces, open_tokenizer("bytes")):
        ids = tokenizer.encode(b"some text")
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.encode(b"some text").tolist() == ids.tolist()
        assert copy.decode(ids) == tokenizer.decode(ids) and copy.fingerprint == tokenizer.fingerprint


# --- special tokens


@pytest.mark.parametrize("where", ["{}", "x{}y", " {} ", "{0}{0}"])
def test_the_name_of_a_special_token_is_text_like_any_other(level: Tokenizer, ranks: Tokenizer, where: str) -> None:
    for tokenizer in (level, ranks):
        for name in list(tokenizer.special_tokens)[:3]:
            text = where.format(name).encode()
            ids = tokenizer.encode(text)
            assert not set(ids.tolist()) & set(tokenizer.special_tokens.values())
            assert tokenizer.decode(ids) == text


def test_special_tokens_stand_for_no_bytes(level: Tokenizer, ranks: Tokenizer) -> None:
    for tokenizer in (level, ranks, open_tokenizer("bytes")):
        ids = [tokenizer.separator, *tokenizer.encode(b"one").tolist(), tokenizer.separator]
        assert tokenizer.decode(ids) == b"one"
        assert tokenizer.bytes_of(np.array([ids, ids])) == 6


def test_a_text_that_becomes_a_special_token_is_refused(folder: Path, level: Tokenizer) -> None:
    tokenizer = open_tokenizer(str(folder / "unigram"))
    assert tokenizer.special_tokens["</s>"] == tokenizer.separator
    assert len(tokenizer.encode(b"def same")) > 1
    with pytest.raises(DataError, match=r"text that reads '</s>' .*data\.separator"):
        tokenizer.encode(b"same</s>same")
    word = next(word for word in ("self", "import", "tokenizer") if len(level.encode(word.encode())) == 1)
    other = open_tokenizer(str(folder / "level"), special_tokens=[word])
    assert other.vocab_size == level.vocab_size, "a token that is there already becomes special"
    with pytest.raises(DataError, match=rf"text that reads '{word}' .*data\.special_tokens"):
        other.encode(word.encode())


def test_what_is_unknown_may_be_a_special_token(folder: Path) -> None:
    words = open_tokenizer(str(folder / "words"), "[SEP]")
    assert words.encode("日".encode()).tolist() == [words.special_tokens["[UNK]"]]
    assert words.decode(words.encode("日 a".encode())) == b" a"


def test_ranks_are_followed_by_llama_3_s_special_tokens(ranks: Tokenizer) -> None:
    assert ranks.vocab_size == 400 + 256
    assert ranks.separator == ranks.special_tokens["<|end_of_text|>"] == 401
    # As in Meta's release, whose ranks are 0 to 127,999: 128000, 128006, 128009, 128255.
    by_id = {number - 400: name for name, number in ranks.special_tokens.items()}
    assert [by_id[n] for n in (0, 6, 9)] == ["<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>"]
    assert by_id[255] == "<|reserved_special_token_250|>" and len(by_id) == 256


def test_special_tokens_of_the_recipe_come_after_the_others(folder: Path, level: Tokenizer) -> None:
    more = open_tokenizer(str(folder / "level"), special_tokens=["<|endoftext|>", "<|a|>", "<|b|>"])
    assert more.special_tokens == {"<|endoftext|>": 400, "<|a|>": 401, "<|b|>": 402}
    assert (more.vocab_size, more.separator) == (403, 400)
    assert more.encode(b"<|a|>").tolist() == level.encode(b"<|a|>").tolist()
    other = open_tokenizer(str(folder / "level"), "<|b|>", ["<|a|>", "<|b|>"])
    assert other.separator == 402
    instead = open_tokenizer(str(folder / "ranks"), special_tokens=["<|a|>", "</s>"])
    assert (instead.special_tokens, instead.separator) == ({"<|a|>": 400, "</s>": 401}, 401)
    of_bytes = open_tokenizer("bytes", special_tokens=["<|a|>"])
    assert (of_bytes.special_tokens, of_bytes.vocab_size) == ({"<|a|>": 257}, 258)
    assert of_bytes.decode([97, 256, 257]) == b"a" and of_bytes.bytes_of([97, 256, 257]) == 1


@pytest.mark.parametrize(
    ("special", "config", "wanted", "expected"),
    [
        (("</s>",), {}, None, "</s>"),
        (("</s>", "<|end_of_text|>"), {"eos_token": "</s>"}, None, "</s>"),
        (("</s>", "<|x|>"), {"eos_token": {"content": "<|x|>"}}, None, "<|x|>"),
        (("</s>", "<|x|>"), {"eos_token": "</s>"}, "<|x|>", "<|x|>"),
        (("</s>", "<|x|>"), {"eos_token": None}, None, "</s>"),
        (("</s>", "<|end_of_text|>"), {}, None, r"several .*'<\|end_of_text\|>', '</s>'.*data\.separator"),
        (("<|x|>",), {}, None, r"no special token that is known .* has '<\|x\|>'\. .*data\.separator"),
        ((), {}, None, "it has none"),
        (("</s>",), {"eos_token": "<|x|>"}, None, r"no special token '<\|x\|>' \(eos_token of tokenizer_config"),
        (("</s>", "<|x|>"), {}, "<|xx|>", r"no special token '<\|xx\|>' \(data\.separator\); did you mean '<\|x\|>'"),
        (("</s>",), {}, "the", r"no special token 'the'"),
    ],
)
def test_which_special_token_is_the_separator(
    tmp_path: Path, special: tuple[str, ...], config: dict[str, Any], wanted: str | None, expected: str
) -> None:
    path = str(bpe.saved(bpe.byte_level(300, special), tmp_path, **config))
    if expected in special:
        assert open_tokenizer(path, wanted).separator == 300 + special.index(expected)
    else:
        with pytest.raises(DataError, match=expected):
            open_tokenizer(path, wanted)


@pytest.mark.parametrize("turn", ["<|eot_id|>", "<|im_end|>", "<|return|>", "<end_of_turn>", "<|something|>"])
@pytest.mark.parametrize(("end", "warned"), [("<|endoftext|>", True), ("<eos>", True), ("<|pad|>", False)])
def test_a_chat_s_separator_is_named_and_warned_of(tmp_path: Path, turn: str, end: str, warned: bool) -> None:
    """Issue 14, item 8: where the file declares the end of a turn, and has a token that ends a text."""
    path = str(bpe.saved(bpe.byte_level(300, (end, turn)), tmp_path, eos_token=turn))
    for chosen in (None, turn):
        tokenizer = open_tokenizer(path, chosen)
        assert describe_separator(tokenizer) == f"'{turn}' (id 301)"
        finding = separator_warning(tokenizer, chosen)
        assert (finding is not None) == (warned and chosen is None)
        assert finding is None or (finding.key, finding.severity) == ("data.separator", "warning")
        assert finding is None or (turn in finding.problem and f'separator = "{end}"' in finding.fix)
    assert describe_separator(open_tokenizer(path, end)) == f"'{end}' (id 300)"
    assert separator_warning(open_tokenizer(path, end), None) is None
    assert describe_separator(open_tokenizer("bytes")) == "id 256"


# --- other ways to cut


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=30))
def test_pieces_add_up_to_what_the_library_decodes(pieces: Tokenizer, folder: Path, text: str) -> None:
    """What counts is the text with the space that this tokenizer puts before it: every byte of it, each once."""
    library = Library.from_file(str(folder / "pieces" / "tokenizer.json"))
    ids = pieces.encode(text.encode())
    assert pieces.decode(ids) == (b" " if text else b"") + text.replace("▁", " ").encode()
    assert pieces.bytes_of(ids) == len(pieces.decode(ids))
    assert library.decode(ids.tolist()).encode() == pieces.decode(ids)[1:]


def changed(tokenizer: Library, folder: Path, change: Callable[[dict[str, Any]], object]) -> str:
    """The path of the tokenizer, once its JSON is changed."""
    fields = json.loads(tokenizer.to_str())
    change(fields)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    return str(folder / "tokenizer.json")


@pytest.mark.parametrize("prepended", [0, 1])
@pytest.mark.parametrize("decoder", ["Replace", "Metaspace"])
def test_a_blank_that_is_no_token_counts_one_byte(tmp_path: Path, prepended: int, decoder: str) -> None:
    """Issue 14, item 8: of a vocabulary that falls back to bytes, the mark for a blank is three of them."""

    def change(fields: dict[str, Any]) -> None:
        model = fields["model"]
        model["vocab"] = {token: number for token, number in model["vocab"].items() if "▁" not in token}
        model["merges"] = [pair for pair in model["merges"] if "▁" not in "".join(pair)]
        del fields["normalizer"]["normalizers"][: 1 - prepended]
        if decoder == "Metaspace":
            fields["decoder"]["decoders"][0] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"}

    tokenizer = open_tokenizer(changed(bpe.sentencepiece_like(), tmp_path, change))
    ids = tokenizer.encode(b"ab cd e")
    assert len(ids) > 7 + 2
    assert tokenizer.decode(ids) == b" " * prepended + b"ab cd e"
    assert tokenizer.bytes_of(ids) == 7 + prepended
    other = tokenizer.encode("’▂".encode())  # which begin with bytes of the mark
    assert tokenizer.bytes_of(other) == 6 + prepended


def test_dropout_is_off(level: Tokenizer, tmp_path: Path) -> None:
    """Issue 14, item 8: it gave a text other ids at each call, under one fingerprint."""
    path = changed(bpe.byte_level(), tmp_path, lambda fields: fields["model"].update(dropout=0.5))
    expected = level.encode(bpe.TEXT.encode()).tolist()
    for tokenizer in (open_tokenizer(path), open_tokenizer(path, special_tokens=["<|more|>"])):
        assert tokenizer.encode(bpe.TEXT.encode()).tolist() == expected
        exported = Library.from_str(tokenizer.export()["tokenizer.json"].decode())
        exported.encode_special_tokens = True
        assert exported.encode(bpe.TEXT, add_special_tokens=False).ids == expected


@pytest.mark.parametrize("name", ["byte-level", "characters", "falls back to bytes"])
def test_a_text_that_would_be_lost_is_refused(tmp_path: Path, name: str) -> None:
    """Issue 14, item 8: a BPE without a token for a character, and none for unknown text, drops it in silence."""

    def lose(fields: dict[str, Any]) -> None:
        model = fields["model"]
        model.update(unk_token=None, byte_fallback=name == "falls back to bytes")
        lost = {"characters": "é", "byte-level": "©"}.get(name, "<0xA9>")  # "©": é's second byte, as a character
        model["vocab"] = {f"unused {n}" if lost in token else token: n for token, n in model["vocab"].items()}
        model["merges"] = [pair for pair in model["merges"] if not any(lost in part for part in pair)]

    path = changed(bpe.byte_level() if name == "byte-level" else bpe.sentencepiece_like(), tmp_path, lose)
    separator = None if name == "byte-level" else "</s>"
    for special in ([], ["<|more|>"]):
        tokenizer = open_tokenizer(path, separator, special)
        assert tokenizer.decode(tokenizer.encode(b"plain")).strip() == b"plain"
        with pytest.raises(DataError, match=rf"{re.escape(path)} has no token for some of this text.*256 bytes"):
            tokenizer.encode("plain é".encode())
        exported = Library.from_str(tokenizer.export()["tokenizer.json"].decode())
        assert exported.model.unk_token is None


FAILING: dict[str, tuple[Callable[[], Library], Callable[[dict[str, Any]], object]]] = {
    "WordPiece": (bpe.word_pieces, lambda fields: fields["model"].update(unk_token="[NONE]")),
    "WordLevel": (
        lambda: Library(models.WordLevel({"a": 0, "</s>": 1}, unk_token="[NONE]")),
        lambda fields: fields.update(added_tokens=[{**TOKEN, "id": 1, "content": "</s>"}]),
    ),
    "Unigram": (bpe.unigram, lambda fields: fields["model"].update(unk_id=None)),
    "PanicException": (
        bpe.byte_level,
        lambda fields: fields.update(
            normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"},
        ),
    ),
}
TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@pytest.mark.parametrize("name", FAILING)
def test_what_a_library_raises_names_the_tokenizer_and_the_document(tmp_path: Path, name: str) -> None:
    """Issue 14, item 16: also a panic, which is no `Exception`; where a process of its own tokenizes, too."""
    path = changed(FAILING[name][0](), tmp_path, FAILING[name][1])
    separator = "[SEP]" if name == "WordPiece" else None
    bad = "日" + "a" * 40 + "!"
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": bad}))
    tokenizer = open_tokenizer(path, separator)
    said = re.escape(f"{path} cannot be used by the library 'tokenizers': ")
    with pytest.raises(DataError, match=f"^{said}"):
        tokenizer.encode(bad.encode())
    section = Data(tokenizer=path, separator=separator)
    with pytest.raises(DataError, match=f"^texts.jsonl:2: {said}"):
        open_streams([str(tmp_path / "texts.jsonl")], "data.corpus", section, tokenizer)
    inputs = (str(tmp_path / "texts.jsonl"),)
    request = Request(inputs, tmp_path / "out", TokenizerInfo.of(path, tokenizer), separator, (), "text", 0.0)
    with pytest.raises(DataError, match=f"^texts.jsonl:2: {said}"):
        prepare(request, find_inputs(inputs, "text"))


DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
ANYWHERE = {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "a" * 2000}
CHARACTERS = base64.b64encode(bytes(4) + b"a" * 2000 + b"\0").decode()


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("normalizer", {"type": "Sequence", "normalizers": [DOUBLING] * 44}),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [ANYWHERE]}]}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": CHARACTERS}),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 44}),
        ("decoder", {"type": "Sequence", "decoders": [DOUBLING] * 44}),
    ],
)
def test_steps_that_blow_a_text_up_are_refused(tmp_path: Path, name: str, step: dict[str, Any]) -> None:
    """Issue 14, item 16: the library ends the process when there is no more memory."""
    path = changed(bpe.byte_level(), tmp_path, lambda fields: fields.update({name: step}))
    with pytest.raises(DataError, match=rf"tokenizer\.json: its {name} may make a text"):
        open_tokenizer(path)


def test_words_come_back_as_the_library_gives_them(folder: Path) -> None:
    words = open_tokenizer(str(folder / "words"), "[SEP]")
    library = Library.from_file(str(folder / "words" / "tokenizer.json"))
    ids = words.encode(b"Return the folders, Tokenizer!")
    assert (
        words.decode(ids).decode().removeprefix(" ")
        == library.decode(ids.tolist())
        == "return the folders , tokenizer !"
    )
    assert words.bytes_of(ids) == len(" return the folders , tokenizer !")


def test_what_is_not_utf8_is_refused_by_what_is_not_byte_level(pieces: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="byte 0xff at position 4 of the text"):
        pieces.encode_batch([b"good", b"bad\xff"])
    prefixed = open_tokenizer(str(bpe.saved(bpe.byte_level(300, prefix=True), tmp_path)))
    assert prefixed.decode(prefixed.encode(b"x")) == b" x"
    with pytest.raises(DataError, match="position 1 "):
        prefixed.encode(b"\xff")


def test_the_file_s_template_truncation_and_padding_are_not_applied(tmp_path: Path, level: Tokenizer) -> None:
    from tokenizers.processors import TemplateProcessing

    library = bpe.byte_level()
    library.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 400)])
    library.enable_truncation(3)
    library.enable_padding(length=50)
    tokenizer = open_tokenizer(str(bpe.saved(library, tmp_path)))
    text = b"a text of many tokens"
    assert tokenizer.encode(text).tolist() == level.encode(text).tolist()
    assert tokenizer.fingerprint != level.fingerprint


@pytest.mark.parametrize("wrong", [-1, 401])
def test_ids_outside_the_vocabulary_are_refused(level: Tokenizer, wrong: int) -> None:
    for read in (level.decode, level.bytes_of, open_tokenizer("bytes").decode):
        with pytest.raises(ValueError, match=r"\[0, (401|257)\)"):
            read([0, wrong])


def test_wide_vocabularies_have_wide_ids() -> None:
    """Megatron's rule: 65,500 and more need 4 bytes."""
    assert [np.dtype(token_dtype(size)).name for size in (257, 65_499, 65_500, 128_256)] == [
        "uint16", "uint16", "int32", "int32"
    ]  # fmt: skip


# --- fingerprints


def test_whatever_decides_ids_decides_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    one, two = (bpe.saved(bpe.byte_level(size), tmp_path / str(size)) for size in (300, 301))
    found = [
        open_tokenizer(*arguments).fingerprint
        for arguments in [
            ("bytes",), ("bytes", None, ["<|a|>"]), (str(one),), (str(two),), (str(one), None, ["<|a|>"]),
            (str(one), "<|a|>", ["<|a|>"]), (str(folder / "ranks"),), (str(folder / "ranks"), "<|eot_id|>"),
        ]
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    assert all(len(digest) == 32 for digest in found)
    copy = bpe.saved(bpe.byte_level(300), tmp_path / "copy", model_max_length=5)
    assert open_tokenizer(str(copy)).fingerprint == found[2], "where it lies does not matter, nor what others read"


# --- wrong files


SMALL = bpe.byte_level(270, ("</s>", "<x>")).to_str()


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda path: changed(bpe.byte_level(270), path.parent, change)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"{\xff"), "is not JSON"),
        (lambda path: path.write_text("[" * 100_000), "is not JSON"),
        (lambda path: path.write_text("[1]"), "is not a JSON object"),
        (lambda path: path.write_text('{"model": 3}'), "has no model with a vocab"),
        (lambda path: path.write_text('{"model": {"vocab": {"a": "b"}}}'), "has no model with a vocab"),
        (edited(lambda fields: fields.update(added_tokens=[{"content": "x"}])), "added_tokens is not a list"),
        (edited(lambda fields: fields.update(added_tokens=3)), "added_tokens is not a list"),
        (edited(lambda fields: fields["model"].update(type="BPP")), "cannot be used by the library 'tokenizers'"),
        (edited(lambda fields: fields["model"]["merges"].append(["nowhere", "else"])), "cannot be used by"),
        (edited(lambda fields: fields["added_tokens"][0].update(id=7777)), "id 7777 by the file, and is 270"),
        (lambda path: path.mkdir(), "holds no tokenizer"),
    ],
)
def test_wrong_json(tmp_path: Path, write: Callable[[Path], object], said: str) -> None:
    write(tmp_path / "tokenizer.json")
    with pytest.raises(UsageError, match=said) as caught:
        open_tokenizer(str(tmp_path / "tokenizer.json")).encode(b"x")
    assert str(tmp_path) in str(caught.value)


JUNK = st.sampled_from([None, True, -1, 3, 10**12, "", "BPE", "a b c", [], [1], ["a", "b"], {}, {"type": "ByteLevel"}])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_the_file_says_it_is_refused_by_name(folder: Path, data: st.DataObject) -> None:
    fields: Any = json.loads(SMALL)
    place, path = fields, folder / "tokenizer.json"
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.integers(0, 3)) == 0:
            break
        place = place[key]
    place[key] = data.draw(JUNK)
    path.write_text(json.dumps(fields))
    try:
        tokenizer = open_tokenizer(str(path))
        tokenizer.decode(tokenizer.encode(b"some text <x> \xff"))
        tokenizer.export()
    except DataError as error:
        assert str(path) in str(error) or "not UTF-8" in str(error)


ALL_BYTES = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "is empty"),
        (ALL_BYTES[:-1], "the byte 0xff has no rank"),
        ([*ALL_BYTES, b"YWE= 258"], "rank 256 is missing"),
        ([*ALL_BYTES, b"YWE= 255"], "rank 255 is there twice"),
        ([*ALL_BYTES, b"YWE= 256", b"YWE= 257"], "tokenizer.model:258: the token YWE= is there twice"),
        ([*ALL_BYTES, b"YWE=x 256"], "tokenizer.model:257: a rank file's lines"),
        ([*ALL_BYTES, b"YWE= two"], "tokenizer.model:257: a rank file's lines"),
        ([*ALL_BYTES, b"YWE="], "tokenizer.model:257: a rank file's lines"),
        ([b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"], "a SentencePiece model has the same name"),
    ],
)
def test_wrong_ranks(tmp_path: Path, lines: list[bytes], said: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(DataError, match=said):
        open_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("byt", "did you mean 'bytes'"),
        ("nowhere/tokenizer.json", "there is no tokenizer 'nowhere/tokenizer.json'"),
        ("corpus.txt", "their files end in .json, .model, .tiktoken"),
        (".", "the folder '.' holds no tokenizer: neither tokenizer.json nor tokenizer.model"),
    ],
)
def test_no_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(UsageError, match=said):
        open_tokenizer(name)


def test_two_special_tokens_of_one_name(folder: Path) -> None:
    for name in ("bytes", str(folder / "level"), str(folder / "ranks")):
        with pytest.raises(DataError, match=r"data\.special_tokens names '<a>' twice"):
            open_tokenizer(name, special_tokens=["<a>", "<b>", "<a>"])
    with pytest.raises(DataError, match="has no name"):
        open_tokenizer("bytes", "</s>")
