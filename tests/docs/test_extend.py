"""`docs/extend.md` is executed: its additions train, resume, and are checked without torch."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```(?:python|toml)\n# ([\w/.]+)\n(.*?)```", re.DOTALL)


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "titanlite", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The documents' files, and a corpus for its reader."""
    blocks = BLOCK.findall((ROOT / "docs" / "extend.md").read_text(encoding="utf-8"))
    for name, code in blocks:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    (tmp_path / "texts").mkdir()
    with (tmp_path / "texts" / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "source"])
        writer.writeheader()
        writer.writerows({"text": f"the text of row {row}, in words\n" * 4, "source": "x"} for row in range(40))
    return tmp_path


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_what_the_page_adds_trains_and_resumes(folder: Path) -> None:
    words = ("train", "recipe.toml", "--run.stop_after_step=3")
    assert (stopped := run(folder, *words)).returncode == 75, stopped.stderr
    assert (done := run(folder, "train", "recipe.toml")).returncode == 0, done.stderr
    assert len(losses(folder)) == 6 and losses(folder)[-1] < losses(folder)[0]
    rows = [line.split("\t") for line in (folder / "runs" / "mine" / "losses.tsv").read_text().splitlines()]
    assert [(int(step), float(loss)) for step, loss in rows] == list(enumerate(losses(folder), 1))

    whole = run(folder, "train", "recipe.toml", "--run.output_dir=whole")
    assert whole.returncode == 0, whole.stderr
    (folder / "whole").rename(folder / "kept")
    assert losses(folder) == [
        json.loads(line)["loss"]
        for line in (folder / "kept" / "mine" / "metrics.jsonl").read_text().splitlines()
        if "loss" in json.loads(line)
    ]


def test_what_is_stored_runs_no_code(folder: Path) -> None:
    assert (done := run(folder, "train", "recipe.toml")).returncode == 0, done.stderr
    (folder / "my_package" / "things.py").open("a").write('\nprint("imported", flush=True)\n')
    for words in (("generate", "runs/mine", "--tokens=1"), ("data", "audit", "runs/mine")):
        refused = run(folder, *words)
        assert refused.returncode == 2 and "--plugins my_package.things" in refused.stderr
        assert "imported" not in refused.stdout
        taken = run(folder, *words, "--plugins", "my_package.things")
        assert taken.returncode == 0 and "imported" in taken.stdout, taken.stderr
    exported = run(folder, "checkpoint", "export-hf", "runs/mine", "out", "--plugins=my_package.things")
    assert exported.returncode == 2 and "geglu" in exported.stderr


def test_the_check_knows_plugins_without_torch(folder: Path) -> None:
    (folder / "torch.py").write_text('raise AssertionError("torch was imported")\n')
    checked = run(folder, "check", "recipe.toml", "--json")
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["preset"] == "tiny-geglu"
    wrong = run(folder, "check", "recipe.toml", "--lion.momentum=2", "--optimizer.eps=1e-6")
    assert wrong.returncode == 2 and "lion.momentum" in wrong.stderr
    unused = run(folder, "check", "recipe.toml", "--optimizer.eps=1e-6")
    assert "optimizer.eps" in unused.stdout + unused.stderr
    missing = run(folder, "check", "recipe.toml", '--plugins.modules=["no_such_package"]')
    assert missing.returncode == 2 and "no_such_package" in missing.stderr and "lion.momentum" not in missing.stderr
    schema = run(folder, "schema", "--plugins", "my_package.things")
    assert "momentum" in json.loads(schema.stdout)["$defs"]["LionSection"]["properties"]
