"""Float8 in float64: rounding to float8 is all the rounding that there is, so that a layout's part of it shows.

Where every scale is over the same values (the same microbatch, the same sequence, the same matrix), results are the
same to the last bits. Where it is not, what was close to nothing beside another rank's values loses other bits.
"""

from __future__ import annotations

from typing import Any

import pytest
from support.parity import parity_runs
from support.parity.compare import Result, curve_difference, results, run, weights_difference
from support.parity.float8_runs import MODEL, float8_recipe
from support.parity.parity_runs import small_recipe
from support.pool import Pool

from titanlite.plan.float8 import SETTINGS

SAME = 1e-12
FIRST_LOSS, FIRST_NORM, WEIGHTS = 1e-6, 2e-4, 1e-2
"""Issue 14, item 0. Where scales are over other values, 2^-17 of the largest is lost by one side and not by the other,
which here and there turns a rounding: it is luck whether any does. Over 24 pairs of runs the first loss was 2e-8 off at
most, its gradient norm 1e-4, and the weights 6e-3 after Adam had made whole steps of that. With no casts, or a scale a
row in the place of one a tensor, norms were 3e-4 off at least, and weights 3e-2."""
EXACT_GRADIENTS = "rowwise_with_hp_grad_weight"  # each token has its own scales, and no product sums over tokens

_alone: dict[tuple[str, int], Result] = {}


def alone(corpus: str, recipe: str, microbatch: int = 1) -> Result:
    """One process."""
    key = recipe, microbatch
    if key not in _alone:
        text = float8_recipe(corpus, recipe, training={"microbatch": microbatch}).model_dump_json()
        _alone[key] = results([parity_runs.train(0, 1, text)])[0]
    return _alone[key]


def assert_close(result: Result, reference: Result, same: bool = False) -> None:
    """`same`: to the last bits, throughout."""
    if same:
        assert curve_difference(result, reference) < SAME
    for key, limit in (("loss", FIRST_LOSS), ("grad_norm", FIRST_NORM)):
        assert result[0][key][0] == pytest.approx(reference[0][key][0], rel=limit), key
    difference, name = weights_difference(result, reference)
    assert difference < (SAME if same else WEIGHTS), name


RECIPES = [pytest.param(name, marks=() if name == "tensorwise" else pytest.mark.slow) for name in SETTINGS]


@pytest.mark.parametrize("recipe", RECIPES)
def test_float8_is_no_float64(corpus: str, recipe: str) -> None:
    """What is compared below differs from the run without float8, by what three bits are expected to change."""
    text = small_recipe(corpus, model=MODEL, optimizer={"lr": 1e-3}, training={"microbatch": 1}).model_dump_json()
    plain = results([parity_runs.train(0, 1, text)])[0]
    found = alone(corpus, recipe)
    assert 1e-4 < curve_difference(found, plain) < 0.1
    assert found[0]["loss"] == pytest.approx(plain[0]["loss"], rel=2e-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_microbatches_change_what_scales_are_over(corpus: str, recipe: str) -> None:
    assert_close(alone(corpus, recipe, microbatch=4), alone(corpus, recipe), same=recipe == EXACT_GRADIENTS)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero 0": (2, {"zero_stage": 0}),
    "zero 1": (3, {"zero_stage": 1}),
    "zero 2": (2, {"zero_stage": 2}),
    "zero 3": (2, {"zero_stage": 3}),
    "zero 3, full recompute": (2, {"zero_stage": 3}),
    "hsdp": (4, {"dp_replicate": 2, "zero_stage": 2}),
    "pp": (2, {"pp": 2}),
    "pp, interleaved": (2, {"pp": 2, "pipeline": {"schedule": "Interleaved1F1B"}}),
    "tp": (2, {"tp": 2}),
    "cp": (2, {"cp": 2}),
    "tp, zero 3": (4, {"tp": 2, "zero_stage": 3}),
}
ALL_SAME = ("zero", "hsdp", "pp")  # beginnings of layouts on which each scale is over what it is over in one process
DEFAULT = {("tensorwise", "zero 3")}  # and tp, with what it gathers in float8, below


def pairs() -> list[Any]:
    return [
        pytest.param(*pair, id=", ".join(pair), marks=() if pair in DEFAULT else pytest.mark.slow)
        for pair in ((recipe, layout) for recipe in SETTINGS for layout in LAYOUTS)
    ]


@pytest.mark.parametrize(("recipe", "layout"), pairs())
def test_a_layout_is_one_process(pool: Pool, corpus: str, recipe: str, layout: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    recompute = {"mode": "full" if "recompute" in layout else "none"}
    found = run(pool, ranks, float8_recipe(corpus, recipe, parallel=parallel, recompute=recompute))
    same = layout.startswith(ALL_SAME) or (recipe == EXACT_GRADIENTS and layout == "cp")
    for result in found:
        assert_close(result, alone(corpus, recipe), same)


slow = pytest.mark.slow
SENT: list[Any] = [
    ("tensorwise", 2, {"zero_stage": 2}, False),
    ("tensorwise", 2, {"tp": 2}, False),
    pytest.param("tensorwise", 3, {"zero_stage": 3}, False, marks=slow),  # uneven shares of 32 and 64 rows
    pytest.param(EXACT_GRADIENTS, 2, {"zero_stage": 3}, False, marks=slow),
    pytest.param("tensorwise", 4, {"tp": 4}, False, marks=slow),
    pytest.param("tensorwise", 4, {"tp": 2, "zero_stage": 3}, False, marks=slow),
    pytest.param("tensorwise", 4, {"tp": 2, "pp": 2}, False, marks=slow),
    pytest.param("tensorwise", 4, {"tp": 2, "cp": 2}, False, marks=slow),
    pytest.param("tensorwise", 2, {"tp": 2}, True, marks=slow),
]


@pytest.mark.parametrize(("recipe", "ranks", "parallel", "compiled"), SENT)
def test_what_travels_in_float8_gives_the_same(
    pool: Pool, corpus: str, recipe: str, ranks: int, parallel: dict[str, Any], compiled: bool
) -> None:
    """Shards of weights, and the inputs and gradients that tp gathers."""
    section = {"enabled": True, "recipe": recipe, "min_size": 0, "all_gather": True}
    sections = {"parallel": parallel, "precision": {"float8": section}, "compile": {"enabled": compiled}}
    for result in run(pool, ranks, float8_recipe(corpus, recipe, **sections)):
        assert_close(result, alone(corpus, recipe))
