"""Each fault is brought about, and what was promised holds."""

from __future__ import annotations

import pytest
from support.chaos.fault import Fault
from support.chaos.fault_matrix import MATRIX
from support.chaos.sandbox import Sandbox

QUICK = "1: SIGKILL of one rank of three"  # what `./scripts/test.sh --quick` has of it


def _marks(fault: Fault) -> list[pytest.MarkDecorator]:
    return [pytest.mark.quick] * (fault.name == QUICK) + [pytest.mark.slow] * fault.slow


@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.name, marks=_marks(fault)) for fault in MATRIX])
def test_what_is_promised_holds(fault: Fault, box: Sandbox) -> None:
    fault.run(box)
