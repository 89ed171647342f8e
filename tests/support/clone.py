"""A clone of the project whose environment counts as ready, its Python being a stand-in, and programs for its PATH."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def make_clone(folder: Path, python: str) -> Path:
    """`folder` with the scripts, and the lines `python` in place of the environment's Python."""
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    shutil.copy(ROOT / "pyproject.toml", folder)
    program = folder / ".venv/bin/python"
    program.parent.mkdir(parents=True)
    write_program(program, python)
    stamp = 'printf %s "$PWD $(cat pyproject.toml scripts/constraints.txt | cksum)" >.venv/installed-'
    subprocess.run(["bash", "-c", stamp], cwd=folder, check=True)
    return folder


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def wait_until(reached: Callable[[], bool], seconds: float = 180) -> None:
    until = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.01)
