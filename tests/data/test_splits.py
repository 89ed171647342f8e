"""Opening a corpus: what is held out, what is too short, and what compressors make of it."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.corpus.tokenizers import open_tokenizer
from titanlite.data.sources import Source
from titanlite.data.splits import compression_baselines, open_data, split_of
from titanlite.errors import DataError
from titanlite.recipe.sections import Data


@pytest.fixture
def many(tmp_path: Path) -> Path:
    for number in range(400):
        (tmp_path / f"{number}.txt").write_text(f"<{number}>")
    return tmp_path


def all_of(source: Source) -> list[int]:
    return source.beginning(source.tokens).tolist()


def texts(stream: list[int]) -> list[bytes]:
    """The documents of a stream of byte tokens."""
    assert stream[-1] == 256
    documents: list[bytearray] = [bytearray()]
    for token in stream:
        documents.append(bytearray()) if token == 256 else documents[-1].append(token)
    return [bytes(document) for document in documents[:-1]]


def test_documents_go_to_one_side_each(many: Path) -> None:
    splits = open_data(Data(corpus=str(many), validation_percent=10.0), sequence_length=8, seed=0)
    sides = [*splits.train.sources, *splits.validation]
    train, held = (texts(all_of(side)) for side in sides)
    assert sorted(train + held) == sorted(f"<{number}>".encode() for number in range(400))
    assert 20 < len(held) < 60  # 40 expected; 3 standard deviations are 18
    assert [len(side.streams[0].document_ends()) for side in sides] == [len(train), len(held)]


def test_a_document_stays_on_its_side(many: Path) -> None:
    """Whatever the seed is, whichever documents come or go; and a larger share only adds."""

    def held(percent: float, seed: int = 0) -> set[bytes]:
        splits = open_data(Data(corpus=str(many), validation_percent=percent), sequence_length=8, seed=seed)
        return set(texts(all_of(splits.validation[0])))

    before = held(10.0)
    assert held(10.0, seed=7) == before < held(30.0)
    for number in range(0, 400, 2):
        (many / f"{number}.txt").unlink()
    assert held(10.0) == {text for text in before if int(text[1:-1]) % 2}


def test_a_single_file_is_cut(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4
    (tmp_path / "only.txt").write_bytes(content)
    splits = open_data(Data(corpus=str(tmp_path / "only.txt"), validation_percent=25.0), sequence_length=16, seed=0)
    assert texts(all_of(splits.train.sources[0])) == [content[:768]]
    assert texts(all_of(splits.validation[0])) == [content[768:]]


def test_too_short(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_bytes(b"x" * 100)
    section = Data(corpus=str(tmp_path / "short.txt"), validation_percent=10.0)
    # 90 bytes and a separator to train on, 10 and a separator held out.
    with pytest.raises(DataError, match=r"short\.txt.* 91 tokens, .* 92 .*lower data\.validation_percent"):
        open_data(section, sequence_length=91, seed=0)
    with pytest.raises(DataError, match=r" 11 tokens, .* 12 .*higher data\.validation_percent"):
        open_data(section, sequence_length=11, seed=0)
    assert open_data(section, sequence_length=11, seed=0, validated=False).train.windows == 8
    assert open_data(section, sequence_length=90, seed=0, validated=False).train.windows == 1
    assert open_data(section, sequence_length=10, seed=0).validation[0].windows == 1


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": ""}\n'])
def test_nothing_but_empty_texts(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"data\.corpus = .* no text"):
        open_data(Data(corpus=str(tmp_path)), sequence_length=8, seed=0)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**63 - 1))
def test_an_epoch_reads_every_window_once(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    path = tmp_path_factory.mktemp("corpus") / "x.txt"
    path.write_bytes(bytes(range(250)))
    train = open_data(Data(corpus=str(path)), sequence_length=16, seed=seed, validated=False).train
    for epoch in range(2):
        firsts = [int(train.sample(epoch * train.windows + i)[0]) for i in range(train.windows)]
        assert sorted(firsts) == list(range(0, 16 * train.windows, 16))


def test_no_text_has_no_baselines() -> None:
    """Held-out documents may be nothing but special tokens."""
    tokens = np.array([257, 256, 256], np.uint16)
    source = split_of(tokens, open_tokenizer("bytes", special_tokens=("<|x|>",)), sequence_length=2).sources[0]
    assert compression_baselines(source) == {}


def test_compression_baselines(tmp_path: Path) -> None:
    text = Path(__file__).read_bytes()
    (tmp_path / "x.txt").write_bytes(text)
    split = open_data(Data(corpus=str(tmp_path), validation_percent=50.0), sequence_length=16, seed=0).train.sources[0]
    kept = text[: len(text) - round(len(text) / 2)]
    assert compression_baselines(split) == pytest.approx(
        {
            "gzip -9": 8 * len(gzip.compress(kept, 9)) / len(kept),
            "xz -9": 8 * len(lzma.compress(kept, preset=9)) / len(kept),
        }
    )
    assert compression_baselines(split, limit_bytes=100)["gzip -9"] == pytest.approx(
        8 * len(gzip.compress(kept[:100], 9)) / 100
    )
