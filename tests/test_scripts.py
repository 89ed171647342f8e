"""`scripts/train.sh`, with a stand-in for the environment's Python that says what it was started with."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A clone with a space in its path, whose environment is ready."""
    root = tmp_path / "a clone"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    shutil.copy(ROOT / "pyproject.toml", root)
    python = root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    write_program(python, 'printf "%s\\n" "$@"')
    stamp = 'printf %s "$PWD $(cat pyproject.toml scripts/constraints.txt | cksum)" >.venv/installed-'
    subprocess.run(["bash", "-c", stamp], cwd=root, check=True)
    return root


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def train(root: Path, *arguments: str, gpus: int = 0) -> tuple[int, list[str]]:
    """Exit code, and the words that the environment's Python got, from another folder and on so many GPUs."""
    write_program(root / "nvidia-smi", "".join(f"echo GPU {number};" for number in range(gpus)) or ":")
    process = subprocess.run(
        [root / "scripts/train.sh", *arguments],
        cwd=root.parent,
        env={**os.environ, "PATH": f"{root}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert process.stderr == ""
    return process.returncode, process.stdout.splitlines()


@pytest.mark.parametrize(
    "words",
    [
        ["my.toml"],
        ["recipe-without-a-suffix", "--run.seed=3"],
        ["--run.seed=3", "my.toml"],
        ["--run.seed", "3", "folder with/my.toml", "--resume"],
        ["--fresh", "--force", "my.toml"],
    ],
)
def test_a_recipe_is_passed_on_wherever_it_stands(root: Path, words: list[str]) -> None:
    assert train(root, *words) == (0, ["-m", "titanlite.train", *words])


@pytest.mark.parametrize("words", [[], ["--fresh"], ["--run.seed", "3"], ["--run.name=x"]])
def test_without_a_recipe_it_is_the_debug_run(root: Path, words: list[str]) -> None:
    assert train(root, *words) == (0, ["-m", "titanlite.train", f"{root}/configs/debug.toml", *words])


def test_several_gpus_get_torchrun(root: Path) -> None:
    expected = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "-m", "titanlite.train", "a.toml"]
    assert train(root, "a.toml", gpus=3) == (0, expected)
    assert train(root, "a.toml", gpus=1) == (0, ["-m", "titanlite.train", "a.toml"])


@pytest.mark.parametrize(("told", "code"), [("0 0", 0), ("75 75", 75), ("2", 2), ("0 4", 4), ("3 75", 3), ("", 1)])
def test_the_exit_code_is_the_workers_own(root: Path, told: str, code: int) -> None:
    """torchrun ends with 1 whatever its workers ended with, and with 0 after a planned stop."""
    ends = "1" if told not in ("0 0", "75 75") else "0"
    tell = f'for code in {told}; do echo $code >>"$TITANLITE_EXIT_CODE_FILE"; done; exit {ends}'
    write_program(root / ".venv/bin/python", tell)
    assert train(root, "a.toml", gpus=2)[0] == code
