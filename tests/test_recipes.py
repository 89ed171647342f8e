"""The recipes in `configs/`: each is sound at the sizes it is for; those of Llama 3 are short and say nothing twice."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from titanlite.cli.check import check_recipe
from titanlite.plan.describe import describe_run
from titanlite.recipe.load import load_recipe
from titanlite.recipe.sections import Recipe
from titanlite.recipe.toml import parse_toml

pytestmark = pytest.mark.quick

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(CONFIGS.glob("*.toml"))

SIZES = {
    "debug": (1, 2, 4, 8),
    "stdlib_30min": (1, 2, 4, 8),
    "llama3_8b": (8, 16, 32, 64, 128),
    "llama3_8b_128k": (8,),
    "llama3_70b": (256,),
    "llama3_405b": (512,),
}
"""Numbers of devices that each recipe is for."""


def test_every_recipe_has_its_sizes() -> None:
    assert {path.stem for path in RECIPES} == set(SIZES)


@pytest.mark.parametrize(("name", "world"), [(name, world) for name, worlds in SIZES.items() for world in worlds])
def test_a_recipe_is_sound_at_its_sizes(name: str, world: int) -> None:
    loaded = load_recipe(CONFIGS / f"{name}.toml")
    spare = ["data.tokenizer"] if "llama3" in name else []  # which is the user's to name (issue 14, item 21)
    assert [finding.key for finding in check_recipe(loaded, world)] == spare
    assert loaded.recipe.run.name == name


@pytest.mark.parametrize(
    ("name", "world", "mesh", "batch"),
    [
        ("llama3_8b", 8, {"dp_shard": 8}, (2, 16)),
        ("llama3_8b", 128, {"dp_shard": 128}, (2, 1)),
        ("llama3_8b_128k", 8, {"dp_shard": 2, "cp": 4}, (1, 1)),
        ("llama3_70b", 256, {"dp_shard": 32, "tp": 8}, (16, 1)),
        ("llama3_405b", 512, {"pp": 8, "dp_shard": 8, "tp": 8}, (1, 32)),
    ],
)
def test_layouts_are_the_published_ones(name: str, world: int, mesh: dict[str, int], batch: tuple[int, int]) -> None:
    """TorchTitan's tables 1 to 5: the mesh, and a rank's share of the batch as (microbatch, microbatches)."""
    run = describe_run(load_recipe(CONFIGS / f"{name}.toml").recipe, world)
    assert run["mesh"] == {"pp": 1, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, **mesh}
    assert (run["microbatch"], run["microbatches"]) == batch
    assert run["sequence_length"] == (131_072 if name == "llama3_8b_128k" else 8192)


def _given(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _given(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*llama3*.toml")), ids=lambda path: path.stem)
def test_a_recipe_is_short_and_restates_neither_defaults_nor_what_it_extends(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    given = parse_toml(text)
    base = given.pop("extends", None)
    inherited = load_recipe(path.parent / base).recipe if base else Recipe()
    assert len(text.splitlines()) <= 25
    for key, value in _given(given).items():
        before: Any = inherited
        for name in key.split("."):
            before = getattr(before, name)
        assert before != value, f"{key} is {value!r} without being said"


def _children_seconds() -> float:
    """Processor time of the processes that have ended: a busy machine takes no more of it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_512_ranks_are_described_at_once() -> None:
    """In far less work than the 20 s that the slowest machine may take."""
    start = _children_seconds()
    command = [sys.executable, "-m", "titanlite", "check", str(CONFIGS / "llama3_405b.toml"), "--world", "512"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parent)
    assert done.returncode == 0, done.stderr
    assert _children_seconds() - start < 20
    for part in ("mesh       pp 8", "layers.*.attention.wq: 16384 x 16384 -> 2048 x 16384", "16 stages", "a rank "):
        assert part in done.stdout
