"""Training a tokenizer: the same files from the same texts, of what was asked for, and nothing overwritten."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from titanlite.cli.main import main as cli
from titanlite.corpus.corpora import is_held_out
from titanlite.corpus.tokenizers import open_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    (tmp_path / "texts").mkdir()
    for number in range(20):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{number}\nsquared is {number**2}, dass weiß ein Kind. " * 9)
    return str(tmp_path / "texts")


def train(*words: str) -> int:
    return cli(["data", "train-tokenizer", *words])


def test_what_is_asked_for(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "out"
    assert train(corpus, "--out", str(out), "--vocab-size", "280", "--special-token", "<|fim|>") == 0
    assert f"{out / 'tokenizer.json'}: 280 tokens, of 20 documents" in capsys.readouterr().out
    tokenizer = open_tokenizer(str(out))
    assert (tokenizer.vocab_size, tokenizer.separator) == (280, 278)
    assert tokenizer.special_tokens == {"<|end_of_text|>": 278, "<|fim|>": 279}
    assert sorted(tokenizer.decode(number) for number in range(256)) == [bytes([byte]) for byte in range(256)]
    text = b"9 squared is 81, dass wei\xc3\x9f ein Kind. \xff<|fim|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    # The first merge is the most frequent pair of neighbours within a word, a number or a sign.
    pairs: Counter[bytes] = Counter()
    for file in Path(corpus).iterdir():
        for line in file.read_bytes().replace(b".", b"").replace(b",", b"").split(b"\n"):
            first, *others = line.split(b" ")
            for word in (first, *(word if word.isdigit() else b" " + word for word in others)):
                pairs.update(word[n : n + 2] for n in range(len(word) - 1))
    assert pairs[tokenizer.decode(256)] == max(pairs.values())


def test_the_same_texts_give_the_same_bytes(corpus: str, tmp_path: Path) -> None:
    """Other processes, other hash seeds, one thread or several."""
    found = set()
    for threads in ("false", "true"):
        out = tmp_path / threads
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": threads}
        command = [sys.executable, "-m", "titanlite", "data", "train-tokenizer", corpus, "--out", str(out)]
        done = subprocess.run([*command, "--vocab-size", "300"], cwd=ROOT, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr
        found.add(tuple((file.name, file.read_bytes()) for file in sorted(out.iterdir())))
    assert [name for name, _ in found.pop()] == ["tokenizer.json", "tokenizer_config.json"] and not found


def test_a_small_corpus_gives_fewer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text('{"words": "abab"}\n')
    arguments = [str(tmp_path / "x.jsonl"), "--out", str(tmp_path), "--vocab-size", "999", "--separator", "</s>"]
    assert train(*arguments, "--text-key", "words") == 0
    assert "fewer than --vocab-size 999" in capsys.readouterr().out
    tokenizer = open_tokenizer(str(tmp_path))
    assert tokenizer.vocab_size == 258 and tokenizer.special_tokens == {"</s>": 257}
    assert tokenizer.encode(b"abab").tolist() == [256, 256]


def test_held_out_documents_are_left_out(corpus: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    for file in Path(corpus).iterdir():
        if not is_held_out(file.name, 40):
            (kept / file.name).write_bytes(file.read_bytes())
    assert 0 < len(list(kept.iterdir())) < 20
    arguments = ["--vocab-size", "300"]
    assert train(corpus, "--out", str(tmp_path / "a"), "--held-out", "40", *arguments) == 0
    assert train(str(kept), "--out", str(tmp_path / "b"), *arguments) == 0
    assert open_tokenizer(str(tmp_path / "a")).fingerprint == open_tokenizer(str(tmp_path / "b")).fingerprint


def test_nothing_is_overwritten_unasked(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("mine")
    arguments = [corpus, "--out", str(tmp_path), "--vocab-size", "300"]
    assert train(*arguments) == 2
    assert "is there already" in capsys.readouterr().err and file.read_text() == "mine"
    assert train(*arguments, "--force") == 0
    assert json.loads(file.read_text())["model"]["type"] == "BPE"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--vocab-size", "256"], "must be at least 257"),
        (["--vocab-size", "257", "--special-token", "<a>"], "must be at least 258, for 256 bytes and 2 special tokens"),
        (["--vocab-size", "300", "--separator", "<a>", "--special-token", "<a>"], "--special-token names '<a>' twice"),
        (["--vocab-size", "300", "--special-token", "squared"], "the corpus makes 'squared' a token by itself"),
        (["--vocab-size", "300", "--held-out", "100"], "--held-out must be"),
    ],
)
def test_wrong_arguments(
    corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert train(corpus, "--out", str(tmp_path / "out"), *arguments) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text("\n")
    assert train(str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "out"), "--vocab-size", "300") == 2
    assert "no text at all" in capsys.readouterr().err
    assert train(str(tmp_path / "y.jsonl"), "--out", str(tmp_path / "out"), "--vocab-size", "300") == 2
    assert "y.jsonl" in capsys.readouterr().err and not (tmp_path / "out").exists()
