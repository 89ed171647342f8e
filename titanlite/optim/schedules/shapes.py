"""The shapes: functions (step, section, total) -> factor, called for steps past the warm-up only.

`decay_steps` always ends at the last step; what lies between warm-up and decay is flat.
"""

from __future__ import annotations

import math

from titanlite.recipe.sections import Schedule


def constant(step: int, section: Schedule, total: int) -> float:
    """1, always."""
    return 1.0


def linear(step: int, section: Schedule, total: int) -> float:
    """A straight line to `final_lr_ratio`."""
    return _decay("linear", step, section.decay_steps or total - section.warmup_steps, section, total)


def cosine(step: int, section: Schedule, total: int) -> float:
    """Half a cosine to `final_lr_ratio` (Loshchilov & Hutter 2017, without restarts)."""
    return _decay("cosine", step, section.decay_steps or total - section.warmup_steps, section, total)


def wsd(step: int, section: Schedule, total: int) -> float:
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM): flat, then `decay_shape` over `decay_steps`."""
    return _decay(section.decay_shape, step, section.decay_steps or max(1, total // 5), section, total)


def sqrt(step: int, section: Schedule, total: int) -> float:
    """sqrt(warm-up / step): the inverse square root (Vaswani et al. 2017, section 5.3), never below the final ratio."""
    return max(math.sqrt(max(section.warmup_steps, 1) / step), section.final_lr_ratio)


def _decay(shape: str, step: int, decay_steps: int, section: Schedule, total: int) -> float:
    progress = min(max((step - (total - decay_steps)) / max(decay_steps, 1), 0.0), 1.0)
    remaining = {
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "sqrt": 1.0 - math.sqrt(progress),
    }[shape]
    return section.final_lr_ratio + (1.0 - section.final_lr_ratio) * remaining
