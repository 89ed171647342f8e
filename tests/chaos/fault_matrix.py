"""Everything that is broken on purpose, by the number of its kind."""

from __future__ import annotations

import damage_faults
import data_faults
import disk_faults
import folder_faults
import guard_faults
import kill_faults
import rank_faults
import signal_faults
from fault import Fault

_THEMES = (
    kill_faults,
    signal_faults,
    disk_faults,
    damage_faults,
    folder_faults,
    guard_faults,
    data_faults,
    rank_faults,
)

MATRIX: list[Fault] = sorted((fault for theme in _THEMES for fault in theme.FAULTS), key=lambda fault: fault.row)
