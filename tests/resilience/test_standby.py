"""Ranks that the mesh has no place for: said by the check, waiting while the others train, ending as they do."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from support.failing_ranks import RUN, SECTIONS, ended, started
from support.runs import rows

from titanlite.cli.check import format_description
from titanlite.cli.main import run_command
from titanlite.cli.train import main
from titanlite.plan.describe import describe_run
from titanlite.plan.layout import active_ranks
from titanlite.plan.rules import apply_rules
from titanlite.recipe.sections import Recipe

TINY = SECTIONS


@pytest.mark.parametrize(
    ("parallel", "launched", "active"),
    [
        ({"tp": 2}, 3, 2),
        ({"tp": 2, "pp": 2}, 11, 8),
        ({"dp_shard": 4}, 7, 4),
        ({"dp_shard": 4}, 4, 4),
        ({"dp_replicate": 3, "zero_stage": 0}, 8, 6),
        ({}, 5, 5),
        ({"tp": 4}, 3, 3),
    ],
)
def test_the_largest_mesh_that_fits(parallel: dict[str, int], launched: int, active: int) -> None:
    def errors(standby: bool) -> list[str]:
        recipe = Recipe.model_validate(
            {"training": {"steps": 1}, "parallel": parallel, "resilience": {"standby": standby}}
        )
        assert active_ranks(recipe, launched) == (active if standby else launched)
        return [finding.key for finding in apply_rules(recipe, launched) if finding.severity == "error"]

    fits = active < launched or not errors(standby=False)
    assert (not errors(standby=True)) == fits
    assert bool(errors(standby=False)) == (active < launched or not fits)


def test_the_check_says_how_many_stand_by() -> None:
    recipe = Recipe.model_validate({"training": {"steps": 1}, "parallel": {"tp": 2}, "resilience": {"standby": True}})
    (finding,) = (finding for finding in apply_rules(recipe, 5) if finding.key == "resilience.standby")
    assert finding.severity == "warning" and "4 ranks: 1 of 5 stand by" in finding.problem
    run = describe_run(recipe, 5)
    assert (run["world"], run["standby"], run["mesh"]["tp"], run["mesh"]["dp_shard"]) == (4, 1, 2, 2)
    assert "1 rank standing by" in format_description(recipe, 5)


def losses(run: Path = RUN) -> list[float]:
    return [row["loss"] for row in rows(run.absolute(), key="loss")]


@pytest.mark.slow
def test_who_stands_by_leaves_the_curve_alone_and_ends_with_the_others(folder: Path) -> None:
    words = ("--parallel.tp=2", "--resilience.standby=true", "--run.stop_after_step=4")
    processes = ended(started("", *words, count=3))
    assert [code for code, _ in processes] == [75, 75, 75], processes
    assert "1 of 3 stand by" in processes[0][1] and not processes[2][1], "what all meet, the first one says"
    assert ", 1 standing by" in (RUN / "metrics.jsonl").read_text()
    assert run_command(main, ["recipe.toml", "--run.name=alone"]) == 0
    assert losses() == pytest.approx(losses(Path("runs/alone"))[:4], rel=1e-9)


@pytest.mark.slow
def test_who_stands_by_fails_when_the_run_is_gone(folder: Path) -> None:
    """Its launcher is to start it again: with 0 it would take the job for done."""
    words = ("--parallel.dp_shard=1", "--resilience.standby=true")
    (first, _), (second, said) = ended(started("kill@3@0", *words))
    assert (first, second) == (-signal.SIGKILL, 1) and "the run it waited for is gone" in said
