"""Where tiktoken stands in for `tokenizers`: wherever it does, every id is the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import bpe
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from titanlite.corpus.tokenizers import open_tokenizer
from titanlite.corpus.tokenizers.byte_pairs import rank_engine, ranks_of_json

pytestmark = pytest.mark.quick


def gpt2_like() -> Library:
    """Cut by the library's own pattern; special tokens first, as its trainer puts them."""
    tokenizer = Library(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator([bpe.TEXT], trainer)
    return tokenizer


@pytest.fixture(scope="module", params=[bpe.byte_level, gpt2_like])
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Library]:
    """A tokenizer that tiktoken applies, and the library's own."""
    library = request.param()
    ours = open_tokenizer(str(bpe.saved(library, tmp_path_factory.mktemp("twins"))))
    assert ours._fast is not None  # type: ignore[attr-defined]
    library.encode_special_tokens = True
    return ours, library


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40) | st.text("ab1 '\n\t.sS", max_size=30))
def test_texts_have_the_library_s_ids(twins: tuple[Any, Library], text: str) -> None:
    ours, library = twins
    assert ours.encode(text.encode()).tolist() == library.encode(text, add_special_tokens=False).ids


@pytest.mark.slow
def test_a_run_too_long_for_tiktoken_is_the_library_s(twins: tuple[Any, Library]) -> None:
    ours, library = twins
    text = "begin" + " " * 1_000_000 + "end"
    assert ours.encode(text.encode()).tolist() == library.encode(text, add_special_tokens=False).ids


# --- vocabularies of any kind


BYTES_ALONE = bpe.byte_level(256, special=()).to_str()


@st.composite
def vocabularies(draw: st.DrawFn) -> dict[str, Any]:
    """The 256 bytes, and merges of what is there before, most of them reasonable and some not."""
    fields = json.loads(BYTES_ALONE)
    tokens, merges = ["a", "b", "c"], []
    for _ in range(draw(st.integers(1, 9))):
        pair = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        if "".join(pair) not in tokens or draw(st.integers(0, 3)) == 0:
            merges.append(pair)
            tokens += [] if "".join(pair) in tokens else ["".join(pair)]
    model = fields["model"]
    for token in tokens[3:]:
        model["vocab"][token] = len(model["vocab"])
    model["merges"] = [list(pair) for pair in merges]
    model["ignore_merges"] = draw(st.booleans())
    return fields


@settings(max_examples=60, deadline=None)
@given(fields=vocabularies(), texts=st.lists(st.text("abc", min_size=2, max_size=14), min_size=6, max_size=6))
def test_what_is_taken_for_the_same_is_the_same(fields: dict[str, Any], texts: list[str]) -> None:
    found = ranks_of_json(fields, [])
    if found is None:
        return
    ranks, ids, pattern = found
    library, engine = Library.from_str(json.dumps(fields)), rank_engine("x", ranks, pattern)
    for text in texts:
        assert [ids[rank] for rank in engine.encode_ordinary(text)] == library.encode(text).ids


def test_a_vocabulary_that_tiktoken_applies_otherwise_is_refused() -> None:
    """ "abc" by a + bc only: "ab" is merged first, after which the library has no pair for "abc", and tiktoken has."""
    fields = json.loads(bpe.byte_level(256).to_str())
    for token in ("ab", "bc", "abc"):
        fields["model"]["vocab"][token] = len(fields["model"]["vocab"])
    fields["model"]["merges"] = [["a", "b"], ["b", "c"], ["a", "bc"]]
    assert ranks_of_json(fields, ["<|endoftext|>"]) is None
    fields["model"]["merges"][2] = ["ab", "c"]
    assert ranks_of_json(fields, ["<|endoftext|>"]) is not None


def changed(**model: Any) -> Callable[[dict[str, Any]], None]:
    return lambda fields: fields["model"].update(model)


@pytest.mark.parametrize(
    "change",
    [
        changed(dropout=0.1),
        changed(byte_fallback=True),
        changed(end_of_word_suffix="</w>"),
        changed(merges=[]),
        lambda fields: fields.update(normalizer={"type": "NFC"}),
        lambda fields: fields.update(pre_tokenizer=None),
        lambda fields: fields["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
        lambda fields: fields["pre_tokenizer"]["pretokenizers"][0].update(pattern={"String": " "}),
        lambda fields: fields["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        lambda fields: fields["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True),
        lambda fields: fields["pre_tokenizer"]["pretokenizers"].pop(),
        lambda fields: fields["added_tokens"][0].update(special=False),
    ],
)
def test_other_settings_are_the_library_s(change: Callable[[dict[str, Any]], None]) -> None:
    fields = json.loads(bpe.byte_level().to_str())
    assert ranks_of_json(fields, ["<|endoftext|>"]) is not None
    change(fields)
    assert ranks_of_json(fields, ["<|endoftext|>"]) is None


def test_another_pattern_is_the_library_s(tmp_path: Path) -> None:
    """Which one of tiktoken's regular expressions cannot express, in this case."""
    fields = json.loads(bpe.byte_level().to_str())
    fields["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\w+|(?<x>a)\g<x>|\W"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    library = Library.from_str(json.dumps(fields))
    ours = open_tokenizer(str(tmp_path))
    assert ours.encode(b"self import").tolist() == library.encode("self import").ids
