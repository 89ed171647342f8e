"""A run that commit 7e7bda2 began, stored with the 20 steps that the same commit took after its checkpoint.

Whatever is renamed, moved or rewritten since then, such a run goes on: the same state, samples and losses.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from support.runs import rows
from support.tiny import train

from titanlite.cli.main import main as titanlite

STORED = Path(__file__).parent / "old_run"
EXPECTED = json.loads((STORED / "expected.json").read_text())
"""Of each step after the checkpoint's: loss and gradient norm; sample, source, window and text of all that is read."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(STORED / "run", tmp_path / "runs" / "old")
    shutil.copy(STORED / "recipe.toml", tmp_path)
    for power, name in ((2, "squares"), (3, "cubes")):
        texts = (f"{n} to the power of {power} is {n**power}.\n" * (1 + n % 4) for n in range(400))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shown(step: int, capsys: pytest.CaptureFixture[str]) -> list[list[Any]]:
    capsys.readouterr()
    assert titanlite(["data", "show", "runs/old", "--step", str(step), "--json"]) == 0
    samples = json.loads(capsys.readouterr().out)["samples"]
    return [[each[key] for key in ("sample", "source", "window", "text")] for each in samples]


def test_the_run_goes_on_as_it_would_have(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--resume") == 0
    losses = {row["step"]: (row["loss"], row["grad_norm"]) for row in rows("old") if row.get("loss")}
    assert [str(step) for step in losses if step > 20] == list(EXPECTED["losses"])
    for step in range(21, 29):  # float64: another order of summation stays far below, another formula far above
        assert losses[step] == pytest.approx(EXPECTED["losses"][str(step)], abs=1e-9)
    for step, samples in EXPECTED["samples"].items():
        assert shown(int(step), capsys) == samples
    assert titanlite(["data", "audit", "runs/old", "--json"]) == 0, "of the records of both versions"
    audited = json.loads(capsys.readouterr().out)
    assert (audited["steps"], audited["restarts"], audited["lost"], audited["repeated"]) == (40, 1, 0, 0)


def test_its_state_is_loaded_bit_for_bit(folder: Path) -> None:
    """A branch that stops before its first step saves what it loaded."""
    assert train("--run.name=branch", "--checkpoint.resume_from=runs/old", "--run.stop_after_step=20") == 75
    (stored,) = Path("runs/old/checkpoints/step-00000020").glob("*.safetensors")
    (saved,) = Path("runs/branch/checkpoints/step-00000020").glob("*.safetensors")
    before, after = load_file(stored), load_file(saved)
    assert before.keys() == after.keys() and len(before) > 40
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.tobytes()) == (after[name].dtype, after[name].tobytes()), name
