"""What one layout saves any other loads: bit for bit, optimizer state and all, and the curve goes on as if nothing was.

The pairs that are not in every test run are in --all.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.parity import parity_runs
from support.parity.compare import Result, assert_same, reference
from support.parity.parity_runs import Curve, assemble, small_recipe
from support.pool import Pool

from titanlite.recipe.sections import Recipe

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "zero 1": (2, {"zero_stage": 1}),
    "zero 3": (3, {"zero_stage": 3}),
    "hsdp": (4, {"dp_replicate": 2, "zero_stage": 2}),
    "tp, zero 3": (4, {"tp": 2, "zero_stage": 3}),
    "cp, zero 2": (4, {"cp": 2, "zero_stage": 2}),
    "pp, two stages a rank": (3, {"pp": 3, "pipeline": {"schedule": "Interleaved1F1B"}}),
    "pp in a V, tp, zero 1": (8, {"pp": 2, "tp": 2, "zero_stage": 1, "pipeline": {"schedule": "ZBVZeroBubble"}}),
}
DEFAULT = {
    ("one process", "hsdp", "adamw"),
    ("zero 3", "cp, zero 2", "adamw"),
    ("tp, zero 3", "pp, two stages a rank", "adamw"),
    ("pp in a V, tp, zero 1", "zero 1", "adamw"),
    ("tp, zero 3", "zero 1", "muon"),
}
"""Pairs that every test run has."""
STEP = 3  # that the checkpoints are of; three more follow
Whole = dict[str, torch.Tensor]


def everywhere(pool: Pool, function: Any, layout: str, recipe: Recipe, *arguments: Any) -> list[Any]:
    """What `function` returns on each rank of the layout."""
    ranks, _ = LAYOUTS[layout]
    text = recipe.model_dump_json()
    return pool.run(function, ranks, text, *arguments) if ranks > 1 else [function(0, 1, text, *arguments)]


class Checkpoints:
    """One of each layout and optimizer, written when a test first asks for it."""

    def __init__(self, pool: Pool, corpus: str, folder: Path) -> None:
        self._pool = pool
        self._corpus = corpus
        self._folder = folder
        self._written: dict[str, tuple[Path, Whole]] = {}

    def of(self, layout: str, **sections: dict[str, Any]) -> tuple[Path, Whole]:
        """Where it lies, and the state that its ranks held when they wrote it."""
        run = {"stop_after_step": STEP}
        recipe = small_recipe(self._corpus, **sections, parallel=LAYOUTS[layout][1], run=run)
        key = recipe.model_dump_json()
        if key not in self._written:
            folder = self._folder / str(len(self._written))
            states = everywhere(self._pool, parity_runs.train_until_stopped, layout, recipe, str(folder))
            self._written[key] = folder / f"step-{STEP:08d}", assemble(itertools.chain(*states))
        return self._written[key]


@pytest.fixture(scope="module")
def checkpoints(pool: Pool, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(pool, corpus, tmp_path_factory.mktemp("checkpoints"))


def on_disk(folder: Path) -> Whole:
    """The whole tensors of a checkpoint, put together by hand."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {name: load_file(folder / name) for name in manifest["files"]}
    parts = [
        (name, tuple(chunk["offset"]), tuple(entry["shape"]), files[chunk["file"]][chunk["key"]])
        for name, entry in manifest["tensors"].items()
        for chunk in entry["chunks"]
    ]
    return assemble(parts)


def train_on(
    pool: Pool, layout: str, recipe: Recipe, may_change: tuple[str, ...] = (), *folders: str
) -> tuple[Whole, list[tuple[Curve, Whole]]]:
    """The state that the run begins with; each rank's curve, and the weights at the end."""
    told = everywhere(pool, parity_runs.train_on, layout, recipe, may_change, *folders)
    begun, curves, ended = zip(*told, strict=True)
    weights = assemble(itertools.chain(*ended))
    return assemble(itertools.chain(*begun)), [(curve, weights) for curve in curves]


def last_steps(result: Result, curve: Curve) -> Result:
    """The end of a whole run's curve, as long as another run's."""
    return {key: values[-len(curve[key]) :] for key, values in result[0].items()}, result[1]


def assert_same_bits(found: Whole, expected: Whole) -> None:
    assert found.keys() == expected.keys()
    differing = [name for name in expected if found[name].dtype != expected[name].dtype]
    differing += [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not differing


def pairs() -> list[Any]:
    """All for AdamW, each layout once on either side for Muon."""
    names = list(LAYOUTS)  # those above, of one mesh
    adamw = [(saver, loader, "adamw") for saver, loader in itertools.product(names, names)]
    muon = [(saver, loader, "muon") for saver, loader in zip(names, names[5:] + names[:5], strict=True)]
    assert set(adamw + muon) > DEFAULT
    return [pytest.param(*pair, id="{} to {}: {}".format(*pair), marks=marks(pair)) for pair in adamw + muon]


def marks(pair: tuple[str, str, str]) -> list[pytest.MarkDecorator]:
    """Of a pair and its optimizer."""
    slow = [] if pair in DEFAULT else [pytest.mark.slow]
    return slow + ([pytest.mark.splits] if "pp in a V, tp, zero 1" in pair else [])


@pytest.mark.parametrize(("saver", "loader", "optimizer"), pairs())
def test_one_layout_goes_on_from_another(
    pool: Pool, corpus: str, checkpoints: Checkpoints, saver: str, loader: str, optimizer: str
) -> None:
    """The same bits in the writers' memory, on the disk and in the readers' memory; then the uninterrupted curve."""
    name = {"name": optimizer}
    folder, saved = checkpoints.of(saver, optimizer=name)
    assert_same_bits(on_disk(folder), saved)
    assert any(tensor.any() for key, tensor in saved.items() if key.startswith("optimizer.") and "/" in key)
    from_there = {"resume_from": str(folder)}
    recipe = small_recipe(corpus, optimizer=name, parallel=LAYOUTS[loader][1], checkpoint=from_there)
    begun, ends = train_on(pool, loader, recipe)
    assert_same_bits(begun, saved)
    for curve, weights in ends:
        assert len(curve["loss"]) == STEP
        assert_same((curve, weights), last_steps(reference(corpus, optimizer=name), curve))


MIXTURE = {"preset": "mixture"}
LAYOUTS |= {
    "ep of tp and cp": (8, {"tp": 2, "cp": 2, "ep": 4, "zero_stage": 3}),
    "ep": (3, {"ep": 3, "zero_stage": 2}),
    "ep, pp": (4, {"pp": 2, "ep": 2, "zero_stage": 1}),
}


@pytest.mark.parametrize("loader", ["one process", "ep", "ep, pp"])
def test_weights_of_two_meshes_and_buffers_go_on_under_another_layout(
    pool: Pool, corpus: str, checkpoints: Checkpoints, loader: str
) -> None:
    folder, saved = checkpoints.of("ep of tp and cp", model=MIXTURE)
    assert_same_bits(on_disk(folder), saved)
    assert saved["model.layers.4.router.bias_by_load"].any()
    from_there = {"resume_from": str(folder)}
    recipe = small_recipe(corpus, model=MIXTURE, parallel=LAYOUTS[loader][1], checkpoint=from_there)
    begun, ends = train_on(pool, loader, recipe)
    assert_same_bits(begun, saved)
    for curve, weights in ends:
        assert_same((curve, weights), last_steps(reference(corpus, model=MIXTURE), curve))


@pytest.mark.parametrize(
    ("saver", "loader"),
    [
        ("tp, zero 3", "hsdp"),
        pytest.param("pp in a V, tp, zero 1", "zero 3", marks=[pytest.mark.slow, pytest.mark.splits]),
        pytest.param("hsdp", "one process", marks=pytest.mark.slow),
    ],
)
def test_a_snapshot_goes_on_under_another_layout(
    pool: Pool, corpus: str, tmp_path: Path, saver: str, loader: str
) -> None:
    """On two machines, one of which is lost, and with no checkpoint on a disk."""
    every = {"snapshot_every": STEP}
    folders = str(tmp_path / "checkpoints"), str(tmp_path / "memory")
    until = small_recipe(corpus, parallel=LAYOUTS[saver][1], resilience=every, run={"stop_after_step": STEP})
    saved = assemble(itertools.chain(*everywhere(pool, parity_runs.train_until_stopped, saver, until, *folders)))
    shutil.rmtree(tmp_path / "checkpoints" / f"step-{STEP:08d}")
    shutil.rmtree(tmp_path / "memory" / "1")
    recipe = small_recipe(corpus, parallel=LAYOUTS[loader][1], resilience=every)
    begun, ends = train_on(pool, loader, recipe, (), *folders)
    assert_same_bits(begun, saved)
    for curve, weights in ends:
        assert len(curve["loss"]) == STEP
        assert_same((curve, weights), last_steps(reference(corpus), curve))


def test_bfloat16_goes_on_from_float32_under_another_layout(pool: Pool, corpus: str, checkpoints: Checkpoints) -> None:
    """Only the products are of fewer bits: the whole state is taken over as it is."""
    folder, saved = checkpoints.of("tp, zero 3", precision={"compute": "float32"})
    learned = [tensor for name, tensor in saved.items() if not name.startswith("guards.")]
    assert {tensor.dtype for tensor in learned if tensor.is_floating_point()} == {torch.float32}
    compute, loader = {"compute": "bfloat16"}, "pp, two stages a rank"
    recipe = small_recipe(
        corpus, precision=compute, parallel=LAYOUTS[loader][1], checkpoint={"resume_from": str(folder)}
    )
    begun, ends = train_on(pool, loader, recipe, may_change=("precision.compute",))
    assert_same_bits(begun, saved)
    losses = [curve["loss"][-1] for curve, _ in ends]
    assert losses == pytest.approx([reference(corpus, precision={"compute": "float32"})[0]["loss"][-1]] * 3, rel=0.02)


@pytest.mark.parametrize(
    ("before", "after"), [("float32", "float64"), pytest.param("float64", "bfloat16", marks=pytest.mark.slow)]
)
def test_a_warm_start_takes_weights_of_another_format_and_layout(
    pool: Pool, corpus: str, checkpoints: Checkpoints, before: str, after: str
) -> None:
    """As wide as they were, or rounded to the master weights' float32; then the curve of one process."""
    folder, saved = checkpoints.of("tp, zero 3", precision={"compute": before})
    sections = {"precision": {"compute": after}, "checkpoint": {"warm_start": str(folder)}}
    loader = "pp, two stages a rank"
    begun, ends = train_on(pool, loader, small_recipe(corpus, **sections, parallel=LAYOUTS[loader][1]))
    master = torch.float64 if after == "float64" else torch.float32
    weights = {name: tensor for name, tensor in saved.items() if name.startswith("model.")}
    assert_same_bits(
        {name: tensor for name, tensor in begun.items() if name in weights},
        {name: tensor.to(master) for name, tensor in weights.items()},
    )
    assert not any(tensor.any() for name, tensor in begun.items() if name.startswith("optimizer."))
    if after == "float64":
        for result in ends:
            assert_same(result, reference(corpus, **sections))
