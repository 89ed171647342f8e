"""Shares of parameters: together they are the whole, each element once."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from titanlite.models.spec import ShardingRule
from titanlite.plan.placement import ALONE, GroupRank, Placement, find_placements, local_slices, pattern_of


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
        ShardingRule("layers.*.ffn.input", "gather"),
        ShardingRule("layers.*.ffn.up", "column", 2),
        ShardingRule("layers.*.ffn.down", "row"),
        ShardingRule("head.input", "gather"),
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
