"""Packed documents with a mask are each as if it were alone, on every way that attention is computed."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import pytest
from support.parity import packing_runs
from support.parity.parity_runs import small_recipe
from support.pool import Pool

from titanlite.data.splits import open_data
from titanlite.recipe.sections import Recipe

LAYOUTS: dict[str, tuple[int, dict[str, Any], bool]] = {
    "one process": (1, {}, True),
    "three data ranks": (3, {}, True),
    "cp, all-gather": (2, {"parallel": {"cp": 2}}, True),
    "cp, ring": (3, {"parallel": {"cp": 3, "cp_method": "ring"}}, True),
    "cp of two, ring": (2, {"parallel": {"cp": 2, "cp_method": "ring"}}, False),
    "cp, all-gather, of two copies": (4, {"parallel": {"cp": 2, "dp_replicate": 2}}, False),
    "tp": (3, {"parallel": {"tp": 3}}, False),
    "pp": (2, {"parallel": {"pp": 2}}, False),
    "pp and cp": (4, {"parallel": {"pp": 2, "cp": 2, "cp_method": "ring"}}, False),
    "tp and cp": (6, {"parallel": {"tp": 3, "cp": 2}}, False),
    "recomputed": (1, {"recompute": {"mode": "full"}}, False),
    "recomputed but for products": (1, {"recompute": {"mode": "selective"}}, False),
    "compiled": (1, {"compile": {"enabled": True}}, False),
    "chunks of logits": (1, {"kernels": {"linear_cross_entropy": "torch"}}, False),
}
"""Ranks, sections, and whether every test run has it."""


@pytest.fixture(scope="module")
def packed_corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Texts that all fit into 24 tokens with the separator."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("packed") / "texts.jsonl"
    texts = ["".join(draw.choices("abcdefgh é", k=draw.randint(1, 20)))[:11] for _ in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


WINDOWS = {"every token": (), "windows": (5, 0, 3, 14, 1)}


@pytest.fixture(scope="module")
def expected(packed_corpus: str) -> dict[str, packing_runs.Numbers]:
    recipes = {name: recipe_of(packed_corpus, WINDOWS[name]) for name in WINDOWS}
    return {name: packing_runs.alone(recipe.model_dump_json()) for name, recipe in recipes.items()}


def recipe_of(corpus: str, window: tuple[int, ...], **sections: dict[str, Any]) -> Recipe:
    """Of float64, with a step that reads all that there is once."""
    data = {"packing": "best_fit", "document_mask": True}
    small = small_recipe(corpus, data=data, model={"window": window or None}, **sections)
    source = open_data(small.data, small.training.sequence_length, small.run.seed).train.sources[0]
    lengths = {len(source.window(index)) - 1 for index in range(source.windows)}
    assert max(lengths) <= 24 and min(lengths) < 24, "some are padded"
    training = small.training.model_copy(update={"global_batch": source.windows})
    return small.model_copy(update={"training": training})


@pytest.mark.parametrize(
    ("ranks", "sections", "windows"),
    [
        pytest.param(n, s, windows, id=f"{name}, {windows}", marks=() if run else pytest.mark.slow)
        for name, (n, s, run) in LAYOUTS.items()
        for windows in WINDOWS
    ],
)
def test_each_document_is_alone(
    pool: Pool,
    packed_corpus: str,
    expected: dict[str, packing_runs.Numbers],
    ranks: int,
    sections: dict[str, Any],
    windows: str,
) -> None:
    recipe = recipe_of(packed_corpus, WINDOWS[windows], **sections)
    for found in pool.run(packing_runs.packed, ranks, recipe.model_dump_json()):
        assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(expected[windows]), rel=1e-9)
