"""One run against another: curves and final weights, by their largest relative difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from support.parity import parity_runs
from support.parity.parity_runs import Curve, Part, assemble, small_recipe
from support.pool import Pool
from titanlite.recipe.sections import Recipe

Result = tuple[Curve, dict[str, torch.Tensor]]

RELATIVE = 1e-9  # allowed between float64 runs: sums in another order differ by 1e-14, the smallest mistake by far more


def curve_difference(result: Result, reference: Result) -> float:
    """Over losses, gradient norms and validation, at every step."""
    curve, expected = result[0], reference[0]
    assert {key: len(values) for key, values in curve.items()} == {key: len(v) for key, v in expected.items()}
    pairs = [pair for key in expected for pair in zip(curve[key], expected[key], strict=True)]
    found, wanted = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    return ((found - wanted).abs() / wanted.abs()).nan_to_num(9.9).max().item()  # NaN would slip through Python's max


def weights_difference(result: Result, reference: Result) -> tuple[float, str]:
    """Over the parameters, by the norm of each, and the one that has it."""
    weights, expected = result[1], reference[1]
    assert weights.keys() == expected.keys()
    return max((((weights[n] - expected[n]).norm() / expected[n].norm()).nan_to_num(9.9).item(), n) for n in expected)


def assert_same(result: Result, reference: Result) -> None:
    """Both within `RELATIVE`."""
    assert curve_difference(result, reference) < RELATIVE, f"{result[0]}\nis not\n{reference[0]}"
    difference, name = weights_difference(result, reference)
    assert difference < RELATIVE, f"{name} differs by {difference:.1e}"


def results(ranks: Sequence[tuple[Curve, list[Part]]]) -> list[Result]:
    """Each rank's curve with the weights that all of them hold."""
    weights = assemble(part for _, parts in ranks for part in parts)
    return [(curve, weights) for curve, _ in ranks]


def run(pool: Pool, ranks: int, recipe: Recipe) -> list[Result]:
    """Train on so many ranks."""
    return results(pool.run(parity_runs.train, ranks, recipe.model_dump_json()))


_references: dict[str, Result] = {}

_LAYOUT = ("parallel", "recompute", "compile", "kernels", "training")
"""Sections that must not matter (of `training`, only the microbatch is ever another)."""


def reference(corpus: str, **sections: dict[str, Any]) -> Result:
    """The single process's run without any of what must not matter; one for all layouts that are compared with it."""
    recipe = small_recipe(corpus, **{name: keys for name, keys in sections.items() if name not in _LAYOUT})
    text = recipe.model_dump_json()
    if text not in _references:
        _references[text] = results([parity_runs.train(0, 1, text)])[0]
    return _references[text]
