"""SIGKILL at random moments; a hundred of them are in the fault matrix."""

from __future__ import annotations

import json

import pytest
from support.chaos.kill_faults import at_random
from support.chaos.sandbox import EVERY, STEPS, Sandbox


def test_layouts_between_kills_leave_no_trace_in_the_samples(box: Sandbox) -> None:
    """Killed on three ranks between saves, gone on with on two, killed, and ended by one."""
    for ranks, step in ((3, EVERY + 2), (2, 2 * EVERY + 3)):
        box.paused(ranks=ranks, step=step, on=[ranks - 1]).kill()
        (box.folder / "here").unlink()
    box.train()
    box.require_audited()
    found = json.loads(box.command("data", "audit", "runs/run", "--json"))
    layouts = [(each["steps"], each["data_ranks"]) for each in found["layouts"]]
    assert layouts == [([1, EVERY], 3), ([EVERY + 1, 2 * EVERY], 2), ([2 * EVERY + 1, STEPS], 1)]
    assert found["steps"] == STEPS and found["restarts"] == 2


@pytest.mark.parametrize(("ranks", "kills"), [(1, 2), (2, 3), (3, 3), (4, 2)])
def test_random_sigkills_leave_no_trace_in_the_numbers(box: Sandbox, ranks: int, kills: int) -> None:
    at_random(box, ranks, kills)
