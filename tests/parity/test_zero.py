"""Every ZeRO stage, HSDP and number of data ranks against one process, in float64, where a wrong factor cannot hide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parity_runs
import pytest
import torch
from parity_pool import Pool
from parity_runs import Curve, small_recipe

Result = tuple[Curve, dict[str, torch.Tensor]]

RELATIVE = 1e-9


def assert_same(result: Result, reference: Result) -> None:
    curve, weights = result
    expected, expected_weights = reference
    for key in expected:
        assert curve[key] == pytest.approx(expected[key], rel=RELATIVE), key
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        difference = ((weight - expected_weights[name]).norm() / expected_weights[name].norm()).item()
        assert difference < RELATIVE, f"{name} differs by {difference:.1e}"


_references: dict[str, Result] = {}


def reference(corpus: str, **sections: dict[str, Any]) -> Result:
    """The single process's run, once for all layouts that are compared with it."""
    recipe = small_recipe(corpus, **sections).model_dump_json()
    if recipe not in _references:
        _references[recipe] = parity_runs.train(0, 1, recipe)
    return _references[recipe]


LAYOUTS = [
    pytest.param(
        world, {"zero_stage": stage, "dp_replicate": copies}, id=f"{world}-ranks-{copies}-copies-stage-{stage}"
    )
    # Over four ranks, the six rows of a head's norm leave the last without any.
    for world, copies, stages in ((2, 1, (0, 1, 2, 3)), (3, 1, (0, 1, 2, 3)), (4, 2, (0, 1, 2, 3)), (4, 1, (1, 3)))
    for stage in stages
]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("world", "parallel"), LAYOUTS)
def test_the_curve_and_the_weights_are_those_of_one_process(
    pool: Pool, corpus: str, world: int, parallel: dict[str, Any], optimizer: str
) -> None:
    """With two microbatches, the last of them partly padding on three ranks."""
    name = {"name": optimizer}
    recipe = small_recipe(corpus, optimizer=name, parallel=parallel, training={"microbatch": 2 if world < 4 else 1})
    for result in pool.run(parity_runs.train, world, recipe.model_dump_json()):
        assert_same(result, reference(corpus, optimizer=name))


@pytest.mark.parametrize("stage", [2, 3])
def test_tied_embeddings(pool: Pool, corpus: str, stage: int) -> None:
    tied = {"tie_embeddings": True}
    recipe = small_recipe(corpus, model=tied, parallel={"zero_stage": stage})
    assert_same(pool.run(parity_runs.train, 2, recipe.model_dump_json())[0], reference(corpus, model=tied))


def test_clipping_takes_the_norm_over_all_ranks(pool: Pool, corpus: str) -> None:
    tight = {"clip_norm": 0.05}
    recipe = small_recipe(corpus, optimizer=tight, parallel={"zero_stage": 3})
    assert_same(pool.run(parity_runs.train, 3, recipe.model_dump_json())[0], reference(corpus, optimizer=tight))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_rounds_alike_on_every_layout(pool: Pool, corpus: str, stage: int) -> None:
    """Weights that travel in bfloat16 are rounded no more often than by the layer that uses them.

    Sums in another order move a gradient's last bfloat16 bit, so the curves stay within one rounding, 2^-8.
    """
    precision = {"compute": "bfloat16"}
    recipe = small_recipe(corpus, precision=precision, parallel={"zero_stage": stage}, training={"microbatch": 2})
    curve, _ = pool.run(parity_runs.train, 2, recipe.model_dump_json())[0]
    expected, _ = reference(corpus, precision=precision, training={"microbatch": 2})
    assert curve["loss"] == pytest.approx(expected["loss"], rel=2**-8)
    assert curve["loss"][0] == pytest.approx(expected["loss"][0], rel=1e-6), "before any update, only sums differ"
    assert curve["grad_norm"][0] == pytest.approx(expected["grad_norm"][0], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_compiled_blocks(pool: Pool, corpus: str, stage: int) -> None:
    recipe = small_recipe(corpus, parallel={"zero_stage": stage}, compile={"enabled": True}, training={"microbatch": 2})
    assert_same(pool.run(parity_runs.train, 2, recipe.model_dump_json())[0], reference(corpus))


def test_a_checkpoint_of_one_layout_goes_on_under_others(pool: Pool, corpus: str, tmp_path: Path) -> None:
    """2 ranks in stage 3, then 3 in stage 1, then one process."""
    muon = {"name": "muon"}
    folder = str(tmp_path / "checkpoints")
    for world, stage, stop in ((2, 3, 2), (3, 1, 4)):
        recipe = small_recipe(corpus, optimizer=muon, parallel={"zero_stage": stage}, run={"stop_after_step": stop})
        with pytest.raises(AssertionError, match=f"stopped after step {stop}"):
            pool.run(parity_runs.train, world, recipe.model_dump_json(), folder)
    curve, weights = parity_runs.train(0, 1, small_recipe(corpus, optimizer=muon).model_dump_json(), folder)
    expected, expected_weights = reference(corpus, optimizer=muon)
    assert_same(
        (curve, weights), ({key: values[-len(curve[key]) :] for key, values in expected.items()}, expected_weights)
    )


@pytest.mark.parametrize(
    "fault",
    [
        "gradients are means",
        "a microbatch is dropped",
        "a rank begins with another's rows",
        "each rank clips by its own norm",
    ],
)
def test_a_deliberate_fault_is_seen(pool: Pool, corpus: str, fault: str) -> None:
    """A test of these tests: with the fault, they fail."""
    recipe = small_recipe(corpus, parallel={"dp_replicate": 2, "zero_stage": 2}, training={"microbatch": 1})
    result = pool.run(parity_runs.train_with_fault, 4, fault, recipe.model_dump_json())[0]
    with pytest.raises(AssertionError):
        assert_same(result, reference(corpus))
