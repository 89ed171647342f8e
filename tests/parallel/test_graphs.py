"""What a compiled step is made of: whole graphs, as many as there are kinds of units, and none after the first step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.testing._internal.distributed.fake_pg import FakeStore

import titanlite.models.loss
from titanlite.data.packing import offsets_size
from titanlite.parallel.model import Batch
from titanlite.parallel.world import World
from titanlite.recipe.sections import Recipe
from titanlite.training.step import take_step
from titanlite.training.train_state import TrainState

LENGTH = 32
FLOAT8: dict[str, Any] = {"precision": {"float8": {"enabled": True, "min_size": 0}}}
SELECTIVE, FULL = ({"recompute": {"mode": mode}} for mode in ("selective", "full"))
DOCUMENTS = {"data": {"document_mask": True}}
ALONE = {"plain": {}, "selective": SELECTIVE, "full": FULL, "float8": FLOAT8 | SELECTIVE, "documents": DOCUMENTS}
ON_TWO: dict[str, dict[str, Any]] = {
    **{f"zero {stage}": {"parallel": {"zero_stage": stage}} for stage in range(4)},
    "zero 3, selective": {"parallel": {"zero_stage": 3}, **SELECTIVE},
    "zero 3, float8": {"parallel": {"zero_stage": 3}, **FLOAT8},
    "tp": {"parallel": {"tp": 2}},
    "tp, selective": {"parallel": {"tp": 2}, **SELECTIVE},
    "tp, float8, full": {"parallel": {"tp": 2}, **FLOAT8, **FULL},
    "cp": {"parallel": {"cp": 2}, **SELECTIVE},
    "cp, ring": {"parallel": {"cp": 2, "cp_method": "ring"}},
    "cp, documents": {"parallel": {"cp": 2}, **DOCUMENTS},
}


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """A group whose other rank is not there: messages arrive at once, with any numbers."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def graphs_of_a_run(sections: dict[str, Any], world: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of graphs after each of three steps of two microbatches, all of them whole."""
    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda *args, **named: compile(*args, **named, backend="aot_eager"))
    training = {"steps": 3, "global_batch": 2 * world, "sequence_length": LENGTH, "microbatch": 1}
    base = {"model": {"preset": "debug", "layers": 2}, "training": training, "compile": {"enabled": True}}
    state = TrainState(Recipe.model_validate(base | sections), World(0, world, torch.device("cpu")))
    state.initialise()
    shape = (2, 1, LENGTH)
    tokens, positions = torch.randint(0, 256, shape), torch.arange(LENGTH).expand(shape).contiguous()
    offsets = torch.full((2, offsets_size(1, LENGTH)), LENGTH, dtype=torch.int32)
    offsets[:, 0] = 0
    masks = (positions, offsets) if "data" in sections else (None, None)
    torch._dynamo.reset()
    counters.clear()
    found = []
    for step in (1, 2, 3):
        take_step(state, step, Batch(tokens, tokens, *masks, (), 0, 2, tokens.numel()), 1.0)
        found.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[] if each == "float8" else pytest.mark.slow) for each in ALONE]
)
def test_a_block_and_the_head_are_a_graph_each(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert graphs_of_a_run(ALONE[name], 1, monkeypatch) == [2, 2, 2]


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[] if each == "tp, selective" else pytest.mark.slow) for each in ON_TWO]
)
def test_so_they_are_on_two_ranks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert graphs_of_a_run(ON_TWO[name], 2, monkeypatch) == [2, 2, 2]


@pytest.mark.parametrize(
    ("kernels", "limit", "graphs"), [("auto", 0, 1), ("auto", 4 * LENGTH * 272, 2), ("torch", 2**30, 1), ("off", 0, 2)]
)
def test_a_head_by_chunks_is_not_compiled(
    kernels: str, limit: int, graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a microbatch's logits in float32 are larger than the limit, or chunks are asked for."""
    monkeypatch.setattr(titanlite.models.loss, "LARGE_LOGITS", limit)
    found = graphs_of_a_run({"kernels": {"linear_cross_entropy": kernels}}, 1, monkeypatch)
    assert found == [graphs] * 3


@pytest.mark.slow
@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("limit", [4 * LENGTH * 136 - 1, 4 * LENGTH * 136])
def test_a_tensor_parallel_head_counts_its_part_of_the_logits(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(titanlite.models.loss, "LARGE_LOGITS", limit)
    assert graphs_of_a_run({"parallel": {"tp": 2}}, 2, monkeypatch)[0] == (2 if limit == 4 * LENGTH * 136 else 1)
