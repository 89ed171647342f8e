"""Everything that is broken on purpose, by the number of its kind."""

from __future__ import annotations

from support.chaos import (
    damage_faults,
    data_faults,
    disk_faults,
    folder_faults,
    guard_faults,
    kill_faults,
    rank_faults,
    signal_faults,
)
from support.chaos.fault import Fault

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
