"""The mesh: every rank has its own at, every sample one group of ranks, every element of a matrix one slice."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.models.spec import ShardingRule
from titanlite.plan.layout import (
    ALONE,
    Coordinates,
    GroupRank,
    Layout,
    Placement,
    batch_plan,
    find_placements,
    layout_of,
    local_slices,
    pattern_of,
)
from titanlite.recipe.sections import Parallel, Pipeline, Recipe, Training

degrees = st.integers(1, 4)
layouts = st.builds(Layout, dp_replicate=degrees, dp_shard=degrees, cp=degrees, tp=degrees, pp=degrees)


@given(layouts)
def test_places_are_the_whole_mesh(layout: Layout) -> None:
    coordinates = [layout.coordinates(rank) for rank in range(layout.size)]
    assert len(set(coordinates)) == layout.size
    assert {(p.pp, p.data, p.cp, p.tp) for p in coordinates} == {
        (pp, data, cp, tp)
        for pp in range(layout.pp)
        for data in range(layout.data_ranks)
        for cp in range(layout.cp)
        for tp in range(layout.tp)
    }
    first_group = coordinates[: layout.tp]
    assert [p.tp for p in first_group] == list(range(layout.tp)), "tensor parallel ranks are neighbours"


@given(layouts, st.integers(0, 3))
def test_minus_one_takes_the_ranks_that_are_left(layout: Layout, stage: int) -> None:
    asked = Parallel(dp_replicate=layout.dp_replicate, cp=layout.cp, tp=layout.tp, pp=layout.pp, zero_stage=stage)
    found = layout_of(asked, layout.size)
    assert found is not None
    assert (found.size, found.data_ranks) == (layout.size, layout.data_ranks)
    assert found.dp_shard == (layout.dp_shard if stage else 1)


@settings(deadline=None)
@given(layouts, st.integers(1, 40), st.none() | st.integers(1, 5), st.none() | st.integers(1, 9))
def test_each_sample_is_counted_once_and_its_group_has_it(
    layout: Layout, global_batch: int, microbatch: int | None, passes: int | None
) -> None:
    recipe = Recipe(
        training=Training(global_batch=global_batch, microbatch=microbatch),
        parallel=Parallel(pipeline=Pipeline(microbatches=passes)),
    )
    counted: Counter[int] = Counter()
    of_data_rank: dict[int, set[range]] = {}
    shapes = set()
    for rank in range(layout.size):
        at: Coordinates = layout.coordinates(rank)
        plan = batch_plan(recipe, layout, at.data)
        samples = plan.samples(3 * global_batch)
        shapes.add((plan.microbatches, plan.microbatch))
        assert len(samples) <= plan.microbatches * plan.microbatch
        of_data_rank.setdefault(at.data, set()).add(samples)
        if at.is_batch_leader:
            counted.update(samples)
    assert counted == Counter(range(3 * global_batch, 4 * global_batch))
    assert all(len(different) == 1 for different in of_data_rank.values())
    assert len(shapes) == 1
    if layout.pp > 1 and passes is not None:
        assert next(iter(shapes))[0] >= passes


@given(st.integers(1, 500), st.integers(1, 12), st.integers(1, 9))
def test_slices_tile_and_keep_units_together(units: int, unit: int, ranks: int) -> None:
    whole = units * unit
    placement = Placement(0, whole, unit)
    shares = [placement.local_range(GroupRank(rank, ranks)) for rank in range(ranks)]
    end = 0
    for first, size in shares:
        assert (first, size >= 0) == (end, True)
        end = first + size
        assert end % unit == 0
    assert end == whole
    sizes = [size // unit for _, size in shares]
    assert max(sizes) - min(sizes) <= 1


@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 7),
    unit=st.integers(1, 4),
    dimension=st.none() | st.integers(0, 1),
    tp=st.integers(1, 5),
    cut=st.integers(1, 5),
)
def test_boxes_tile_the_whole(rows: int, columns: int, unit: int, dimension: int | None, tp: int, cut: int) -> None:
    shape = [rows, columns]
    placement = None
    if dimension is not None:
        shape[dimension] *= unit
        placement = Placement(dimension, shape[dimension], unit)
    covered = torch.zeros(shape, dtype=torch.int64)
    for tp_rank in range(tp):
        for cut_rank in range(cut):
            offset, size = local_slices(
                (shape[0], shape[1]), placement, GroupRank(tp_rank, tp), GroupRank(cut_rank, cut)
            )
            covered[offset[0] : offset[0] + size[0], offset[1] : offset[1] + size[1]] += 1
    assert (covered == (1 if placement else tp)).all()


@given(st.integers(1, 40), st.integers(1, 9))
def test_rows_are_fsdps(rows: int, ranks: int) -> None:
    chunks = torch.arange(rows).chunk(ranks)
    mine = [local_slices((rows,), None, ALONE, GroupRank(rank, ranks)) for rank in range(ranks)]
    assert [size[0] for _, size in mine if size[0]] == [len(chunk) for chunk in chunks]
    assert [offset[0] for offset, size in mine if size[0]] == [int(chunk[0]) for chunk in chunks]


def test_a_plan_cuts_the_weights_that_it_names() -> None:
    plan = (
        ShardingRule("layers.*.ffn", "gather"),
        ShardingRule("layers.*.ffn.up", "column", 2),
        ShardingRule("layers.*.ffn.down", "row"),
        ShardingRule("head", "gather"),
        ShardingRule("head", "column"),
    )
    shapes = {f"layers.{index}.ffn.{name}.weight": (6, 4) for index in (0, 11) for name in ("up", "down", "norm")}
    found = find_placements({**shapes, "head.weight": (9, 4), "layers.head.weight": (1, 1)}, plan)
    assert found == {
        **{f"layers.{index}.ffn.up.weight": Placement(0, 6, 2) for index in (0, 11)},
        **{f"layers.{index}.ffn.down.weight": Placement(1, 4, 1) for index in (0, 11)},
        "head.weight": Placement(0, 9, 1),
    }


def test_patterns_leave_numbers_open() -> None:
    assert pattern_of("layers.12.ffn.w2.weight") == "layers.*.ffn.w2.weight"
