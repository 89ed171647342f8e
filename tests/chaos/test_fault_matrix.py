"""Each fault is brought about, and what was promised holds."""

from __future__ import annotations

import pytest
from support.chaos.fault import Fault
from support.chaos.fault_matrix import MATRIX
from support.chaos.sandbox import Sandbox


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, marks=[pytest.mark.slow] if fault.slow else [], id=fault.name) for fault in MATRIX],
)
def test_what_is_promised_holds(fault: Fault, box: Sandbox) -> None:
    fault.run(box)
