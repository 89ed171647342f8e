"""Every legal layout against one process, in float64, where a wrong factor cannot hide.

The rest of the lattice runs with --all; `parity_table.py` writes all of it to docs/parity.md.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.parity.compare import assert_same, reference, run
from support.parity.lattice import Point, points
from support.parity.parity_runs import small_recipe
from support.pool import Pool

from titanlite.plan.rules import apply_rules
from titanlite.recipe.sections import Recipe


def refusals(recipe: Recipe, ranks: int) -> list[str]:
    """What the recipe check says against it."""
    return [str(finding) for finding in apply_rules(recipe, ranks) if finding.severity == "error"]


LEGAL = [point for point in points() if not refusals(small_recipe("corpus.txt", **point.sections), point.ranks)]
QUICK = {"2 ranks: zero 3; training.microbatch 2", "2 ranks: tp 2", "2 ranks: cp 2, cp_method ring", "3 ranks: pp 3"}
"""Points that `./scripts/test.sh --quick` has too."""


def _marks(point: Point) -> list[pytest.MarkDecorator]:
    return [pytest.mark.quick] * (point.name in QUICK) + [pytest.mark.slow] * (not point.default)


@pytest.mark.parametrize("point", [pytest.param(point, id=point.name, marks=_marks(point)) for point in LEGAL])
def test_the_curve_and_the_weights_are_those_of_one_process(pool: Pool, corpus: str, point: Point) -> None:
    recipe = small_recipe(corpus, **point.sections)
    expected = reference(corpus, **point.sections)
    for result in run(pool, point.ranks, recipe):
        assert_same(result, expected)


def test_the_committed_table_has_every_point() -> None:
    """`parity_table.py` is run by hand, an hour long: whoever changes the lattice runs it again."""
    table = (Path(__file__).parents[2] / "docs" / "parity.md").read_text()
    assert re.findall(r"^\| (\d+ ranks: .*?) \|", table, re.MULTILINE) == [point.name for point in points()]


@pytest.mark.splits
def test_the_lattice_has_what_was_promised() -> None:
    """Each axis alone, all pairs, the triples: none of them lost to a refusal."""
    axes = {"tp", "cp", "pp"}

    def used(point: Point) -> frozenset[str]:
        degrees = {axis for axis in axes if point.parallel.get(axis, 1) > 1}
        inner = point.ranks
        for axis in degrees:
            inner //= point.parallel[axis]
        copies = point.parallel.get("dp_replicate", 1)
        return frozenset(degrees | ({"dp"} if inner > copies else set()) | ({"hsdp"} if copies > 1 else set()))

    found = {used(point) for point in LEGAL if point.default}
    single = [{"tp"}, {"cp"}, {"pp"}, {"dp"}, {"dp", "hsdp"}]
    pairs = [{"tp", "cp"}, {"tp", "pp"}, {"cp", "pp"}, {"dp", "tp"}, {"dp", "cp"}, {"dp", "pp"}]
    triples = [{"dp", "tp", "pp"}, {"hsdp", "tp", "cp"}, {"pp", "tp", "cp"}, {"dp", "pp", "cp"}]
    assert found >= {frozenset(wanted) for wanted in (*single, *pairs, *triples)}
