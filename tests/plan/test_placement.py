"""The placement table: on every mesh, the parts of a stage's ranks are the whole, as often as there are copies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.recipes import recipe

from titanlite.plan.layout import Layout
from titanlite.plan.placement import FSDP, Cut, Mesh, Placement, meshes_of, pattern_of, place

pytestmark = pytest.mark.quick


@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 7),
    unit=st.integers(1, 4),
    dimension=st.none() | st.integers(0, 1),
    degrees=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
    twice=st.booleans(),
)
def test_parts_tile_the_whole(
    rows: int, columns: int, unit: int, dimension: int | None, degrees: tuple[int, int, int, int], twice: bool
) -> None:
    shape = [rows, columns]
    cuts = [Cut(FSDP)]
    if dimension is not None:
        shape[dimension] *= unit
        cuts.insert(0, Cut("tp", dimension, unit))
    pp, replicas, shards, tp = degrees
    stages = (0, pp - 1) if twice and pp > 1 else (pp - 1,)
    mesh = Mesh(tuple(zip(("pp", "dp_replicate", FSDP, "tp"), degrees, strict=True)))
    placement = Placement((shape[0], shape[1]), mesh, tuple(cuts), stages)
    covered = torch.zeros(shape, dtype=torch.int64)
    held: dict[object, list[tuple[int, int]]] = {}
    for rank in filter(placement.on_stage_of, range(pp * replicas * shards * tp)):
        offset, size = placement.part(rank)
        covered[offset[0] : offset[0] + size[0], offset[1] : offset[1] + size[1]] += 1
        held.setdefault((offset, size), []).append(placement.copies(rank))
        (_, _), (used_rows, used_columns) = placement.part(rank, gathered=True)
        if dimension is None:
            assert (used_rows, used_columns) == tuple(shape)
    copies = len(stages) * replicas * (1 if dimension is not None else tp)
    assert (covered == copies).all()
    for (_, size), ranks in held.items():
        if all(size):  # empty parts, of several ranks, are the same
            assert sorted(ranks) == [(copies, index) for index in range(copies)]


@given(st.integers(1, 40), st.integers(1, 9))
def test_rows_are_fsdps(rows: int, ranks: int) -> None:
    chunks = torch.arange(rows).chunk(ranks)
    mine = [Cut(FSDP).part(rows, rank, ranks) for rank in range(ranks)]
    assert [size for _, size in mine if size] == [len(chunk) for chunk in chunks]
    assert [first for first, size in mine if size] == [int(chunk[0]) for chunk in chunks]


@given(st.integers(1, 500), st.integers(1, 12), st.integers(1, 9))
def test_parts_keep_units_together_and_are_even(units: int, unit: int, ranks: int) -> None:
    parts = [Cut("tp", 0, unit).part(units * unit, rank, ranks) for rank in range(ranks)]
    assert [first for first, _ in parts] == [sum(size for _, size in parts[:rank]) for rank in range(ranks)]
    assert sum(size for _, size in parts) == units * unit
    sizes = [size // unit for _, size in parts]
    assert max(sizes) - min(sizes) <= 1
    assert all(size % unit == 0 for _, size in parts)


def test_meshes_count_the_same_ranks() -> None:
    """Experts borrow the fastest ranks, so a stage's and a model copy's ranks are the same on both meshes."""
    meshes = meshes_of(Layout(2, 3, cp=2, tp=2, pp=2, ep=4), zero_stage=2)
    assert dict(meshes["weights"].degrees) == {"pp": 2, "dp_replicate": 2, FSDP: 6, "tp": 2}
    assert dict(meshes["experts"].degrees) == {"pp": 2, "dp_replicate": 2, FSDP: 3, "ep": 4}
    for rank in range(48):
        one, other = (mesh.coordinates(rank) for mesh in meshes.values())
        assert (one["pp"], one["dp_replicate"]) == (other["pp"], other["dp_replicate"])


def test_a_plan_cuts_the_weights_that_it_names() -> None:
    made = recipe(model__layers=2, parallel__tp=2, parallel__pp=2, parallel__dp_shard=2)
    table = place(made, Layout(1, 2, tp=2, pp=2))
    cut = {pattern_of(name): each.cut_over("tp") for name, each in table.items() if each.cut_over("tp")}
    assert cut["layers.*.ffn.down.weight"] == Cut("tp", 1, 1)
    assert cut["head.weight"] == cut["embed.weight"] == Cut("tp", 0, 1)
    assert not any("norm" in name for name in cut)
    assert (table["embed.weight"].stages, table["head.weight"].stages) == ((0,), (1,))


def test_patterns_leave_numbers_open() -> None:
    assert pattern_of("layers.12.ffn.w2.weight") == "layers.*.ffn.w2.weight"
