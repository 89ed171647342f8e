"""A run of several sources, stopped and gone on with: the recipe reads back, the curve is one, and the audit knows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.runs import rows
from support.tiny import train, write_tiny

from titanlite.cli.data import main as data_command
from titanlite.parallel.world import World
from titanlite.recipe.load import load_recipe, to_toml
from titanlite.training import trainer
from titanlite.training.train_state import TrainState

SOURCES = """
[[data.sources]]
name = "squares"
path = "corpus.txt"
epochs = 3.0

[[data.sources]]
name = "cubes"
path = "cubes.txt"

[[data.stages]]
until = 128
weights = {squares = 0.75, cubes = 0.25}

[[data.stages]]
weights = {cubes = 1}

[[data.validation]]
name = "both"
path = ["corpus.txt", "cubes.txt"]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_tiny(
        tmp_path, checkpoint={"every_steps": 2}, validation={"every_steps": 6, "sequences": 4}, training={"steps": 8}
    )
    (tmp_path / "cubes.txt").write_text("".join(f"{n} cubed is {n**3}.\n" for n in range(200)))
    recipe = (tmp_path / "recipe.toml").read_text().replace('corpus = "corpus.txt"\n', "")
    (tmp_path / "recipe.toml").write_text(recipe + SOURCES)
    return tmp_path


def curve(run: str) -> list[Any]:
    return [(row["step"], row.get("loss"), row.get("validation_loss")) for row in rows(run)]


def test_a_run_of_sources_goes_on_as_if_it_had_not_stopped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--run.name=whole") == 0
    assert train("--run.stop_after_step=3") == 75
    assert train() == 0
    assert curve("tiny") == curve("whole") and len(curve("whole")) == 10
    capsys.readouterr()
    assert data_command(["audit", "runs/tiny", "--json"]) == 0
    audited = json.loads(capsys.readouterr().out)
    assert (audited["lost"], audited["repeated"]) == (0, 0)
    assert data_command(["show", "runs/tiny", "--step", "6", "--json"]) == 0
    assert [sample["source"] for sample in json.loads(capsys.readouterr().out)["samples"]] == ["cubes", "cubes"]


def test_the_resolved_recipe_reads_back(folder: Path) -> None:
    recipe = load_recipe(folder / "recipe.toml").recipe
    (folder / "again.toml").write_text(to_toml(recipe))
    assert load_recipe(folder / "again.toml").recipe == recipe


@pytest.mark.parametrize(("cut_at", "saved"), [(3, 6), (7, 8)])
def test_a_validation_set_that_cannot_be_read_ends_a_run_that_is_saved(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cut_at: int, saved: int
) -> None:
    """Issue 14, item 14: as training data that cannot be read; after the last step too. No row has a part of a loss."""
    assert data_command(["prepare", "corpus.txt", "--out", "held"]) == 0
    (folder / "recipe.toml").write_text(
        (folder / "recipe.toml").read_text().replace('["corpus.txt", "cubes.txt"]', '"held"')
    )
    step = trainer.take_step

    def cut(self: TrainState, number: int, *rest: Any) -> Any:
        if number == cut_at:
            os.truncate("held.bin", 1_000)
        return step(self, number, *rest)

    monkeypatch.setattr(trainer, "take_step", cut)
    assert train("--checkpoint.every_steps=3", "--resilience.on_spike=rollback") == 2
    printed = capsys.readouterr().err
    assert f"validation after step {saved}: the set both" in printed and "held.bin: cut short" in printed
    manifest = json.loads((folder / f"runs/tiny/checkpoints/step-{saved:08d}/manifest.json").read_text())
    assert "rollback_to" not in manifest["values"], "a checkpoint of this step was due"
    assert [row[2] is not None for row in curve("tiny") if row[1] is None] == [True] * (saved == 8)


def test_a_run_whose_last_data_another_rank_cannot_read_is_not_done(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 14, item 14: by then no step is left in which the ranks would agree to stop."""
    monkeypatch.setattr(World, "all_equal", lambda self, value: value != 1)
    assert train() == 75
    assert "another rank cannot read" in capsys.readouterr().err
    assert (folder / "runs/tiny/checkpoints/step-00000008").is_dir()
    assert json.loads((folder / "runs/tiny/status.json").read_text())["state"] == "stopped"
