"""`titanlite checkpoint`: what it tells of checkpoints, the damage it finds, the differences, and what it deletes."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import flip

from titanlite.checkpoint import load, save
from titanlite.checkpoint.format import CheckpointMetadata
from titanlite.checkpoint.manager import CheckpointManager
from titanlite.checkpoint.save import environment, plan_local_save, save_state
from titanlite.cli.main import main
from titanlite.models.shard import Shard

RECIPE = '[run]\nname = "tiny"\n[model]\npreset = "debug"\n[parallel]\ntp = 2\ndp_shard = -1\n'
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def checkpoint(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: object) -> tuple[int, str, str]:
        code = main(["checkpoint", *map(str, words)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"model.w": torch.full((4, 3), value), "optimizer.step": torch.tensor(7)}


def write(run: Path, step: int, values: dict[str, torch.Tensor] | None = None, file_bytes: int = 2**20) -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    state = {name: Shard.whole(tensor) for name, tensor in (values or tensors(float(step))).items()}
    facts = CheckpointMetadata(step, step * 10, step * 1000, RECIPE, {"corpus": "ab"}, environment(torch.device("cpu")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "FILE_BYTES", file_bytes)
        save_state(folder, plan_local_save(state), facts)
    return folder


def steps(run: Path) -> list[int]:
    return CheckpointManager(run / "checkpoints", print).steps()


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step-00000020"])
def test_inspect_shows_the_newest(checkpoint: Run, tmp_path: Path, place: str) -> None:
    write(tmp_path, 3)
    write(tmp_path, 20, file_bytes=24)
    code, out, _ = checkpoint("inspect", tmp_path / place, "--json")
    shown = json.loads(out)
    assert code == 0
    assert (shown["step"], shown["samples"], shown["tokens"], shown["parameters"]) == (20, 200, 20000, 12)
    assert (shown["run"], shown["preset"], shown["layout"]) == ("tiny", "debug", {"tp": 2, "dp_shard": -1})
    assert shown["environment"]["torch"] == torch.__version__ and shown["environment"]["ranks"] == "1"
    assert shown["steps"] == ([20] if "step-" in place else [3, 20])
    assert shown["tensors"] == [
        {"name": "model.w", "dtype": "float32", "shape": [4, 3], "chunks": 2, "bytes": 48},
        {"name": "optimizer.step", "dtype": "int64", "shape": [], "chunks": 1, "bytes": 8},
    ]
    code, out, _ = checkpoint("inspect", tmp_path / place)
    assert code == 0 and "step 20, 200 samples, 20.00K tokens" in out and "tp 2" in out
    assert ["model.w", "float32", "4x3", "2", "48", "B"] in [line.split() for line in out.splitlines()]


def test_a_recipe_that_is_none_says_nothing_of_the_layout(checkpoint: Run, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    save_state(folder, plan_local_save({}), CheckpointMetadata(1, recipe="["))
    code, out, _ = checkpoint("inspect", folder)
    assert code == 0 and "layout       unknown" in out


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_paths_that_are_no_checkpoint(checkpoint: Run, tmp_path: Path, command: str) -> None:
    code, _, err = checkpoint(command, tmp_path / "nothing")
    assert code == 2 and "nothing" in err
    assert checkpoint(command, tmp_path)[0] == 2
    (tmp_path / "recipe.toml").touch()
    code, _, err = checkpoint(command, tmp_path)
    assert code == 4 and "checkpoint.every_steps" in err


def test_whole_checkpoints_are_said_to_be_whole(checkpoint: Run, tmp_path: Path) -> None:
    write(tmp_path, 1)
    (write(tmp_path, 2) / "notes.txt").touch()
    code, out, err = checkpoint("verify", tmp_path, "--deep")
    assert code == 0 and out.count("whole (sizes, headers, hashes and finite numbers)") == 2
    assert "notes.txt is not in the manifest" in err


@pytest.mark.parametrize(
    ("name", "damage", "found_by"),
    [
        ("tensors-00000-000.safetensors", lambda file: file.write_bytes(file.read_bytes()[:-1]), "both"),
        ("tensors-00000-000.safetensors", Path.unlink, "both"),
        ("tensors-00000-000.safetensors", lambda file: flip(file, 12), "both"),
        ("tensors-00000-000.safetensors", lambda file: flip(file, -1), "deep"),
        ("manifest.json", lambda file: flip(file, 40), "both"),
        ("manifest.json", Path.unlink, "both"),
    ],
    ids=["cut", "missing", "header", "data", "manifest", "no manifest"],
)
def test_damage_is_found_and_the_file_named(
    checkpoint: Run, tmp_path: Path, name: str, damage: Callable[[Path], Any], found_by: str
) -> None:
    write(tmp_path, 1)
    file = write(tmp_path, 2) / name
    damage(file)
    code, out, err = checkpoint("verify", tmp_path, "--deep", "--json")
    assert code == 4 and str(file) in err and "1 of 2 damaged" in err
    assert [report["whole"] for report in json.loads(out)] == [True, False]
    assert checkpoint("verify", tmp_path)[0] == (4 if found_by == "both" else 0)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn]
)
def test_numbers_that_are_not_finite_are_found_by_their_tensors(
    checkpoint: Run, tmp_path: Path, dtype: torch.dtype, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 14, item 18: in any format and block, of weights and moments alone."""
    monkeypatch.setattr(load, "BLOCK_BYTES", 16)
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    every = bits.view(dtype) if dtype.itemsize == 2 else torch.linspace(-400, 400, 999).to(dtype)
    sound = every[every.double().isfinite()]
    if dtype is torch.float8_e4m3fn:
        value = math.nan  # it has no infinity
    ruined = torch.cat([sound.view(-1), torch.tensor([value]).to(dtype), sound.view(-1)[:1]])
    write(tmp_path, 1, {"model.w": sound, "optimizer.w": sound, "guards.w": ruined})
    write(tmp_path, 2, {"model.w": ruined, "optimizer.w": ruined, "optimizer.v": sound, "guards.w": ruined})
    code, out, err = checkpoint("verify", tmp_path, "--deep", "--json")
    assert code == 4 and [report["whole"] for report in json.loads(out)] == [True, False]
    assert "not finite are in model.w, optimizer.w." in err


def test_equal_checkpoints_however_they_are_cut(checkpoint: Run, tmp_path: Path) -> None:
    values = {"model.w": torch.randn(9, 5), "x": torch.tensor([1.0, math.nan, math.inf]), "s": torch.tensor(2)}
    a, b = write(tmp_path / "a", 1, values), write(tmp_path / "b", 1, values, file_bytes=40)
    code, out, _ = checkpoint("diff", a, b)
    assert code == 0 and "3 of 3 tensors are the same" in out and len(out.splitlines()) == 1


def test_differences_are_measured(checkpoint: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(load, "_BLOCK_VALUES", 7)
    one = {
        "near": torch.arange(60.0).reshape(20, 3), "large": torch.tensor([2**60]), "nan": torch.zeros(2),
        "dtype": torch.ones(2), "shape": torch.ones(2), "gone": torch.ones(1),
    }  # fmt: skip
    other = {
        "near": one["near"].clone(), "large": torch.tensor([2**60 + 1]), "nan": torch.tensor([0.0, math.nan]),
        "dtype": torch.ones(2).bfloat16(), "shape": torch.ones(3), "new": torch.ones(1),
    }  # fmt: skip
    other["near"][1, 1] += 1  # 4 -> 5
    other["near"][19, 2] -= 2  # 59 -> 57
    write(tmp_path / "a", 1, one)
    write(tmp_path / "b", 2, other, file_bytes=48)
    code, out, _ = checkpoint("diff", tmp_path / "a", tmp_path / "b", "--json")
    report = json.loads(out)
    found = {t["name"]: (t["differing"], t["max_abs"], t["max_rel"]) for t in report["tensors"]}
    assert code == 0 and not report["same"]
    assert found == {
        "near": (2, 2.0, 0.2), "large": (1, 0.0, 0.0), "nan": (1, "infinity", "infinity"), "dtype": (0, 0.0, 0.0),
        "shape": (None,) * 3, "gone": (None,) * 3, "new": (None,) * 3,
    }  # fmt: skip
    code, out, _ = checkpoint("diff", tmp_path / "a", tmp_path / "b", "--prefix", "n")
    assert "0 of 3 tensors are the same" in out and "missing" in out and "large" not in out


def test_prune_deletes_what_is_neither_new_nor_an_nth(checkpoint: Run, tmp_path: Path) -> None:
    for step in (10, 15, 20, 25, 30):
        write(tmp_path, step)
    words = ("prune", tmp_path, "--keep-last", 2, "--keep-every", 10)
    code, out, _ = checkpoint(*words, "--dry-run")
    assert code == 0 and "would delete" in out and steps(tmp_path) == [10, 15, 20, 25, 30]
    code, out, _ = checkpoint(*words, "--json")
    assert json.loads(out) == {"deleted": [15], "kept": [10, 20, 25, 30], "damaged": [], "dry_run": False}
    assert steps(tmp_path) == [10, 20, 25, 30]


def test_prune_never_takes_a_damaged_one_for_the_newest(checkpoint: Run, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        folder = write(tmp_path, step)
    (folder / "manifest.json").unlink()
    code, _, err = checkpoint("prune", tmp_path, "--keep-last", 1)
    assert code == 0 and "left where it is" in err and steps(tmp_path) == [2, 3]
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000002")
    assert checkpoint("prune", tmp_path, "--keep-last", 1)[0] == 4 and steps(tmp_path) == [3]


def test_prune_refuses_what_it_cannot_mean(checkpoint: Run, tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    assert checkpoint("prune", tmp_path, "--keep-last", 0)[0] == 2
    assert checkpoint("prune", tmp_path)[0] == 2
    assert checkpoint("prune", folder, "--keep-last", 1)[0] == 2
    assert steps(tmp_path) == [1]


def test_only_reading_values_needs_torch(tmp_path: Path) -> None:
    write(tmp_path, 1)
    script = """
import sys
from titanlite.cli.main import main
for words in (["inspect"], ["verify"], ["prune", "--keep-last=1"]):
    assert main(["checkpoint", *words, sys.argv[1]]) == 0
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


def test_what_a_stranger_wrote_does_not_reach_the_terminal_raw(checkpoint: Run, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    escape = '[run]\nname = "\\u001b[2J"\n[parallel]\ntp = "\\u001b[2J"\n'
    nothing = plan_local_save({})
    values = {"a": "\x1b[2J"}
    save_state(folder, nothing, CheckpointMetadata(1, recipe=escape, values=values))
    code, out, _ = checkpoint("inspect", folder)
    assert code == 0 and "\x1b" not in out and out.count("[2J") == 3
