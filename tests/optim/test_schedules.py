"""Schedules against closed forms and torch's own schedulers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.optim.schedules import SCHEDULES, lr_factor
from titanlite.recipe.sections import Schedule


def factors(total: int, **keys: object) -> list[float]:
    section = Schedule(**keys)  # type: ignore[arg-type]
    return [lr_factor(step, section, total) for step in range(1, total + 1)]


def test_cosine_without_warmup_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.1)
    for factor in factors(50, name="cosine", final_lr_ratio=0.1):
        optimizer.step()
        reference.step()
        assert factor == pytest.approx(reference.get_last_lr()[0])


def test_linear_warms_up_and_falls_in_straight_lines() -> None:
    values = factors(30, name="linear", warmup_steps=10, final_lr_ratio=0.5)
    assert values[:10] == pytest.approx([s / 10 for s in range(1, 11)])
    assert values[10:] == pytest.approx([1 - 0.5 * s / 20 for s in range(1, 21)])


def test_constant_and_inverse_square_root() -> None:
    assert factors(8, name="constant", warmup_steps=2) == [0.5] + [1.0] * 7
    assert factors(100, name="sqrt", warmup_steps=4)[15] == pytest.approx(math.sqrt(4 / 16))
    assert factors(100, name="sqrt", warmup_steps=4, final_lr_ratio=0.3)[-1] == 0.3


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_wsd_is_flat_and_then_decays(shape: str, middle: float) -> None:
    values = factors(100, name="wsd", warmup_steps=10, decay_steps=40, decay_shape=shape)
    assert values[9:60] == [1.0] * 51
    assert values[79] == pytest.approx(middle)
    assert values[-1] == pytest.approx(0)


def test_wsd_decays_over_the_last_fifth_by_default() -> None:
    values = factors(100, name="wsd")
    assert values[79] == 1.0 and values[80] < 1.0


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(SCHEDULES)),
    total=st.integers(1, 300),
    warmup=st.integers(0, 50),
    decay=st.none() | st.integers(1, 100),
    final=st.floats(0, 1),
)
def test_factors_stay_between_final_and_peak(
    name: str, total: int, warmup: int, decay: int | None, final: float
) -> None:
    section = Schedule(name=name, warmup_steps=warmup, decay_steps=decay, final_lr_ratio=final)
    for step in range(max(warmup, 1), total + 1):
        assert final - 1e-12 <= lr_factor(step, section, total) <= 1.0
    for step in range(1, warmup):
        assert lr_factor(step, section, total) == step / warmup
