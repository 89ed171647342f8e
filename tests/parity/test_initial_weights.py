"""Initial weights are the same bits on every mesh."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.parity import parity_runs
from support.parity.parity_runs import assemble, small_recipe
from support.pool import Pool

from titanlite.models.init import initialise
from titanlite.models.spec import spec_of
from titanlite.plan.stages import V_SHAPED

MESHES: list[tuple[int, dict[str, Any]]] = [
    (2, {"zero_stage": 0}),
    (3, {"zero_stage": 3}),
    (4, {"dp_replicate": 2}),
    (5, {"zero_stage": 1}),
    (7, {"zero_stage": 2}),
    (2, {"tp": 2}),
    (3, {"tp": 3}),
    (4, {"tp": 2, "zero_stage": 3}),
    (3, {"cp": 3}),
    (3, {"pp": 3}),
    (4, {"pp": 2, "pipeline": {"schedule": "DualPipeV"}}),
    (8, {"pp": 2, "tp": 2, "cp": 2}),
    (8, {"pp": 2, "tp": 2, "zero_stage": 3, "pipeline": {"schedule": "Interleaved1F1B"}}),
]


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_same_bits_on_every_mesh(pool: Pool, corpus: str, tied: bool) -> None:
    """Built on the meta device and cut there, against a model made and filled on one process without any of it."""
    model = {"tie_embeddings": tied}
    recipe = small_recipe(corpus, model=model, precision={"compute": "float32"})
    spec = spec_of(recipe.model.preset)
    config = spec.configure(recipe.model)
    direct = spec.build(config, torch.float32)
    expected = parity_runs.table_of(direct)
    initialise(expected, lambda name: spec.initial_std(config, name), recipe.run.seed)
    for ranks, parallel in MESHES:
        if tied and parallel.get("pipeline", {}).get("schedule") in V_SHAPED:
            continue  # both ends on one rank: refused
        shared = small_recipe(corpus, model=model, precision={"compute": "float32"}, parallel=parallel)
        parts = pool.run(parity_runs.initial_weights, ranks, shared.model_dump_json())
        whole = assemble(itertools.chain(*parts))
        assert whole.keys() == expected.keys()
        for name, shard in expected.items():
            assert torch.equal(whole[name], shard.tensor), (name, parallel)
