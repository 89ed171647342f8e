"""SIGKILL at random moments; a hundred of them are in the fault matrix."""

from __future__ import annotations

import pytest
from kill_faults import at_random
from sandbox import Sandbox


@pytest.mark.parametrize(("ranks", "kills"), [(1, 2), (2, 3), (3, 3), (4, 2)])
def test_random_sigkills_leave_no_trace_in_the_numbers(box: Sandbox, ranks: int, kills: int) -> None:
    at_random(box, ranks, kills)
