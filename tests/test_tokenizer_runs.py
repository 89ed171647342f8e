"""Runs with a tokenizer from a file: trained, validated, continued, exported; and never with another one in silence."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import bpe
from support.tiny import write_tiny
from transformers import AutoTokenizer

from titanlite.checkpoint.storage import newest_at, read_manifest
from titanlite.cli.main import main as cli
from titanlite.corpus.tokenizers import describe_separator, open_tokenizer
from titanlite.data.splits import open_data
from titanlite.recipe.load import load_recipe

TEXTS = ("def f(x):\n    return x  # don't", "12345 squared, é日本\r\n\n  <|endoftext|>", "")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the same small tokenizer as JSON and as ranks."""
    monkeypatch.chdir(tmp_path)
    level = bpe.byte_level()
    bpe.saved(level, tmp_path / "level", model_max_length=77)
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "tokenizer.model").write_bytes(bpe.ranks_of(level))
    return tmp_path


def recipe(folder: Path, tokenizer: str, rows: int = 416, **data: Any) -> None:
    write_tiny(
        folder, model={"vocab_size": rows}, data={"tokenizer": tokenizer, "validation_percent": 20.0, **data},
        training={"steps": 2}, validation={"every_steps": 2, "sequences": 4},
    )  # fmt: skip


def titanlite(*words: str) -> int:
    return cli([*words])


def with_json(folder: Path) -> None:
    recipe(folder, "level/tokenizer.json")


def with_ranks(folder: Path) -> None:
    recipe(folder, "ranks", rows=656)


def with_more_special_tokens(folder: Path) -> None:
    recipe(folder, "level", special_tokens=["<|a|>", "<|b|>"], separator="<|b|>")


@pytest.mark.parametrize(
    "write", [with_json, with_ranks, pytest.param(with_more_special_tokens, marks=pytest.mark.slow)]
)
def test_a_run_is_trained_continued_and_exported(
    folder: Path, write: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder)
    section = load_recipe("recipe.toml").recipe
    data = open_data(section.data, section.training.sequence_length, section.run.seed)
    (corpus,), (held_out,) = data.train.sources, data.validation
    tokens = corpus.beginning(corpus.tokens).tolist()
    assert tokens.index(data.tokenizer.separator) == len(tokens) - 1
    assert titanlite("train", "recipe.toml") == 0
    assert describe_separator(data.tokenizer) in capsys.readouterr().out  # issue 14, item 8
    lines = Path("runs/tiny/metrics.jsonl").read_text().splitlines()
    validation = [json.loads(line) for line in lines if "bits_per_byte" in line][-1]
    windows = [held_out.window(number * held_out.windows // 4) for number in range(4)]
    labels = [window[1:].tolist() for window in windows]
    text = b"".join(map(data.tokenizer.decode, labels))
    bits = validation["validation_loss"] * sum(map(len, labels)) / math.log(2)
    assert validation["bits_per_byte"] == pytest.approx(bits / len(text))

    for name in ("level", "ranks"):  # from here on the run's own copy is all there is
        shutil.rmtree(name)
    capsys.readouterr()
    assert titanlite("generate", "runs/tiny", "--prompt", "7 squared", "--tokens", "20", "--temperature", "9") == 0
    said = capsys.readouterr().out
    assert said.startswith("7 squared") and len(said) > 20
    assert titanlite("checkpoint", "export-hf", "runs/tiny", "out") == 0
    theirs = AutoTokenizer.from_pretrained("out")
    ours = open_tokenizer("out")
    for words in (*TEXTS, bpe.TEXT):
        ids = theirs(words, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == ours.encode(words.encode()).tolist() == data.tokenizer.encode(words.encode()).tolist()
    assert theirs.eos_token_id == ours.separator == data.tokenizer.separator
    for name in ("config.json", "generation_config.json"):
        assert json.loads(Path("out", name).read_text())["eos_token_id"] == data.tokenizer.separator


def test_what_is_imported_has_its_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_json(folder)
    assert titanlite("train", "recipe.toml") == 0
    assert titanlite("checkpoint", "export-hf", "runs/tiny", "out") == 0
    assert titanlite("checkpoint", "import-hf", "out", "imported") == 0
    assert 'data.tokenizer = "imported/tokenizer"' in capsys.readouterr().out
    assert load_recipe("imported/recipe.toml").recipe.data.tokenizer == str(folder / "imported/tokenizer")
    Path("imported").rename("moved")
    for run in ("runs/tiny", "moved"):
        assert titanlite("generate", run, "--prompt", "7 squared", "--tokens", "20", "--seed", "3") == 0
    said = capsys.readouterr().out.split("7 squared")[1:]
    assert said[0] == said[1] and len(said[0]) > 5
    assert titanlite("checkpoint", "export-hf", "moved", "again") == 0
    assert {file.name: file.read_bytes() for file in Path("again").iterdir()} == {
        file.name: file.read_bytes() for file in Path("out").iterdir()
    }


def test_weights_without_a_tokenizer_that_can_be_read_make_no_text(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Issue 14, item 3: a SentencePiece model alone, or no tokenizer at all, is not the byte tokenizer."""
    with_json(folder)
    assert titanlite("train", "recipe.toml") == 0
    assert titanlite("checkpoint", "export-hf", "runs/tiny", "out") == 0
    Path("out/tokenizer.json").unlink()
    for name, content in (("pieces", b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"), ("none", None)):
        Path("out/tokenizer_config.json").unlink(missing_ok=True)
        if content is None:
            Path("out/tokenizer.model").unlink()
        else:
            Path("out/tokenizer.model").write_bytes(content)
        assert titanlite("checkpoint", "import-hf", "out", name) == 0
        assert "no tokenizer: " in capsys.readouterr().out
        assert titanlite("generate", name, "--tokens", "3") == 2
        assert "data.tokenizer" in capsys.readouterr().err
        words = ("train", f"{name}/recipe.toml", "--training.steps=1", "--training.global_batch=2")
        words = (*words, "--data.corpus=corpus.txt")
        assert titanlite(*words) == 2
        assert "data.tokenizer" in capsys.readouterr().err
        assert titanlite(*words, "--data.tokenizer=level") == 0
        assert titanlite("checkpoint", "export-hf", name, f"{name}-again") == 0
        assert not list(Path(f"{name}-again").glob("tokenizer*.json"))
    with_ranks(folder)
    assert titanlite("train", "recipe.toml", "--run.name=ranks") == 0
    assert titanlite("checkpoint", "export-hf", "runs/ranks", "ranked") == 0
    Path("ranked/tokenizer.json").unlink()
    shutil.copy("ranks/tokenizer.model", "ranked")
    assert titanlite("checkpoint", "import-hf", "ranked", "tuned") == 0
    assert titanlite("generate", "tuned", "--tokens", "3") == 0


def test_another_tokenizer_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_json(folder)
    assert titanlite("train", "recipe.toml", "--run.stop_after_step=1") == 75
    values = read_manifest(newest_at(Path("runs/tiny"))).values
    assert values["tokenizer"] == open_tokenizer("level").fingerprint
    bpe.saved(bpe.byte_level(390), folder / "level")
    assert titanlite("train", "recipe.toml") == 2
    said = capsys.readouterr().err
    assert "the tokenizer is not what it was when the checkpoint of step 1" in said
    assert open_tokenizer("runs/tiny/tokenizer").vocab_size == 401, "the run's copy is the old one"
    shutil.rmtree("runs/tiny/tokenizer")
    assert titanlite("checkpoint", "export-hf", "runs/tiny", "out") == 2
    assert "was trained with another tokenizer than level/tokenizer.json" in capsys.readouterr().err
    everything = ["--allow-change", "data.tokenizer", "--allow-change", "data.corpus"]
    assert titanlite("train", "recipe.toml", *everything) == 0
    assert open_tokenizer("runs/tiny/tokenizer").vocab_size == 391
    change = [*everything, "--allow-change", "data.*", "--allow-change", "training.steps"]
    recipe(folder, "ranks", special_tokens=["</s>"])
    assert titanlite("train", "recipe.toml", *change, "--training.steps=3") == 0
    assert [file.name for file in Path("runs/tiny/tokenizer").iterdir()] == ["tokenizer.model"]
    recipe(folder, "bytes")
    assert titanlite("train", "recipe.toml", *change, "--training.steps=4") == 0
    assert not Path("runs/tiny/tokenizer").exists()


@pytest.mark.parametrize(
    ("tokenizer", "rows", "said"),
    [
        ("level", 400, ("model.vocab_size: ", "'level' has 401 tokens", "400 rows", "write 416, ")),
        ("bytes", 256, ("model.vocab_size: ", "'bytes' has 257 tokens", "256 rows", "write 272, ")),
        ("nowhere.json", 416, ("data.tokenizer: there is no tokenizer 'nowhere.json'",)),
        ("corpus.txt", 416, ("data.tokenizer: 'corpus.txt' is no tokenizer by its name",)),
    ],
)
def test_check_says_what_is_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str], tokenizer: str, rows: int, said: tuple[str, ...]
) -> None:
    recipe(folder, tokenizer, rows)
    assert titanlite("check", "recipe.toml") == 2
    printed = capsys.readouterr().err
    assert all(part in printed for part in said)


def test_a_text_that_the_tokenizer_cannot_take_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bpe.saved(bpe.sentencepiece_like(), folder / "pieces")
    recipe(folder, "pieces")
    (folder / "corpus.txt").write_bytes(b"good \xff" * 100)
    assert titanlite("train", "recipe.toml") == 2
    assert "corpus.txt: not UTF-8: byte 0xff at position 6 of the text" in capsys.readouterr().err


def test_wide_ids_reach_the_model(folder: Path) -> None:
    """Ids above 65,535, which two bytes would cut off."""
    fields = json.loads((folder / "level" / "tokenizer.json").read_text())
    fields["model"]["vocab"]["<|last|>"] = 70_000
    fields["added_tokens"] = [{**fields["added_tokens"][0], "id": 70_000, "content": "<|last|>"}]
    (folder / "level" / "tokenizer.json").write_text(json.dumps(fields))
    recipe(folder, "level", rows=70_016, separator="<|last|>")
    section = load_recipe("recipe.toml").recipe
    data = open_data(section.data, 16, 0)
    (corpus,) = data.train.sources
    tokens = corpus.beginning(corpus.tokens)
    assert tokens.tolist().index(70_000) == len(tokens) - 1 and data.tokenizer.separator == 70_000
    assert tokens.dtype.name == "int32"
