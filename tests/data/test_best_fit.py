"""Best-fit packing against its promises, and against the same rule written for one document at a time."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.cli.main import main
from titanlite.corpus.token_file import TokenFile
from titanlite.corpus.units import pack
from titanlite.data.packing import BestFit, pack_best_fit
from titanlite.data.splits import open_data, require_samples
from titanlite.errors import DataError
from titanlite.recipe.sections import Data

SEPARATOR = 60_000
LENGTHS = st.lists(st.integers(0, 40), max_size=60)


def packed(lengths: list[int], sequence_length: int) -> tuple[list[list[int]], BestFit, list[list[int]]]:
    """Documents of tokens that are all different, their packing, and its windows."""
    ends = np.cumsum(lengths, dtype=np.int64)
    documents = [list(range(end - length, end)) for end, length in zip(ends.tolist(), lengths, strict=True)]
    stream = pack([np.array(document, np.uint16) for document in documents], SEPARATOR)
    packing = pack_best_fit(ends + np.arange(1, len(lengths) + 1), sequence_length, SEPARATOR)
    return documents, packing, [packing.window(stream, index).tolist() for index in range(packing.windows)]


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, sequence_length=st.integers(1, 25))
def test_every_token_is_a_label_once_and_what_fits_is_whole(lengths: list[int], sequence_length: int) -> None:
    documents, packing, windows = packed(lengths, sequence_length)
    labels = [token for window in windows for token in window[1:]]
    assert sorted(labels) == [*range(sum(lengths)), *[SEPARATOR] * len(lengths)]
    assert packing.lengths.sum() == len(labels)
    assert all(2 <= len(window) <= sequence_length + 1 for window in windows)
    for document in documents:
        for first in document[:1]:
            (window,) = (each for each in windows if first in each[1:])
            at = window.index(first, 1)
            assert window[at - 1] == SEPARATOR
            if len(document) < sequence_length:
                assert window[at : at + len(document) + 1] == [*document, SEPARATOR]
            else:
                assert window[at:] == document[:sequence_length]
    assert (packing.documents, packing.cut) == (len(lengths), sum(length >= sequence_length for length in lengths))


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, sequence_length=st.integers(1, 45))
def test_as_full_as_one_document_at_a_time(lengths: list[int], sequence_length: int) -> None:
    """The longest first, each into the fullest window that it fits into."""
    _, _, windows = packed(lengths, sequence_length)
    pieces = [
        min(sequence_length, length + 1 - start)
        for length in lengths
        for start in range(0, length + 1, sequence_length)
    ]
    expected: list[int] = []
    for piece in sorted(pieces, reverse=True):
        fitting = [index for index, filled in enumerate(expected) if filled + piece <= sequence_length]
        if fitting:
            expected[max(fitting, key=expected.__getitem__)] += piece
        else:
            expected.append(piece)
    assert sorted(len(window) - 1 for window in windows) == sorted(expected)


def test_windows_by_hand() -> None:
    """Of eleven tokens, the first five after a separator, the next five after the token before them, and the rest."""
    sep = SEPARATOR
    _, packing, windows = packed([1, 10, 3, 2], 5)
    assert windows == [
        [sep, 1, 2, 3, 4, 5],
        [5, 6, 7, 8, 9, 10],
        [sep, sep, 11, 12, 13, sep],
        [sep, 0, sep, 14, 15, sep],
    ]
    assert (packing.windows, packing.lengths.sum(), packing.documents, packing.cut) == (4, 20, 4, 1)
    empty = pack_best_fit(np.array([], np.int64), 5, sep)
    assert (empty.windows, empty.lengths.sum()) == (0, 0)


def test_documents_without_any_token_are_passed_over() -> None:
    """A foreign token file may have them."""
    packing = pack_best_fit(np.array([0, 3, 3, 5, 5]), 8, SEPARATOR)
    assert packing.window(np.array([1, 2, SEPARATOR, 3, SEPARATOR], np.uint16), 0).tolist() == [
        SEPARATOR, 1, 2, SEPARATOR, 3, SEPARATOR,
    ]  # fmt: skip
    assert (packing.windows, packing.documents) == (1, 2)


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """150 texts of 0 to 149 bytes."""
    monkeypatch.chdir(tmp_path)
    path = Path("texts.jsonl")
    path.write_text("".join(json.dumps({"text": chr(97 + n % 26) * n}) + "\n" for n in range(1, 151)))
    return path


def test_a_token_file_is_packed_as_its_texts_are(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "prepare", str(texts), "--out", "tokens", "--held-out", "10", "--workers", "1"]) == 0
    section = Data(corpus=str(texts), validation_percent=10.0, packing="best_fit")
    here, there = (
        open_data(section.model_copy(update={"corpus": corpus}), 100, seed=3) for corpus in (str(texts), "tokens")
    )
    for one, other in ((here.train.sources[0], there.train.sources[0]), (here.validation[0], there.validation[0])):
        assert one.windows == other.windows > 0
        assert [one.window(n).tolist() for n in range(one.windows)] == [
            other.window(n).tolist() for n in range(one.windows)
        ]
    source = here.train.sources[0]
    assert sum(len(source.window(n)) - 1 for n in range(source.windows)) == source.tokens
    assert [here.train.sample(n).tolist() for n in range(9)] == [there.train.sample(n).tolist() for n in range(9)]
    capsys.readouterr()


def test_an_index_out_of_order_is_named(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "prepare", str(texts), "--out", "tokens", "--workers", "1"]) == 0
    index = bytearray(Path("tokens.idx").read_bytes())
    at = 34 + 4 * 150 + 8 * 70  # where document 70 begins in the .bin
    index[at : at + 8] = (2).to_bytes(8, "little")
    Path("tokens.idx").write_bytes(index)
    with pytest.raises(DataError, match=r"tokens\.idx: damaged: document 70"):
        TokenFile.open("tokens").document_ends()
    capsys.readouterr()


def test_what_is_reported_before_the_run(texts: Path) -> None:
    train = open_data(Data(corpus=str(texts), packing="best_fit"), 100, seed=3, validated=False).train
    labels = sum(len(train.sources[0].window(n)) - 1 for n in range(train.windows))
    stream = train.sources[0].beginning(10**6).tolist()
    documents = stream.count(256)
    long = sum(len(text) >= 100 for text in bytes(token % 256 for token in stream).split(b"\0"))
    assert require_samples(train, train.windows) == [
        f"source corpus is packed into {train.windows} sequences and {100 - labels / train.windows:.3g} % padding; "
        f"{long} of {documents} documents ({100 * long / documents:.3g} %) are longer than a sequence and cut"
    ]
    assert require_samples(open_data(Data(corpus=str(texts)), 100, seed=3).train, 10) == []


@pytest.mark.parametrize("sequence_length", [512, 2048])
def test_the_standard_library_wastes_less_than_one_percent(sequence_length: int) -> None:
    data = open_data(Data(packing="best_fit"), sequence_length, seed=0, validated=False)
    source = data.train.sources[0]
    labels = np.concatenate([source.window(n)[1:] for n in range(source.windows)])
    assert len(labels) == source.tokens
    assert 0.99 < len(labels) / (source.windows * sequence_length) <= 1
    assert (labels == 256).sum() == (source.beginning(source.tokens) == 256).sum()


def test_windows_are_the_same_in_any_version() -> None:
    packing = pack_best_fit(np.cumsum(np.random.default_rng(3).integers(1, 90, 5000)), 64, 256)
    found = b"".join(array.tobytes() for array in (packing.starts, packing.lengths, packing.ends))
    assert hashlib.sha256(found).hexdigest()[:16] == "4d73e3787ad9a7b2"


def test_memory_does_not_grow_with_the_windows_that_pieces_choose_among() -> None:
    """Many windows with equal room, and pieces of many lengths for it."""
    lengths = np.concatenate((np.full(20_000, 5000), np.arange(1, 3193)))
    tracemalloc.start()
    packing = pack_best_fit(np.cumsum(lengths), 8192, SEPARATOR)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * (packing.starts.nbytes + packing.lengths.nbytes + packing.ends.nbytes)
