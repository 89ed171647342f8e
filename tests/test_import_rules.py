"""Imports point one way, and what must answer at once does not wait for torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from titanlite.recipe.toml import parse_toml

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "titanlite"

LEVELS = (
    ("__init__", "errors"),
    ("registry", "text"),
    ("recipe",),
    ("files",),
    ("corpus", "models"),
    ("optim",),
    ("plan",),
    ("precision",),
    ("parallel",),
    ("data", "checkpoint", "resilience", "observe"),
    ("training",),
    ("verify", "dryrun"),
    ("cli",),
    ("__main__", "train", "agent"),
)
"""A folder (or a module at the top) imports those of lower levels and itself, and none of its own level."""

KNOW_TORCH_DISTRIBUTED = (
    *("parallel", "plan.timetable", "dryrun"),
    "agent",
)

WITHOUT_TORCH = (
    *(
        "errors",
        "registry",
        "text",
        "files",
        "train",
        "recipe",
        "corpus",
        "plan",
        "cli",
        "optim.base",
        "optim.adamw",
        "optim.muon",
        "optim.schedules",
    ),
    *("models.spec", "models.llama_spec", "observe.jsonl", "verify.shrink", "verify.verdict"),
    *("data.read_log", "data.order", "data.packing", "data.fill_in"),
    *("checkpoint.format", "checkpoint.storage"),
    *("resilience.crashes", "resilience.rank_table"),
)
"""Folders and modules all of which can be imported without torch."""


def modules(folder: Path) -> dict[str, ast.Module]:
    """Dotted name below the package -> syntax tree."""
    files = sorted(folder.rglob("*.py"))
    names = [".".join(file.relative_to(folder).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in zip(names, files, strict=True)}


def imports(tree: ast.AST) -> Iterator[str]:
    """What running `tree` imports, at its top or in a function; what only type checkers see does not count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed"
        yield from imports(node)


def within(module: str, rooms: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"{room}.") for room in rooms)


def level(folder: str) -> int:
    found = [height for height, folders in enumerate(LEVELS) if folder in folders]
    assert found, f"titanlite/{folder} is not in LEVELS: say which folders may import it"
    return found[0]


@pytest.mark.parametrize(("module", "tree"), [pytest.param(*item, id=item[0]) for item in modules(PACKAGE).items()])
def test_imports_point_one_way(module: str, tree: ast.Module) -> None:
    own = module.partition(".")[0]
    for name in imports(tree):
        folder = name.removeprefix("titanlite.").partition(".")[0]
        if name.startswith("titanlite.") and folder not in (own, "__version__"):
            assert level(folder) < level(own), f"titanlite.{module} must not import {name}"
        if within(name, ("torch.distributed",)):
            assert within(module, KNOW_TORCH_DISTRIBUTED), f"titanlite.{module} must not import torch.distributed"


def test_kernels_know_nothing_of_titanlite() -> None:
    for module, tree in modules(ROOT / "kernels" / "titanlite_kernels").items():
        assert not [name for name in imports(tree) if within(name, ("titanlite",))], module


def test_what_is_imported_is_installed_everywhere() -> None:
    """A plain dependency, so that every script and image that installs titanlite has it (issue 14, item 24)."""
    dependencies = parse_toml((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    installed = {re.split(r"[^\w-]", line)[0] for line in dependencies}
    needed = {name.partition(".")[0] for tree in modules(PACKAGE).values() for name in imports(tree)}
    assert needed - sys.stdlib_module_names - {"titanlite", "titanlite_kernels", "tomllib"} <= installed
    assert installed <= needed, "installed, and never imported"


def test_a_module_is_what_print_shows() -> None:
    """What is done to a model replaces modules or wraps them: none gets another `forward` or class (issue 16)."""
    for name, tree in modules(PACKAGE).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                assert node.attr not in ("forward", "__class__"), f"{name}:{node.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr"):
                assert ast.unparse(node.args[1]) not in ("'forward'", "'__class__'"), f"{name}:{node.lineno}"


REFUSE_TORCH = """
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton"):
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Refuse())
"""


def test_what_answers_at_once_does_not_import_torch(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[training]\nsteps = 5\n")
    without_torch = [module for module in modules(PACKAGE) if within(module, WITHOUT_TORCH)]
    script = (
        REFUSE_TORCH
        + f"""
for module in {without_torch!r}:
    importlib.import_module("titanlite." + module)
from titanlite.cli.main import main
recipe = {str(recipe)!r}
assert main(["--help"]) == main(["schema"]) == main(["check", recipe]) == main(["check", "--explain", "model"]) == 0
assert main(["train", recipe, "--training.steps=0"]) == 2, "a wrong recipe is refused before torch is loaded"
"""
    )
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
