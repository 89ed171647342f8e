from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from errno import EACCES
from pathlib import Path

import jsonschema
import pytest

from titanlite import __version__
from titanlite.cli.main import COMMANDS, HELP, main, run_command
from titanlite.errors import (
    CheckpointError,
    Finding,
    GuardStop,
    NonfiniteFound,
    RecipeError,
    StoppedEarly,
    TitanliteError,
    UsageError,
)
from titanlite.recipe.explain import json_schema

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run_main(*argv: str) -> tuple[int, str, str]:
        code = main(argv)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run_main


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text("[training]\nsteps = 5\n[run]\nname = 'x'\n")
    return path


def test_help_lists_every_command(run: Run) -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert all(f"  {name} " in out for name in COMMANDS)
    assert list(HELP) == list(COMMANDS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train", "{recipe}", "--force"), "--fresh"),
        (("check", "{recipe}", "--world", "9" * 400), "2^31"),
        (("check", "{recipe}", "training.steps=3"), "--training.steps=VALUE"),
        (("check", "{recipe}", "-training.steps=3"), "--training.steps=VALUE"),
        (("check", "{recipe}", f"--training.tokens={'9' * 5000}T"), "is not a count"),
        (("check", "{recipe}", f"--data.corpus={'[' * 3000}"), "data.corpus: "),
    ],
)
def test_odd_words_are_refused_in_a_sentence(run: Run, recipe: Path, words: tuple[str, ...], said: str) -> None:
    """Issue 14, section D and item 27."""
    code, _, err = run(*(word.replace("{recipe}", str(recipe)) for word in words))
    assert code == 2 and err.startswith("error: ") and said in err


def test_a_folder_that_may_not_be_read_is_named(run: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever command meets it; issue 14, section D. Root may read everything, so the refusal is made up."""

    def refuse(path: object, **_: object) -> None:
        raise PermissionError(EACCES, os.strerror(EACCES), str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    for words in (("checkpoint", "inspect", "shut"), ("check", str(recipe), "--data.corpus=shut")):
        code, _, err = run(*words)
        assert code == 2 and err.startswith("error: shut") and os.strerror(EACCES) in err


def test_no_command_is_a_usage_error(run: Run) -> None:
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err.startswith("usage: titanlite COMMAND")


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"titanlite {__version__}\n", "")


def test_unknown_command(run: Run) -> None:
    assert run("chek") == (2, "", "error: titanlite has no command 'chek'; did you mean 'check'?\n")
    assert run("--zzz")[0] == 2


@pytest.mark.parametrize("command", [("check",), ("schema",), ("data",), ("data", "prepare")])
def test_each_command_has_help(run: Run, command: tuple[str, ...]) -> None:
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert out.startswith(f"usage: titanlite {command[0]}")


def as_rank(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two."""
    place = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)


class TestCheck:
    def test_report(self, run: Run, recipe: Path) -> None:
        code, out, err = run("check", str(recipe))
        assert (code, err) == (0, "")
        assert "40.96K tokens = 5 steps x 32 sequences x 256 tokens" in out
        assert str(Path("runs") / "x") in out

    def test_warnings_are_in_the_report(self, run: Run, recipe: Path) -> None:
        code, out, _ = run("check", str(recipe), "--world", "3", "--schedule.decay_shape=sqrt")
        assert code == 0
        assert f"warning: {recipe}:1: training.global_batch: 3 ranks x 1 microbatch of 11 = 33 sequences" in out
        assert "warning: command line: schedule.decay_shape: has no effect here" in out

    def test_json(self, run: Run, recipe: Path) -> None:
        code, out, _ = run("check", str(recipe), "--world=4", "--json", "--training.steps", "7")
        report = json.loads(out)
        assert code == 0
        assert (report["steps"], report["tokens"], report["global_batch"]) == (7, 7 * 32 * 256, 32)
        assert (report["mesh"], report["microbatches"], report["microbatch"]) == (
            {"pp": 1, "dp_replicate": 1, "dp_shard": 4, "cp": 1, "tp": 1},
            1,
            8,
        )
        assert report["parameters"] > report["embedding_parameters"] > 0
        assert report["findings"] == []

    def test_json_of_a_wrong_recipe(self, run: Run, recipe: Path) -> None:
        for override, key in [("--training.steps=0", "training.steps"), ("--model.kv_heads=3", "model.kv_heads")]:
            code, out, err = run("check", str(recipe), "--json", override)
            assert (code, err) == (2, "")
            (finding,) = json.loads(out)["findings"]
            assert (finding["key"], finding["file"], finding["severity"]) == (key, "command line", "error")

    def test_explain(self, run: Run) -> None:
        code, out, _ = run("check", "--explain", "training.steps")
        assert code == 0
        assert "a whole number, at least 1" in out
        as_json = json.loads(run("check", "--explain", "training.steps", "--json")[1])
        assert (as_json["type"], as_json["minimum"]) == ("integer", 1)
        assert "description" in json.loads(run("check", "--explain", "data.sources.path", "--json")[1])
        assert run("check", "--explain", "training.setps")[2].endswith("did you mean 'training.steps'?\n")

    def test_data_by_names_sizes_and_sidecars(self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Issue 14, item 21."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "a").mkdir()
        for name in "xyz":
            (tmp_path / "a" / f"{name}.txt").write_text("abc " * 100)
        assert run("data", "prepare", "a/x.txt", "--out", "tokens")[0] == 0
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(
            "[training]\nsteps = 5\n[data]\npacking = 'best_fit'\ntokenizer = 'bytes'\n"
            "[[data.sources]]\nname = 'web'\npath = 'a'\nweight = 3.0\n"
            "[[data.sources]]\nname = 'wiki'\npath = ['tokens', 'nowhere/*.txt']\nweight = 1.0\n"
            "[[data.validation]]\nname = 'news'\npath = 'absent.jsonl'\n[validation]\nevery_steps = 2\n"
        )
        code, out, _ = run("check", str(recipe), "--json")
        report = json.loads(out)
        web, wiki = report["data"]["sources"]
        (news,) = report["data"]["validation"]
        assert code == 0
        assert (web["files"], web["bytes"], web["tokens"], web["weight"]) == (3, 1200, 0, 3.0)
        assert (wiki["files"], wiki["bytes"], wiki["tokens"], wiki["weight"]) == (1, 802, 401, 1.0)
        assert (news["files"], news["paths"]) == (0, ["absent.jsonl"])
        assert (report["data"]["tokenizer_tokens"], report["data"]["separator"], report["vocab_size"]) == (
            257,
            256,
            272,
        )
        missing = [(each["key"], each["line"], each["severity"]) for each in report["findings"]]
        keys = [("data.sources.1.path", 12), ("data.validation.0.path", 16), ("data.validation_percent", 3)]
        assert missing == [(*key, "warning") for key in keys]
        assert (
            "nowhere/*.txt" in report["findings"][0]["problem"] and "absent.jsonl" in report["findings"][1]["problem"]
        )
        code, out, _ = run("check", str(recipe))
        assert code == 0
        for part in ("257 of the 272 rows", "id 256", "3 files", "401 tokens", "weight 3", "best_fit", "absent.jsonl"):
            assert part in out

    def test_bytes_of_states_of_a_step_and_of_a_checkpoint(self, run: Run, recipe: Path) -> None:
        """Issue 14, items 21 and 27. A checkpoint has the weights and AdamW's two moments, in float32."""
        assert "without activations" in run("check", str(recipe))[1]
        assert "with activations" in run("check", str(recipe), "--dry-run")[1]
        report = json.loads(run("check", str(recipe), "--json")[1])
        assert report["checkpoint_bytes"] == 3 * 4 * report["parameters"]

    def test_show_plan(self, run: Run, recipe: Path) -> None:
        words = ("check", str(recipe), "--world=2", "--parallel.tp=2", "--show-plan")
        code, out, err = run(*words)
        assert (code, err) == (0, "")
        assert "layers.*.attention.wq" in out
        assert "128 x 128 -> 64 x 128" in out
        code, out, _ = run(*words, "--json")
        printed = json.loads(out)
        assert (code, list(printed)) == (0, ["plan", "findings"])
        assert {"modules", "style", "over", "told", "whole", "local"} == set(printed["plan"][0])
        code, out, _ = run(*words, "--json", "--world=1")
        assert (code, list(json.loads(out))) == (2, ["findings"])

    @pytest.mark.parametrize(
        "argv",
        [
            *[[], ["no-such.toml"], ["--world=0", "RECIPE"], ["--world=x", "RECIPE"], ["RECIPE", "RECIPE"]],
            *[["RECIPE", "--steps=5"], ["RECIPE", "--training.stps=5"], ["RECIPE", "--training.steps"]],
        ],
    )
    def test_wrong_usage(self, run: Run, recipe: Path, argv: list[str]) -> None:
        code, out, err = run("check", *[str(recipe) if word == "RECIPE" else word for word in argv])
        assert (code, out) == (2, "")
        assert "error: " in err
        assert "Traceback" not in err

    @pytest.mark.parametrize(
        ("text", "place"),
        [
            ("[training]\nsteps = 0", ":2: training.steps: "),
            ("[training\n", ":1: not TOML: "),
            ("[training]\nsteps=1\n[model]\nkv_heads=3", ":4: model.kv_heads: "),
            ("", ": training: "),
        ],
    )
    def test_a_wrong_recipe_ends_with_2_and_its_place(self, run: Run, recipe: Path, text: str, place: str) -> None:
        recipe.write_text(text)
        code, out, err = run("check", str(recipe))
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {recipe}{place}")

    def test_many_errors_at_once(self, run: Run, recipe: Path) -> None:
        recipe.write_text("[training]\nsteps = 0\nstep = 1\n[model]\nheads = 0\n")
        code, _, err = run("check", str(recipe))
        assert code == 2
        first, *rest = err.strip().split("\n")
        assert first == "error: 3 things are wrong with the recipe:"
        assert [line.removeprefix(str(recipe)).split(": ")[:2] for line in rest] == [
            [":2", "training.steps"],
            [":3", "training.step"],
            [":5", "model.heads"],
        ]


def test_schema_is_what_editors_get(run: Run) -> None:
    code, out, _ = run("schema")
    assert code == 0
    jsonschema.Draft202012Validator.check_schema(json.loads(out))
    assert json.loads(out) == json_schema()
    assert run("schema", "--markdown")[1].startswith("# Recipe reference")


def raising(error: BaseException) -> Callable[[list[str]], int]:
    def command(argv: list[str]) -> int:
        raise error

    return command


class TestRunCommand:
    @pytest.mark.parametrize(
        ("error", "code", "said"),
        [
            (UsageError("no such file"), 2, "error: no such file\n"),
            (
                RecipeError([Finding("a.b", "is wrong;", "mend it.", "f", 3)]),
                2,
                "error: f:3: a.b: is wrong; mend it.\n",
            ),
            (GuardStop("NaN"), 3, "error: NaN\n"),
            (CheckpointError("none fits"), 4, "error: none fits\n"),
            (StoppedEarly("stopped at step 3, saved"), 75, "stopped at step 3, saved\n"),
            (KeyboardInterrupt(), 130, ""),
        ],
    )
    def test_an_error_is_a_paragraph_and_its_code(
        self, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
    ) -> None:
        assert run_command(raising(error), []) == code
        assert capsys.readouterr() == ("", said)
        assert run_command(raising(error), ["--traceback"]) == code
        assert ("Traceback" in capsys.readouterr().err) == isinstance(error, TitanliteError)

    @pytest.mark.parametrize(
        ("error", "printed"),
        [
            (GuardStop("NaN"), False),
            (StoppedEarly("stopped after step 3"), False),
            (NonfiniteFound("NaN in ffn"), True),
            (UsageError("this rank's own disk"), True),
        ],
    )
    def test_a_rank_that_is_not_the_first_prints_what_only_it_may_have_met(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: TitanliteError, printed: bool
    ) -> None:
        for rank, prints in (("0", True), ("1", printed)):
            as_rank(rank, monkeypatch)
            assert run_command(raising(error), []) == error.exit_code
            assert (str(error) in capsys.readouterr().err) == prints

    def test_the_command_does_not_see_traceback(self) -> None:
        seen: list[str] = []
        assert run_command(lambda argv: seen.extend(argv) or 0, ["a", "--traceback", "b"]) == 0
        assert seen == ["a", "b"]

    def test_our_own_mistakes_are_not_hidden(self) -> None:
        with pytest.raises(ZeroDivisionError):
            run_command(raising(ZeroDivisionError()), [])


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "titanlite", "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


def test_what_the_terminal_cannot_show_is_escaped() -> None:
    command = [sys.executable, "-m", "titanlite", "check", "--explain", "schedule.decay_shape"]
    process = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert (process.returncode, process.stderr) == (0, b"")
    assert rb"H\xe4gele" in process.stdout


@pytest.mark.parametrize(("arguments", "code"), [("schema", 0), ("check no-such.toml", 2)])
def test_closed_streams_change_nothing(arguments: str, code: int) -> None:
    command = f"exec {sys.executable} -m titanlite {arguments} >&- 2>&-"
    assert subprocess.run(["sh", "-c", command]).returncode == code


def test_help_loads_nothing_that_takes_time() -> None:
    script = (
        "import sys\nfrom titanlite.cli.main import main\nmain(['--help'])\n"
        "assert not {'torch', 'pydantic', 'numpy', 'rich'} & set(sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0
