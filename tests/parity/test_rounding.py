"""Layouts in the dtypes that runs use: the same curve as one process, up to what sums in another order may differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.parity.compare import curve_difference, reference, run, weights_difference
from support.parity.parity_runs import small_recipe
from support.pool import Pool

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    *((2, {"zero_stage": stage}) for stage in range(4)),
    (2, {"tp": 2}),
    (2, {"cp": 2}),
    (2, {"pp": 2}),
    (4, {"pp": 2, "tp": 2}),
]


@pytest.mark.parametrize(("ranks", "parallel"), LAYOUTS, ids=str)
def test_bfloat16_rounds_alike_on_every_layout(pool: Pool, corpus: str, ranks: int, parallel: dict[str, Any]) -> None:
    """Weights that travel in bfloat16 are rounded no more often than by the layer that uses them.

    Sums in another order move the last bfloat16 bit of an activation or a gradient, 2^-8 of it; over the 864 tokens
    and thousands of gradients of a step such errors cancel out, but for Adam, which makes whole steps of small
    gradients: the losses after it stay within one rounding.
    """
    precision = {"compute": "bfloat16"}
    recipe = small_recipe(corpus, precision=precision, parallel=parallel, training={"microbatch": 2})
    curve, _ = run(pool, ranks, recipe)[0]
    expected, _ = reference(corpus, precision=precision)
    assert curve["loss"] == pytest.approx(expected["loss"], rel=2**-8)
    assert curve["loss"][0] == pytest.approx(expected["loss"][0], rel=2**-8 / 864**0.5), "before any update"
    assert curve["grad_norm"][0] == pytest.approx(expected["grad_norm"][0], rel=2**-8)


@pytest.mark.parametrize(("ranks", "parallel"), LAYOUTS[3:], ids=str)
def test_float32(pool: Pool, corpus: str, ranks: int, parallel: dict[str, Any]) -> None:
    """2^-24 a rounding, some hundred of them in a row, and Adam's steps of gradients near zero on top of them."""
    precision = {"compute": "float32"}
    result = run(pool, ranks, small_recipe(corpus, precision=precision, parallel=parallel))[0]
    expected = reference(corpus, precision=precision)
    assert curve_difference(result, expected) < 100 * 2**-24
    assert weights_difference(result, expected)[0] < 1e-3


@pytest.mark.splits
def test_halved_backward_passes_add_up_as_whole_ones_do(pool: Pool, corpus: str) -> None:
    """In bfloat16: gradients of single microbatches are rounded, their sums are not, so the bits are the same.

    With the same stages on the same ranks (issue 14, item 0): over others, the squares of the gradient norm are summed
    in another order.
    """
    curves, weights = [], []
    for schedule in ("Interleaved1F1B", "InterleavedZeroBubble"):
        parallel = {"pp": 2, "zero_stage": 1, "pipeline": {"schedule": schedule}}
        precision = {"compute": "bfloat16"}
        recipe = small_recipe(corpus, parallel=parallel, training={"microbatch": 1}, precision=precision)
        curve, held = run(pool, 4, recipe)[0]
        curves.append(curve)
        weights.append(held)
    assert curves[0] == curves[1]
    for name, values in weights[0].items():
        assert torch.equal(values, weights[1][name]), name
