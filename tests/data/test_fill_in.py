"""Fill-in-the-middle: documents come apart where they should, lose nothing, and are the same however they are read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.corpus.tokenizers import open_tokenizer
from titanlite.corpus.units import pack
from titanlite.data.fill_in import FilledIn, fill_in
from titanlite.data.sources import Texts
from titanlite.data.splits import Split, open_data
from titanlite.errors import DataError
from titanlite.recipe.sections import Data

SEPARATOR = 256
NAMES = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
MARKERS = (257, 258, 259)
BYTES = open_tokenizer("bytes", special_tokens=NAMES)


def stream_of(documents: list[list[int]]) -> Texts:
    return Texts(pack([np.array(document, np.uint16) for document in documents], SEPARATOR), SEPARATOR)


def fill(rate: float, seed: int, *streams: list[list[int]]) -> tuple[FilledIn, ...]:
    return fill_in(list(map(stream_of, streams)), rate, NAMES, BYTES, seed, "code")


def split(tokens: list[int]) -> list[list[int]]:
    """Documents without their separators."""
    documents: list[list[int]] = [[]]
    for token in tokens:
        documents.append([]) if token == SEPARATOR else documents[-1].append(token)
    assert documents.pop() == []
    return documents


def undone(document: list[int]) -> list[int]:
    """The document as it was."""
    if document[:1] != [MARKERS[0]]:
        assert not set(document) & set(MARKERS)
        return document
    _, suffix_at, middle_at = (document.index(marker) for marker in MARKERS)
    assert sum(document.count(marker) for marker in MARKERS) == 3
    return document[1:suffix_at] + document[middle_at + 1 :] + document[suffix_at + 1 : middle_at]


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 255), max_size=9), min_size=1, max_size=20),
    rate=st.sampled_from([0.3, 1.0]),
    seed=st.integers(0, 2**63 - 1),
    ends=st.tuples(st.integers(0, 200), st.integers(0, 200)),
    parts=st.integers(1, 19),
)
def test_nothing_is_lost_and_any_slice_is_that_of_the_whole(
    documents: list[list[int]], rate: float, seed: int, ends: tuple[int, int], parts: int
) -> None:
    (filled,) = fill(rate, seed, documents)
    whole = filled[0 : len(filled)].tolist()
    found = split(whole)
    assert [undone(document) for document in found] == documents
    if rate == 1:
        assert [document[:1] == [MARKERS[0]] for document in found] == [bool(document) for document in documents]
    assert np.diff(filled.document_ends(), prepend=0).tolist() == [len(document) + 1 for document in found]
    assert filled[ends[0] : ends[1]].tolist() == whole[ends[0] : ends[1]]
    assert fill(rate, seed) == ()
    if parts < len(documents):  # a document's number in the source counts, not the file that it is in
        several = fill(rate, seed, documents[:parts], documents[parts:])
        assert [token for each in several for token in each[0 : len(each)].tolist()] == whole


def test_the_share_and_the_cuts_are_as_even_as_chance() -> None:
    """2,000 documents of ten tokens at 30 %: 600 with a standard deviation of 20; eleven places to cut."""
    documents = [list(range(10))] * 2000
    (filled,) = fill(0.3, 1, documents)
    changed = [document for document in split(filled[0 : len(filled)].tolist()) if len(document) > 10]
    assert 520 < len(changed) < 680
    cuts = [(d.index(258) - 1, 12 - (d.index(259) - d.index(258)) - 1) for d in changed]
    places = np.bincount([place for pair in cuts for place in pair], minlength=11)
    assert len(places) == 11 and places.min() > 0.6 * places.mean() and places.max() < 1.4 * places.mean()
    assert all(first <= second for first, second in cuts)


@pytest.fixture
def texts(tmp_path: Path) -> str:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n}: " + "abcdefgh"[: n % 9] * 3}) + "\n" for n in range(120)))
    return str(path)


def opened(texts: str, seed: int = 0, **keys: object) -> Split:
    data = Data(corpus=texts, special_tokens=list(NAMES), **keys)  # type: ignore[arg-type]
    return open_data(data, 32, seed).train


def labels_of(train: Split) -> list[list[int]]:
    (source,) = train.sources
    return [source.window(index)[1:].tolist() for index in range(source.windows)]


def test_packed_documents_are_whole(texts: str) -> None:
    plain = split([t for window in labels_of(opened(texts, packing="best_fit")) for t in window])
    filled = split([t for window in labels_of(opened(texts, packing="best_fit", fim_rate=0.5)) for t in window])
    assert sorted(map(undone, filled)) == sorted(plain)
    changed = sum(document[:1] == [MARKERS[0]] for document in filled)
    assert 0.25 * len(plain) < changed < 0.75 * len(plain)


def test_they_compose_with_cut_and_leave_validation_alone(texts: str) -> None:
    train = opened(texts, fim_rate=1.0)
    stream = train.sources[0].beginning(10**6).tolist()
    read = [token for window in labels_of(train) for token in window]
    assert len(read) == train.windows * 32 and read == stream[1 : len(read) + 1]
    assert all(document[0] == MARKERS[0] for document in split(stream))
    assert opened(texts, seed=1, fim_rate=1.0).sources[0].beginning(10**6).tolist() != stream
    section = Data(corpus=texts, special_tokens=list(NAMES), fim_rate=1.0)
    (held_out,) = open_data(section, 32, 0).validation
    assert max(held_out.beginning(10**6).tolist()) == SEPARATOR


def test_markers_are_special_tokens(texts: str) -> None:
    with pytest.raises(DataError, match=r"data\.fim_tokens\.1: .*'x' .*<\|fim.*data\.special_tokens"):
        opened(texts, fim_rate=0.5, fim_tokens=(NAMES[0], "x", NAMES[2]))
    with pytest.raises(DataError, match=r"data\.fim_tokens: .*three different"):
        opened(texts, fim_rate=0.5, fim_tokens=(NAMES[0], NAMES[1], NAMES[0]))
    assert opened(texts, fim_tokens=("x", "y", "z")).windows  # not looked at


def test_documents_are_rearranged_alike_in_any_version() -> None:
    documents = [list(range(number % 23)) for number in range(500)]
    filled = fill(0.5, 2**40 + 5, documents[:200], documents[200:])
    found = b"".join(each[0 : len(each)].tobytes() for each in filled)
    assert hashlib.sha256(found).hexdigest()[:16] == "cc97e37cdb53cd35"
