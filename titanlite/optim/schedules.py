"""Learning-rate schedules: pure functions of the step, as a factor on each peak rate. No torch, no state.

Steps count from 1, and the last one, `total`, has the final rate exactly. `decay_steps` always ends at the last step;
what lies between warm-up and decay is flat.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from titanlite.recipe.sections import Schedule as Section
from titanlite.registry import Registry


@dataclass(frozen=True)
class LrSchedule:
    factor: Callable[[int, Section, int], float]
    """(step, `[schedule]`, steps of the run) -> factor on the peak rates; called for steps past the warm-up only."""
    keys: tuple[str, ...] = ()
    """Keys of `[schedule]` that it reads, besides `name` and `warmup_steps`; `check` warns of others that are set."""


def _sqrt(step: int, section: Section, total: int) -> float:
    return max(math.sqrt(max(section.warmup_steps, 1) / step), section.final_lr_ratio)


def _decay(shape: str | None, step: int, section: Section, total: int) -> float:
    """From the end of warm-up on unless `decay_steps` is given; without a `shape`: at the end, in `decay_shape`."""
    decay_steps = section.decay_steps or (total - section.warmup_steps if shape else max(1, total // 5))
    progress = min(max((step - (total - decay_steps)) / max(decay_steps, 1), 0.0), 1.0)
    remaining = {
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "sqrt": 1.0 - math.sqrt(progress),
    }[shape or section.decay_shape]
    return section.final_lr_ratio + (1.0 - section.final_lr_ratio) * remaining


CONSTANT = LrSchedule(lambda step, section, total: 1.0)
LINEAR = LrSchedule(partial(_decay, "linear"), ("decay_steps", "final_lr_ratio"))
# Half a cosine (Loshchilov & Hutter 2017, without restarts).
COSINE = LrSchedule(partial(_decay, "cosine"), ("decay_steps", "final_lr_ratio"))
# Inverse square root (Vaswani et al. 2017, section 5.3), never below the final ratio.
SQRT = LrSchedule(_sqrt, ("final_lr_ratio",))
# Warm-up, stable, decay (Hu et al. 2024, MiniCPM): flat, then `decay_shape` over `decay_steps`.
WSD = LrSchedule(partial(_decay, None), ("decay_steps", "decay_shape", "final_lr_ratio"))

_NAMES = ("constant", "linear", "cosine", "sqrt", "wsd")
SCHEDULES = Registry("schedule", {name: f"titanlite.optim.schedules:{name.upper()}" for name in _NAMES})
schedule_named: Callable[[str], LrSchedule] = cache(SCHEDULES.get)


def lr_factor(step: int, section: Section, total: int) -> float:
    """Factor on the peak learning rate at `step` (1 … total): linear warm-up from 0, then the named schedule."""
    if step < section.warmup_steps:
        return step / section.warmup_steps
    return schedule_named(section.name).factor(step, section, total)
