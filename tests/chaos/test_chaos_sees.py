"""A test of the chaos tests: where titanlite makes a mistake, they fail."""

from __future__ import annotations

import pytest
from support.chaos.fault_matrix import MATRIX
from support.chaos.sandbox import Sandbox

SEEN_BY = {
    "writes_in_place": "SIGKILL in a save, between shards (sync)",
    "goes_on_without_momentum": "lock of a killed process",
    "reads_a_sample_twice": "lock of a killed process",
    "verifies_nothing": "bit flipped in the tensors",
    "the_newest_is_by_time": "clock jumps back",
}


@pytest.mark.parametrize(("mistake", "what"), SEEN_BY.items())
def test_a_deliberate_mistake_is_seen(box: Sandbox, mistake: str, what: str) -> None:
    (fault,) = [fault for fault in MATRIX if fault.what == what]
    box.whole()
    box.another("sound").prepared()
    box.mistake = mistake
    with pytest.raises(AssertionError):
        fault.run(box)
