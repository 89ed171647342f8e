"""The simulated schedules against closed forms and against what every schedule must keep to."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from titanlite.cli.main import main
from titanlite.plan.stages import Stage, rank_of_stage, stages_per_rank
from titanlite.plan.timetable import draw_timetable, idle_share, schedule_actions, simulate, timetable
from titanlite.recipe.sections import Pipeline

SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")


@pytest.mark.parametrize(("pp", "microbatches"), [(2, 2), (2, 8), (4, 4), (4, 8), (8, 16)])
@pytest.mark.parametrize("schedule", ["GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS"])
def test_idle_time_is_that_of_the_closed_form(schedule: Any, pp: int, microbatches: int) -> None:
    """(p - 1) / (v m + p - 1) (Narayanan et al. 2021, section 2.2)."""
    section = Pipeline(schedule=schedule)
    held = stages_per_rank(section)
    table = simulate(schedule_actions(section, pp, microbatches), [1.0] * (held * pp))
    assert idle_share(table) == pytest.approx((pp - 1) / (held * microbatches + pp - 1))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_pass_runs_once_and_after_what_it_needs(schedule: Any) -> None:
    pp, microbatches = 3, 9
    section = Pipeline(schedule=schedule)
    stages = pp * stages_per_rank(section)
    table = simulate(schedule_actions(section, pp, microbatches), [1.0 + stage for stage in range(stages)])
    ends: dict[tuple[str, int, int], float] = {}
    for rank, slots in enumerate(table):
        for before, slot in pairwise(slots):
            assert before.end <= slot.start
        for slot in slots:
            action = slot.action
            assert rank_of_stage(schedule, action.stage, pp) == rank
            for kind in "IW" if action.kind == "B" else action.kind:
                assert (kind, action.stage, action.microbatch) not in ends
                ends[kind, action.stage, action.microbatch] = slot.end
    assert len(ends) == 3 * stages * microbatches
    for slot in (slot for slots in table for slot in slots):
        kind, stage, microbatch = slot.action.kind, slot.action.stage, slot.action.microbatch
        if kind == "F" and stage:
            assert ends["F", stage - 1, microbatch] <= slot.start
        if kind in "BI":
            assert ends["F", stage, microbatch] <= slot.start
            assert stage == stages - 1 or ends["I", stage + 1, microbatch] <= slot.start


def test_halved_backward_passes_fill_the_gaps() -> None:
    pp, microbatches = 4, 12
    shares = {}
    for schedule in ("Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"):
        section: Any = Pipeline(schedule=schedule)  # type: ignore[arg-type]
        shares[schedule] = idle_share(simulate(schedule_actions(section, pp, microbatches), [1.0] * 8))
    assert shares["InterleavedZeroBubble"] < shares["Interleaved1F1B"] / 2
    assert shares["ZBVZeroBubble"] < shares["Interleaved1F1B"] / 2


def test_a_slow_stage_makes_the_others_wait() -> None:
    """Two ranks, one of twice the work: by hand, 12 of 2 x 15 units are idle."""
    table = simulate(schedule_actions(Pipeline(), 2, 2), [1.0, 2.0])
    assert [slot.end for slot in table[1]] == [3.0, 7.0, 9.0, 13.0]
    assert idle_share(table) == pytest.approx(12 / 30)


def test_the_drawing_of_1f1b_by_hand() -> None:
    stages = tuple(Stage(index, index, (), 1, 1) for index in range(2))
    text = draw_timetable(timetable(Pipeline(), stages, 2, 3)).splitlines()
    assert text[0] == "rank 0  F0 F1 .  .  B0 =  F2 B1 =  .  B2 ="
    assert text[1] == "rank 1  .  F0 B0 =  F1 B1 =  F2 B2 =  .  ."


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[training]\nsteps = 5\n[parallel]\npp = 2\n[parallel.pipeline]\nschedule = "DualPipeV"\n')
    assert main(["check", str(recipe), "--world", "2", "--show-schedule"]) == 0
    assert "rank 1  .    1F0  2F0" in capsys.readouterr().out
    assert main(["check", str(recipe), "--world", "2", "--show-schedule", "--json"]) == 0
    schedule = json.loads(capsys.readouterr().out)["schedule"]
    assert schedule["ranks"][0][0] == ["F", 0, 0, 0.0, 1.0]
    assert 0 < schedule["idle_share_if_even"] <= schedule["idle_share"] < 1
    assert main(["check", str(recipe), "--parallel.pp=1", "--show-schedule"]) == 2
