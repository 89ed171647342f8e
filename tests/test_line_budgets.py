"""Each package's number of lines. A number goes down with its package; a commit that raises one says why."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
PYTHON = "**/*.py"
LINES = {
    "titanlite": 20583,
    "titanlite/cli": 1154,
    "titanlite/recipe": 1307,
    "titanlite/plan": 2099,
    "titanlite/corpus": 2668,
    "titanlite/models": 1484,
    "titanlite/parallel": 2294,
    "titanlite/precision": 238,
    "titanlite/optim": 294,
    "titanlite/data": 1676,
    "titanlite/checkpoint": 2456,
    "titanlite/resilience": 1083,
    "titanlite/observe": 879,
    "titanlite/training": 1397,
    "titanlite/verify": 390,
    "titanlite/dryrun": 611,
    "kernels": 2253,
    "tests": 26643,
}


@pytest.mark.parametrize("folder", LINES)
def test_a_package_keeps_to_its_lines(folder: str) -> None:
    lines = sum(path.read_text(encoding="utf-8").count("\n") for path in (ROOT / folder).glob(PYTHON))
    assert lines <= LINES[folder]


def test_each_package_has_a_number() -> None:
    packages = {str(path.parent.relative_to(ROOT)) for path in ROOT.glob("titanlite/*/__init__.py")}
    assert packages | {"titanlite", "kernels", "tests"} == set(LINES)
    assert len(list(ROOT.glob("titanlite/[!_]*.py"))) <= 8


def _is_data(node: ast.ClassDef) -> bool:
    """Whether it is a recipe's section or a stored record: a frozen dataclass, or pydantic's."""
    words = " ".join(map(ast.unparse, [*node.bases, *node.decorator_list]))
    return any(word in words for word in ("Section", "BaseModel", "frozen=True"))


def _attributes(node: ast.ClassDef) -> set[str]:
    fields = {ast.unparse(line.target) for line in node.body if isinstance(line, ast.AnnAssign)}
    stored = (part for part in ast.walk(node) if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store))
    return fields | {part.attr for part in stored if ast.unparse(part.value) == "self"}


def _too_much(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60:
            yield node.name
        if isinstance(node, ast.ClassDef) and not _is_data(node) and len(_attributes(node)) > 15:
            yield node.name


def test_functions_have_60_lines_and_classes_15_attributes_at_most() -> None:
    files = [path for folder in ("titanlite", "kernels") for path in (ROOT / folder).glob(PYTHON)]
    found = {name for path in files for name in _too_much(ast.parse(path.read_text(encoding="utf-8")))}
    assert found == set()
