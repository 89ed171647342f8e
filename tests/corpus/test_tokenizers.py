"""The byte tokenizer against Python's own bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.corpus.tokenizers import open_tokenizer
from titanlite.errors import UsageError


@settings(max_examples=50, deadline=None)
@given(st.binary())
def test_round_trip(text: bytes) -> None:
    tokenizer = open_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert np.issubdtype(ids.dtype, np.unsignedinteger)
    assert ids.tolist() == list(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_of(ids) == len(text)


def test_separators_stand_for_no_bytes() -> None:
    tokenizer = open_tokenizer("bytes")
    ids = [tokenizer.separator, *b"one", tokenizer.separator, *b"two"]
    assert tokenizer.decode(ids) == b"onetwo"
    assert tokenizer.bytes_of(ids) == 6
    assert tokenizer.vocab_size == 257 == tokenizer.separator + 1


@pytest.mark.parametrize("wrong", [-1, 257])
def test_ids_outside_the_vocabulary_are_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=r"\[0, 257\)"):
        open_tokenizer("bytes").decode([0, wrong])


def test_unknown_name() -> None:
    with pytest.raises(UsageError, match="did you mean 'bytes'"):
        open_tokenizer("byte")
