"""The mesh: every rank has its own at, every sample one group of ranks, every element of a matrix one slice."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.plan.layout import Coordinates, Layout, batch_plan, layout_of
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
