"""`titanlite data audit` and `show` of whole runs, and batches that these pass over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.runs import rows
from support.tiny import train

from titanlite.cli.main import main as titanlite
from titanlite.data.read_log import RECORD, log_path
from titanlite.recipe.load import load_recipe
from titanlite.training.saving import Saving

BATCH = 2


TINY = {"checkpoint": {"every_steps": 2}}


@pytest.fixture
def json_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def json_of(*arguments: str, code: int = 0) -> Any:
        """What a command of `titanlite data` prints for machines."""
        capsys.readouterr()
        assert titanlite(["data", *arguments, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return json_of


def test_an_interrupted_run_has_the_digest_of_one_that_was_not(folder: Path, json_of: Callable[..., Any]) -> None:
    assert train("--run.name=whole") == 0
    for stop in (1, 3):
        assert train("--run.name=parts", f"--run.stop_after_step={stop}") == 75
    assert train("--run.name=parts", "--data.workers=1") == 0
    whole, parts = json_of("audit", "runs/whole"), json_of("audit", "runs/parts")
    assert (whole["steps"], whole["samples"], whole["lost"], whole["repeated"]) == (6, 6 * BATCH, 0, 0)
    assert parts == {**whole, "restarts": 2}


def test_losses_are_an_error(folder: Path, capsys: pytest.CaptureFixture[str], json_of: Callable[..., Any]) -> None:
    assert train() == 0
    path = log_path(Path("runs/tiny"), 0)
    np.delete(np.fromfile(path, RECORD), 3).tofile(path)
    assert titanlite(["data", "audit", "runs/tiny"]) == 3
    printed = capsys.readouterr()
    assert "lost        2: 6 to 7" in printed.out and "error: runs/tiny" in printed.err
    assert json_of("audit", "runs/tiny", code=3)["lost_samples"] == [[6, 7]]


def test_batches_are_passed_over_also_where_the_run_was_resumed(folder: Path, json_of: Callable[..., Any]) -> None:
    """The fourth and fifth batches, of samples 6 to 9, before step 4: which batch 6 is for then."""
    skip = "--data.skip_steps=[4, 5]"
    assert train("--run.name=whole", skip, "--data.workers=2") == 0
    (event,) = rows("whole", "data_skipped")
    assert event["step"] == 4 and event["values"] == {"samples": [6, 9]}
    assert train("--run.name=parts", "--run.stop_after_step=3") == 75
    assert train("--run.name=parts", skip, "--run.stop_after_step=4") == 75
    assert train("--run.name=parts", skip) == 0
    whole, parts = json_of("audit", "runs/whole"), json_of("audit", "runs/parts")
    assert whole["skipped"] == parts["skipped"] == [{"step": 4, "by": "data.skip_steps", "samples": [6, 9]}]
    assert whole["digest"] == parts["digest"] and whole["samples"] == 6 * BATCH
    manifest = json.loads(Path("runs/parts/checkpoints/step-00000006/manifest.json").read_text())
    assert manifest["samples"] == (6 + 2) * BATCH


def test_batches_that_the_run_is_past_are_named(folder: Path, json_of: Callable[..., Any]) -> None:
    assert train("--run.stop_after_step=3") == 75
    assert train("--data.skip_steps=[3, 2, 5, 9]") == 0
    log = Path("runs/tiny/logs/console.log").read_text()
    assert "data.skip_steps: no effect of [3, 2]" in log
    assert json_of("audit", "runs/tiny")["skipped"] == [{"step": 5, "by": "data.skip_steps", "samples": [8, 9]}]


def test_what_a_rollback_passes_over_is_reported(
    folder: Path, poison: Callable[[int], None], json_of: Callable[..., Any]
) -> None:
    poison(4)
    assert train("--resilience.on_nonfinite=rollback") == 0
    found = json_of("audit", "runs/tiny")
    (event,) = rows(event="rollback")
    to, samples = event["values"]["to_step"], event["values"]["samples"]
    assert found["skipped"] == [{"step": to, "by": "rollback", "samples": samples}] and samples[0] == to * BATCH
    assert (found["lost"], found["repeated"], found["restarts"]) == (0, 0, 0)
    shown = json_of("show", "runs/tiny", "--step", str(to + 1))
    assert [each["sample"] for each in shown["samples"]] == [samples[1] + 1, samples[1] + 2]


def test_what_is_not_saved_is_no_part_of_the_run(folder: Path, json_of: Callable[..., Any]) -> None:
    """As if killed after step 5, the checkpoint of step 4 there."""
    assert train("--run.stop_after_step=4") == 75
    path = log_path(Path("runs/tiny"), 0)
    records = np.fromfile(path, RECORD)
    later = records[-1:].copy()
    later["step"], later["first"] = 5, 8
    np.concatenate((records, later)).tofile(path)
    found = json_of("audit", "runs/tiny")
    assert (found["steps"], found["unsaved_steps"], found["lost"]) == (4, 1, 0)
    assert train() == 0
    assert json_of("audit", "runs/tiny")["unsaved_steps"] == 0


def test_the_text_of_a_step_is_what_it_is_trained_on(
    folder: Path, json_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from titanlite.training import trainer
    from titanlite.training.train_state import TrainState

    seen: list[list[str]] = []
    step = trainer.take_step

    def watched(self: TrainState, number: int, batch: Any, factor: float) -> Any:
        tokens, labels = batch.tokens.reshape(-1, 16).tolist(), batch.labels.reshape(-1, 16).tolist()
        rows = [[*row, last[-1]] for row, last in zip(tokens, labels, strict=True)]
        seen.append(["".join("⟨document ends⟩" if token == 256 else chr(token) for token in row) for row in rows])
        return step(self, number, batch, factor)

    monkeypatch.setattr(trainer, "take_step", watched)
    assert train("--data.skip_steps=[2]") == 0
    for place, number in (("runs/tiny", 1), ("runs/tiny", 5), ("recipe.toml", 1), ("recipe.toml", 4)):
        shown = json_of("show", place, "--step", str(number))
        batch = number + (place == "runs/tiny" and number >= 2)
        assert shown["batch"] == batch
        taken = batch - (batch >= 2)  # of the recipe without skip_steps, batch 2 apart, each comes a step later
        assert [each["text"] for each in shown["samples"]] == seen[taken - 1]
    one = json_of("show", "recipe.toml", "--step", "4", "--rank", "1", "--data-ranks", "2")
    assert [each["sample"] for each in one["samples"]] == [7]
    assert json_of("show", "runs/tiny", "--step", "4", "--rank", "0")["samples"][1]["sample"] == 9


def test_control_characters_show(folder: Path, capsys: pytest.CaptureFixture[str], json_of: Callable[..., Any]) -> None:
    (folder / "corpus.txt").write_bytes(b"\x1b[31m\tred\xff\r\n" * 60)
    (sample, _) = json_of("show", "recipe.toml", "--step", "1", "--limit", "0")["samples"]
    assert set("\x1b\t\r\xff") & set(sample["text"]) == set()
    assert r"\x1b[31m\tred\xff\r" + "\n" in sample["text"] * 2
    assert titanlite(["data", "show", "recipe.toml", "--step", "1", "--limit", "3"]) == 0
    assert " characters more" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "recipe.toml", "--step", "0"), "--step"),
        (("show", "recipe.toml", "--step", "1", "--rank", "0"), "--data-ranks"),
        (("show", "recipe.toml", "--step", "1", "--rank", "2", "--data-ranks", "2"), "2 data ranks"),
        (("audit", "runs/none"), "runs/none"),
    ],
)
def test_wrong_usage(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert titanlite(["data", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_run_is_shown_and_audited_by_its_own_records_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train() == 0
    assert titanlite(["data", "show", "runs/tiny", "--step", "9"]) == 2
    assert "steps 1 to 6" in capsys.readouterr().err
    (folder / "corpus.txt").write_text("another text. " * 100)
    assert titanlite(["data", "show", "runs/tiny", "--step", "1"]) == 2
    assert "not what runs/tiny was trained on" in capsys.readouterr().err
    log_path(Path("runs/tiny"), 0).unlink()
    assert titanlite(["data", "audit", "runs/tiny"]) == 2
    assert "logs/samples" in capsys.readouterr().err


def test_batches_beyond_the_run_are_warned_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert titanlite(["check", "recipe.toml", "--data.skip_steps=[2, 7, 9]"]) == 0
    assert "data.skip_steps" in "".join(capsys.readouterr())


MIXED = """
[[data.sources]]
name = "a"
path = "corpus.txt"
weight = 3

[[data.sources]]
name = "b"
path = "other.txt"
weight = 1
"""
STAGES = """
[[data.stages]]
until = {until}
weights = {{ a = {old}, b = 1 }}

[[data.stages]]
weights = {{ b = 1 }}
"""


def mixed() -> str:
    """Have the recipe read two sources; its text."""
    plain = Path("recipe.toml").read_text().replace('corpus = "corpus.txt"\n', "") + MIXED
    Path("other.txt").write_text("".join(f"{n} times three is {3 * n}.\n" for n in range(200)))
    Path("recipe.toml").write_text(plain)
    return plain


def test_weights_may_change_from_here_on_only(
    folder: Path, capsys: pytest.CaptureFixture[str], json_of: Callable[..., Any]
) -> None:
    plain = mixed()
    assert train("--run.stop_after_step=3") == 75
    until = 3 * BATCH * load_recipe(Path("recipe.toml")).recipe.training.sequence_length
    bare = plain.replace("weight = 3\n", "").replace("weight = 1\n", "")
    Path("recipe.toml").write_text(bare + STAGES.format(until=until, old=2))
    capsys.readouterr()
    stored = Path("runs/tiny/recipe.toml").read_text()
    assert train() == 2
    refusal = capsys.readouterr().err.replace("_", "")
    assert f"until = {until}" in refusal and "a = " in refusal
    assert Path("runs/tiny/recipe.toml").read_text() == stored, "the run's recipe is still that of its steps"
    Path("recipe.toml").write_text(bare + STAGES.format(until=until, old=3))
    assert train("--run.stop_after_step=4") == 75, "the past is the same: no flag is asked for"
    assert json_of("audit", "runs/tiny")["reordered"] == []
    shown = json_of("show", "runs/tiny", "--step", "4")["samples"]
    assert {each["source"] for each in shown} == {"b"}
    Path("recipe.toml").write_text(plain)
    assert train() == 2 and "--allow-change data.corpus" in capsys.readouterr().err
    assert train("--allow-change", "data.sources") == 0
    found = json_of("audit", "runs/tiny", code=3)
    assert (found["reordered"], found["lost"], found["repeated"], found["steps"]) == ([5], 0, 0, 6)
    assert json_of("show", "runs/tiny", "--step", "5")["step"] == 5
    assert titanlite(["data", "show", "runs/tiny", "--step", "4"]) == 2
    assert "from step 5" in capsys.readouterr().err


def test_a_change_of_order_is_not_forgotten_by_going_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch, poison: Callable[[int], None], json_of: Callable[..., Any]
) -> None:
    """The state gone back to is saved anew, and a run that is killed then has no step of the new order."""
    plain = mixed()
    assert train("--run.stop_after_step=2") == 75
    Path("recipe.toml").write_text(plain.replace("weight = 3", "weight = 1"))
    rollback = "--resilience.on_nonfinite=rollback"
    poison(2)
    with monkeypatch.context() as patch:
        patch.setattr(Saving, "commit_instead", killed_after(Saving.commit_instead))
        with pytest.raises(RuntimeError, match="killed"):
            train(rollback, "--allow-change=data.sources", "--checkpoint.every_steps=100")
    assert train(rollback) == 0
    found = json_of("audit", "runs/tiny", code=3)
    assert found["reordered"] == [3] and found["lost"] == found["repeated"] == 0


def killed_after(function: Callable[..., None]) -> Callable[..., None]:
    def killed(*arguments: Any) -> None:
        function(*arguments)
        raise RuntimeError("killed")

    return killed


def test_another_text_of_a_validation_set_is_warned_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = '\n[[data.validation]]\nname = "news"\npath = "news.txt"\n'
    Path("news.txt").write_text("nothing new. " * 40)
    Path("recipe.toml").write_text(Path("recipe.toml").read_text() + sets)
    arguments = ("--validation.every_steps=2", "--validation.sequences=2")
    assert train(*arguments, "--run.stop_after_step=2") == 75
    Path("news.txt").write_text("something new. " * 40)
    capsys.readouterr()
    assert train(*arguments) == 0
    assert "another text than before (news)" in capsys.readouterr().out
