"""Stages against brute force, and rules of schedules against the schedules themselves."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, count, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.models.llama_spec import PRESETS, SPEC
from titanlite.models.spec import Piece
from titanlite.plan.rules import apply_rules
from titanlite.plan.stages import (
    SPLIT_BACKWARD,
    rank_of_stage,
    stage_split,
    stages_per_rank,
    takes_microbatches,
)
from titanlite.recipe.sections import Pipeline, Recipe


def pieces_of(costs: list[int]) -> list[Piece]:
    """Embedding, blocks, and a last piece of two modules."""
    names = [("embed",), *((f"layers.{index}",) for index in range(len(costs) - 2)), ("norm", "head")]
    return [Piece(modules, flops) for modules, flops in zip(names, costs, strict=True)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=3, max_size=9), st.integers(1, 5))
def test_no_other_split_has_a_smaller_largest_stage(costs: list[int], pp: int) -> None:
    pp = min(pp, len(costs))
    stages = stage_split(pieces_of(costs), Pipeline(), pp)

    def value(ends: tuple[int, ...]) -> tuple[int, int, int]:
        parts = [(first, last) for first, last in zip((0, *ends), (*ends, len(costs)), strict=True)]
        without_blocks = sum(min(last, len(costs) - 1) <= max(first, 1) for first, last in parts)
        sums = [sum(costs[first:last]) for first, last in parts]
        return max(sums), without_blocks, sum(cost**2 for cost in sums)

    ends, last = [], 0
    for stage in stages[:-1]:
        last += stage.blocks + (stage.index == 0)
        ends.append(last)
    cuts = combinations(range(1, len(costs)), pp - 1)
    assert tuple(ends) == min(cuts, key=lambda cut: (*value(cut), cut[::-1])), "of equal ones, late stages begin early"


def test_stages_hold_every_module_once_in_order() -> None:
    """Five layers over three stages; the norm stays with the head."""
    pieces = pieces_of([1, 10, 10, 10, 10, 10, 5])
    stages = stage_split(pieces, Pipeline(), 3)
    assert [stage.modules for stage in stages] == [
        ("embed", "layers.0", "layers.1"),
        ("layers.2", "layers.3"),
        ("layers.4", "norm", "head"),
    ]
    assert [(stage.index, stage.rank, stage.blocks, stage.flops) for stage in stages] == [
        (0, 0, 2, 21),
        (1, 1, 2, 20),
        (2, 2, 1, 15),
    ]


def test_a_large_head_counts_like_the_blocks_that_it_costs() -> None:
    """The head of Llama 3 8B is worth two blocks, that of 405B one."""
    assert [s.blocks for s in stage_split(SPEC.pieces(PRESETS["llama3-8b"], 8192), Pipeline(), 4)] == [8, 8, 9, 7]
    blocks = [s.blocks for s in stage_split(SPEC.pieces(PRESETS["llama3.1-405b"], 8192), Pipeline(), 16)]
    assert blocks == [7, *[8] * 14, 7]


def test_blocks_as_the_recipe_says() -> None:
    section = Pipeline(schedule="ZBVZeroBubble", blocks_per_stage=(0, 3, 2, 0))
    stages = stage_split(pieces_of([1, 10, 10, 10, 10, 10, 5]), section, 2)
    assert [stage.blocks for stage in stages] == [0, 3, 2, 0]
    assert [stage.rank for stage in stages] == [0, 1, 1, 0]
    assert stages[0].modules == ("embed",)
    assert stages[-1].modules == ("norm", "head")


@pytest.mark.parametrize(
    ("schedule", "ranks"),
    [
        ("1F1B", [0, 1, 2]),
        ("Interleaved1F1B", [0, 1, 2, 0, 1, 2, 0, 1, 2]),
        ("DualPipeV", [0, 1, 2, 2, 1, 0]),
    ],
)
def test_which_rank_holds_a_stage(schedule: Any, ranks: list[int]) -> None:
    section = Pipeline(schedule=schedule, stages_per_rank=3)
    assert [rank_of_stage(schedule, index, 3) for index in range(3 * stages_per_rank(section))] == ranks


SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rules_are_those_of_torchs_schedules(schedule: Any) -> None:
    """Where the rule says so, and only there, torch makes the schedule, and it splits backward passes as we say."""
    from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

    from titanlite.plan.timetable import torch_stages

    kind: Any = get_schedule_class(schedule)
    single = issubclass(kind, PipelineScheduleSingle)
    held = stages_per_rank(Pipeline(schedule=schedule))
    assert single == (held == 1)
    for pp in (2, 3, 4):
        places = torch_stages(held, pp)
        for microbatches in range(1, 4 * pp + 2):
            try:
                made = kind(places[0] if single else places, microbatches, loss_fn=max)
            except ValueError:
                made = None
            assert (made is not None) == takes_microbatches(schedule, pp, microbatches), (pp, microbatches)
            if made is None or single:
                continue
            mapping = [made.stage_index_to_group_rank[stage] for stage in range(held * pp)]
            assert mapping == [rank_of_stage(schedule, stage, pp) for stage in range(held * pp)]
            kinds = {action.computation_type.value for action in made.pipeline_order[0] if action is not None}
            assert ("W" in kinds) == (schedule in SPLIT_BACKWARD)


def findings(microbatches: int, parallel: dict[str, Any], **sections: dict[str, Any]) -> list[tuple[str, str]]:
    """Findings on a pipeline of 5 blocks with this many microbatches."""
    values = {"training": {"global_batch": microbatches}, "model": {"layers": 5}, "parallel": parallel, **sections}
    recipe, pp = Recipe.model_validate(values), parallel["pp"]
    found = [finding for finding in apply_rules(recipe, pp) if finding.severity == "error"]
    return [(finding.key, finding.problem + finding.fix) for finding in found if finding.key != "training"]


@pytest.mark.parametrize(
    ("pipeline", "pp", "microbatches", "key", "words"),
    [
        ({}, 8, 8, "parallel.pp", "8 stages"),
        ({"schedule": "LoopedBFS", "stages_per_rank": 4}, 2, 8, "parallel.pipeline.stages_per_rank", "2 ranks x 4"),
        ({"blocks_per_stage": (2, 2)}, 2, 8, "parallel.pipeline.blocks_per_stage", "= 4 blocks, and the model has 5"),
        ({"blocks_per_stage": (2, 2, 1)}, 2, 8, "parallel.pipeline.blocks_per_stage", "3 stages are given"),
        ({"blocks_per_stage": (3, 0, 2)}, 3, 8, "parallel.pipeline.blocks_per_stage", "stage 1 would be empty"),
        ({}, 4, 3, "parallel.pipeline.microbatches", "have 4"),
        ({"schedule": "DualPipeV"}, 3, 5, "parallel.pipeline.microbatches", "have 6"),
        ({"schedule": "Interleaved1F1B"}, 2, 5, "parallel.pipeline.microbatches", "have 6"),
    ],
)
def test_what_cannot_be_is_named_with_its_fix(
    pipeline: dict[str, Any], pp: int, microbatches: int, key: str, words: str
) -> None:
    ((found, text),) = findings(microbatches, {"pp": pp, "pipeline": pipeline})
    assert found == key and words in text


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_next_number_of_microbatches_that_a_schedule_takes(schedule: str) -> None:
    for pp, microbatches in product((2, 3, 5, 10), range(1, 45)):
        parallel = {"pp": pp, "pipeline": {"schedule": schedule, "blocks_per_stage": ()}}
        said = [text for key, text in findings(microbatches, parallel) if key == "parallel.pipeline.microbatches"]
        more = next(n for n in count(microbatches) if takes_microbatches(schedule, pp, n))
        assert [f"have {more}:" in text for text in said] == [True] * (more > microbatches)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_settings_that_a_schedule_does_not_go_with(schedule: str) -> None:
    parallel = {"pp": 2, "pipeline": {"schedule": schedule}}
    keys = [key for key, _ in findings(8, parallel, model={"layers": 5, "tie_embeddings": True})]
    assert keys == (["parallel.pipeline.schedule"] if schedule in ("ZBVZeroBubble", "DualPipeV") else [])
    others: dict[str, Any] = {"recompute": {"mode": "full"}, "compile": {"enabled": True}}
    keys = [key for key, _ in findings(8, {**parallel, "zero_stage": 3}, **others)]
    assert keys == (["parallel.zero_stage", "recompute.mode", "compile.enabled"] if schedule in SPLIT_BACKWARD else [])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("found", ["2.11.0+cu130", "2.12.1", "2.13.0+cpu", "2.14.0a0+git1b2c3d4", "3.0"])
def test_what_older_torch_computes_wrong_is_refused(
    schedule: str, found: str, torch_of_the_check: Callable[[str], None]
) -> None:
    torch_of_the_check(found)
    refused = schedule in SPLIT_BACKWARD and found < "2.13"
    errors = findings(8, {"pp": 2, "pipeline": {"schedule": schedule}})
    assert [(key, found in text) for key, text in errors] == [("parallel.pipeline.schedule", True)] * refused
    assert not findings(8, {"pp": 1, "pipeline": {"schedule": schedule}}), "without a pipeline, nothing is split"
