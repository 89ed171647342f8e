"""A run that goes on under other layouts gives the curve of one that was never interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.parity import parity_runs
from support.parity.compare import assert_same, reference, results
from support.parity.parity_runs import small_recipe
from support.pool import Pool

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (3, {"zero_stage": 3}),
    (4, {"tp": 2, "zero_stage": 1}),
    (4, {"pp": 2, "cp": 2, "pipeline": {"schedule": "ZBVZeroBubble"}}),
    (8, {"dp_replicate": 2, "tp": 2, "pp": 2}),
    (2, {"pp": 2}),
]


@pytest.mark.slow
@pytest.mark.splits
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_goes_on_under_any_layout(pool: Pool, corpus: str, tmp_path: Path, optimizer: str) -> None:
    """A step on each layout, and the last one on one process."""
    folder, name = str(tmp_path / "checkpoints"), {"name": optimizer}
    for step, (ranks, parallel) in enumerate(LAYOUTS, start=1):
        recipe = small_recipe(corpus, optimizer=name, parallel=parallel, run={"stop_after_step": step})
        with pytest.raises(AssertionError, match=f"stopped after step {step}"):
            pool.run(parity_runs.train, ranks, recipe.model_dump_json(), folder)
    recipe = small_recipe(corpus, optimizer=name)
    curve, weights = results([parity_runs.train(0, 1, recipe.model_dump_json(), folder)])[0]
    expected, expected_weights = reference(corpus, optimizer=name)
    last = {key: values[-len(curve[key]) :] for key, values in expected.items()}
    assert_same((curve, weights), (last, expected_weights))
