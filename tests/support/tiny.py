"""A run that trains in moments: what tests of everything around the training start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from titanlite.cli.main import run_command
from titanlite.cli.train import main

_RECIPE: dict[str, dict[str, Any]] = {
    "run": {"name": "tiny"},
    "model": {"preset": "debug", "dim": 16, "layers": 1, "heads": 2, "kv_heads": 1, "ffn_dim": 24},
    "data": {"corpus": "corpus.txt"},
    "training": {"steps": 6, "sequence_length": 16, "global_batch": 2},
    "precision": {"compute": "float32"},
    "metrics": {"log_every": 1, "tensorboard": False},
}


def write_tiny(folder: Path, lines: int = 200, **sections: dict[str, Any]) -> None:
    """`recipe.toml` in `folder`, the keys of `sections` beside or in place of the tiny ones, and its corpus."""
    recipe: list[str] = []
    for section in {**_RECIPE, **sections}:
        keys = {**_RECIPE.get(section, {}), **sections.get(section, {})}
        recipe += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    (folder / "recipe.toml").write_text("\n".join(recipe))
    (folder / "corpus.txt").write_text("".join(f"{n} squared is {n * n}.\n" for n in range(lines)))


def train(*arguments: str) -> int:
    """The exit code of a run of `recipe.toml` in this folder."""
    return run_command(main, ["recipe.toml", *arguments])
