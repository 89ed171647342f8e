"""Learning-rate schedules: pure functions of the step, as a factor on each peak rate. No torch, no state.

Steps count from 1, and the last one, `total`, has the final rate exactly.
"""

from __future__ import annotations

from titanlite.recipe.sections import Schedule
from titanlite.registry import Registry

SCHEDULES = Registry(
    "schedule",
    {name: f"titanlite.optim.schedules.shapes:{name}" for name in ("constant", "linear", "cosine", "sqrt", "wsd")},
)


def lr_factor(step: int, section: Schedule, total: int) -> float:
    """Factor on the peak learning rate at `step` (1 … total): linear warm-up from 0, then the named shape."""
    if step < section.warmup_steps:
        return step / section.warmup_steps
    factor: float = SCHEDULES.get(section.name)(step, section, total)
    return factor
