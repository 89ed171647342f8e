"""What a user can get wrong, through the command line: a clear paragraph, the right exit code, nothing lost on disk."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from titanlite import files as durable
from titanlite.checkpoint import storage
from titanlite.cli.checkpoint import main as checkpoint
from titanlite.cli.main import main as cli
from titanlite.cli.main import run_command
from titanlite.cli.train import main
from titanlite.recipe.explain import all_keys, key_schema

RECIPE = """
[run]
name = "tiny"
[model]
preset = "debug"
dim = 16
layers = 1
heads = 2
kv_heads = 1
ffn_dim = 24
[data]
corpus = "corpus.txt"
[training]
steps = 4
sequence_length = 16
global_batch = 2
[precision]
compute = "float32"
[checkpoint]
every_steps = 2
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a good recipe and corpus, for each test to spoil."""
    (tmp_path / "corpus.txt").write_text("".join(f"{n} squared is {n * n}.\n" for n in range(200)))
    (tmp_path / "recipe.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """Start the recipe, see it refused with `code` and one paragraph, and return what was said."""
    capsys.readouterr()
    before = snapshot()
    assert run_command(main, ["recipe.toml", *arguments]) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Traceback" not in said
    after = snapshot()
    told = {Path("runs/tiny/status.json"), *Path("runs/tiny/logs").glob("*.log")}
    lost = {name for name in before if before[name] != after.get(name)} - told
    assert not lost, f"changed or lost: {lost}"
    return said


def snapshot() -> dict[Path, str]:
    files = (path for path in Path().rglob("*") if path.is_file() and path.name != ".lock")
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (("steps = 4", "stepps = 4"), ["recipe.toml:14: training.stepps", "training.steps"]),
        (("dim = 16", "dim = 17"), ["recipe.toml:6: model.dim", "17"]),
        (("[run]", "[run"), ["recipe.toml:2"]),
        (("sequence_length = 16", "sequence_length = 100000"), ["corpus.txt", "100,001"]),
        (('corpus = "corpus.txt"', 'corpus = "absent.txt"'), ["absent.txt"]),
        (('corpus = "corpus.txt"', 'corpus = "*.nothing"'), ["*.nothing"]),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_a_wrong_recipe_is_refused_by_file_line_and_key(
    folder: Path, capsys: pytest.CaptureFixture[str], spoil: tuple[str, str], expected: list[str]
) -> None:
    text = RECIPE.replace(*spoil, 1)
    assert text != RECIPE
    Path("recipe.toml").write_text(text)
    said = refused(capsys)
    for words in expected:
        assert words in said
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


@pytest.mark.parametrize(
    ("path", "content", "words", "said"),
    [
        ("corpus.txt", b"", "", "corpus.txt"),
        ("corpus.jsonl", b'{"text": "fine"}\n{"text": "\xff\xfe"}\n', "--data.corpus=corpus.jsonl", "corpus.jsonl:2"),
        ("runs/tiny", b"mine", "", "runs/tiny is a file"),
        ("runs/tiny/thesis.tex", b"mine", "--fresh --force", "thesis.tex"),
        ("x", b"", "--run.output_dir=/dev/null", "/dev/null/tiny"),
        ("x", b"", "--resume", "resume"),
    ],
)
def test_files_that_are_in_the_way_or_missing_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str], path: str, content: bytes, words: str, said: str
) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)
    assert said in refused(capsys, *words.split())


def test_text_of_any_bytes_trains(folder: Path) -> None:
    Path("corpus.txt").write_bytes(bytes(range(256)) * 20)
    assert run_command(main, ["recipe.toml"]) == 0


PATHS = {
    key: '[{name = "a", path = {}}]' if key in ("data.sources", "data.validation") else "PATH"
    for key in all_keys()
    if '"format": "path"' in json.dumps([key_schema(tuple(key.split("."))), key_schema((*key.split("."), "0"))])
}
"""Every key that holds a path, or tables with one -> how a path is written there."""


def test_what_the_schema_calls_a_path() -> None:
    assert set(PATHS) == {
        *("run.output_dir", "data.corpus", "data.sources", "data.validation", "data.tokenizer"),
        *("checkpoint.warm_start", "checkpoint.resume_from", "resilience.snapshot_dir"),
    }


@pytest.mark.parametrize("key", [*PATHS, "run.name"])
@pytest.mark.parametrize(
    "path",
    ["~nobodyx/a", "~nobodyx/*.txt", "\udcff", "a\0b", "n" * 256, "n/" * 2048],
    ids=["nobody", "nobodys-glob", "no-utf-8", "nul", "long-name", "long"],
)
def test_what_cannot_be_a_path_is_refused_by_its_key(
    folder: Path, capsys: pytest.CaptureFixture[str], key: str, path: str
) -> None:
    """Issue 14, section D: one type for every path key."""
    text = json.dumps(path) if path.isprintable() else f'"{path}"'.replace("\0", "\\u0000")
    written = PATHS.get(key, "PATH").replace("PATH", text)
    others = ["--validation.every_steps=2"] if key == "data.validation" else []
    if key == "data.sources":
        Path("recipe.toml").write_text(RECIPE.replace('corpus = "corpus.txt"', ""))
    assert f"command line: {key}" in refused(capsys, f"--{key}={written}", *others)
    if key == "data.corpus":
        said = refused(capsys, f'--data.corpus=["corpus.txt", {text}]')
        assert "command line: data.corpus" in said and "must be text" not in said


def test_a_home_folder_is_meant_by_a_tilde_in_every_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Issue 14, section D: `run.output_dir` left `~` as it was, where data paths expanded it."""
    home = folder / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    shutil.move("corpus.txt", home)
    words = ["recipe.toml", "--data.corpus=~/corpus.txt", "--run.output_dir=~/out"]
    assert run_command(main, words) == 0
    assert (home / "out" / "tiny" / "status.json").is_file() and not Path("~").exists()
    assert run_command(main, [*words, "--run.name=second", "--checkpoint.warm_start=~/out/tiny"]) == 0
    assert "begins with the weights" in capsys.readouterr().out
    assert run_command(checkpoint, ["inspect", "~/out/tiny"]) == 0


@pytest.mark.parametrize("path", ["~nobodyx/a", "n" * 256])
@pytest.mark.parametrize(
    "words",
    [
        *("data prepare PATH --out a", "data prepare corpus.txt --out PATH", "data prepare a --out a --tokenizer PATH"),
        *("data show PATH --step 1", "data verify PATH", "data audit PATH", "data train-tokenizer PATH --out a"),
        *("checkpoint inspect PATH", "checkpoint diff a PATH", "checkpoint import-hf PATH a", "generate PATH"),
    ],
)
def test_what_cannot_be_a_path_on_the_command_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: str, path: str
) -> None:
    assert cli(words.replace("PATH", path).split()) == 2
    assert path[:8] in capsys.readouterr().err


@pytest.mark.parametrize("depth", [400, 1000, 5000])
def test_what_is_nested_deeply_is_refused(folder: Path, capsys: pytest.CaptureFixture[str], depth: int) -> None:
    """Issue 14, section D: values and keys, on the command line and in files."""
    refused(capsys, "--model.dim=" + "[" * depth + "]" * depth)
    assert "data.corpus: " in refused(capsys, "--data.corpus=" + "[" * depth)
    refused(capsys, "--" + "a." * depth + "b=1")
    Path("recipe.toml").write_text("a." * depth + "b = 1\n")
    refused(capsys)
    Path("recipe.toml").write_text("a = " + "[" * depth + "]" * depth)
    refused(capsys)


@pytest.mark.parametrize("key", ["model.dim", "model.ffn_dim", "model.vocab_size", "training.sequence_length"])
def test_sizes_whose_products_exceed_64_bits_are_still_counted(
    folder: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    """Nothing overflows: what no checkpoint could hold is refused for its parts, and a long sequence is counted."""
    code = cli(["check", "recipe.toml", f"--{key}={2**62}", "--json"])
    answer = json.loads(capsys.readouterr().out)
    if key.startswith("training"):
        assert code == 0 and answer["flops_per_token"] > 2**62
    else:
        assert code == 2 and [finding["key"] for finding in answer["findings"]] == ["model"]


def test_a_full_disk_at_the_start(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "free" in refused(capsys)
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    # Nothing was trained yet, so that the corrected recipe is no other run's.
    assert run_command(main, ["recipe.toml", "--model.ffn_dim=8"]) == 0


@pytest.mark.slow
def test_a_disk_that_fills_up_during_a_save(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save of step 4 finds no room: exit code 4, and the checkpoint of step 2 still loads."""
    assert run_command(main, ["recipe.toml", "--run.stop_after_step=2"]) == 75
    sync = durable.sync_path

    def full(path: Path) -> None:
        if "step-00000004" in str(path):
            raise OSError(28, "No space left on device", str(path))
        sync(path)

    monkeypatch.setattr(storage, "sync_path", full)
    kept = Path("runs/tiny/checkpoints/step-00000002/manifest.json").read_bytes()
    assert run_command(main, ["recipe.toml"]) == 4
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in Path("runs/tiny/checkpoints").iterdir()] == ["step-00000002"]
    assert Path("runs/tiny/checkpoints/step-00000002/manifest.json").read_bytes() == kept
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert run_command(main, ["recipe.toml"]) == 0


def test_the_run_folder_of_another_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["recipe.toml"]) == 0
    said = refused(capsys, "--model.layers=2", "--optimizer.lr=0.5")
    assert "model.layers" in said and "optimizer.lr" in said and "0.5" in said


def test_a_model_too_large_for_the_memory(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, f"--training.global_batch={2**62}")
    assert "memory is full" in said and "training.microbatch" in said
    assert run_command(main, ["recipe.toml", "--run.name=second", "--run.stop_after_step=2"]) == 75
    assert run_command(main, ["recipe.toml", "--run.name=second", "--training.microbatch=1"]) == 0


def test_fresh_does_not_overwrite_without_force(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["recipe.toml"]) == 0
    assert "--force" in refused(capsys, "--fresh")
    assert run_command(main, ["recipe.toml", "--fresh", "--force"]) == 0


def test_a_finished_run_names_its_checkpoint_and_how_to_train_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Issue 14, item 26: each last line, and that what it proposes is accepted."""
    words = ["recipe.toml", "--validation.every_steps=2", "--data.validation_percent=20", "--schedule.name=constant"]
    assert run_command(main, words) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    rows = map(json.loads, Path("runs/tiny/metrics.jsonl").read_text().splitlines())
    loss = [row["validation_loss"] for row in rows if "validation_loss" in row][-1]
    assert last.startswith("done") and f"{loss:.4f}" in last and "runs/tiny/checkpoints/step-00000004" in last
    assert "titanlite generate runs/tiny --prompt" in last
    assert run_command(main, words) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("nothing is left") and "--checkpoint.warm_start=runs/tiny" in last
    on = re.search("raise ([a-z.]+) and add (--allow-change [a-z.]+);", last)
    assert on is not None
    assert run_command(main, [*words, f"--{on[1]}=6", *on[2].split()]) == 0
    assert "step-00000006" in capsys.readouterr().out.splitlines()[-1]


def test_a_pruned_step_is_answered_by_those_there_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Issue 14, item 27."""
    assert run_command(main, ["recipe.toml"]) == 0
    assert cli(["checkpoint", "inspect", "runs/tiny/3"]) == 2
    assert "there are steps 2, 4" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_fit_names_every_mismatch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A foreign checkpoint copied into the run's folder: every tensor that differs is named, with both shapes."""
    assert run_command(main, ["recipe.toml", "--run.stop_after_step=2"]) == 75
    assert run_command(main, ["recipe.toml", "--run.name=wide", "--model.ffn_dim=40", "--run.stop_after_step=2"]) == 75
    shutil.rmtree("runs/tiny/checkpoints/step-00000002")
    shutil.copytree("runs/wide/checkpoints/step-00000002", "runs/tiny/checkpoints/step-00000002")
    said = refused(capsys, "--run.stop_after_step=2", code=4)
    for name in ("gate", "up", "down"):
        assert f"model.layers.0.ffn.{name}.weight" in said
    assert "[40, 16]" in said and "[24, 16]" in said


def test_only_damaged_checkpoints(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["recipe.toml", "--run.stop_after_step=2"]) == 75
    for file in Path("runs/tiny/checkpoints/step-00000002").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    assert "no usable checkpoint" in refused(capsys, "--run.stop_after_step=2", code=4)


def test_generate_says_what_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from titanlite.cli.generate import main as generate

    assert run_command(generate, ["corpus.txt"]) == 2
    assert "recipe.toml" in capsys.readouterr().err
    assert run_command(main, ["recipe.toml", "--run.stop_after_step=2"]) == 75
    shutil.rmtree("runs/tiny/checkpoints/step-00000002")
    assert run_command(generate, ["runs/tiny"]) == 4
    assert "no checkpoint" in capsys.readouterr().err
    for wrong in ("--top-p=0", "--tokens=0", "--temperature=nan", "--temperature=-1", "--seed=-1", f"--seed={2**63}"):
        assert run_command(generate, ["runs/tiny", wrong]) == 2


def test_generate_takes_any_prompt_and_any_temperature(folder: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    from titanlite.cli.generate import main as generate

    assert run_command(main, ["recipe.toml", "--run.stop_after_step=2"]) == 75
    capfdbinary.readouterr()
    for prompt in ("\u00fc", "\udcff half a character"):
        for temperature in ("0", "1e-320", "1e300"):
            assert run_command(generate, ["runs/tiny", "--prompt", prompt, "--temperature", temperature]) == 0
    assert capfdbinary.readouterr().out.startswith("\u00fc".encode())
