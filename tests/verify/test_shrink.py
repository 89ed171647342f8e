"""Whatever check accepts at a world size, it accepts shrunken too, and the shape of the problem stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from titanlite.models.llama_spec import PRESETS
from titanlite.models.spec import spec_of
from titanlite.plan.layout import BatchPlan, batch_plan, layout_of
from titanlite.plan.rules import apply_rules
from titanlite.plan.stages import stages_per_rank
from titanlite.recipe.load import load_recipe
from titanlite.recipe.sections import Data, Pipeline, Recipe
from titanlite.verify.shrink import reference_of, shrink, without_compiler

ROOT = Path(__file__).parents[2]
SCHEDULES = Pipeline.model_fields["schedule"].annotation.__args__  # type: ignore[union-attr]


def errors(recipe: Recipe, world: int) -> list[str]:
    return [str(finding) for finding in apply_rules(recipe, world) if finding.severity == "error"]


def numbers(*values: int) -> st.SearchStrategy[int]:
    return st.sampled_from(values)


@st.composite
def blocks(draw: st.DrawFn, layers: int, stages: int) -> list[int] | None:
    """Sometimes, a split by hand: ends may be empty."""
    if stages > layers or draw(st.booleans()):
        return None
    counts = [draw(numbers(0, 1)), *[1] * (stages - 2), draw(numbers(0, 1))]
    counts[draw(st.integers(0, stages - 1))] += layers - sum(counts)
    return counts


@st.composite
def recipes(draw: st.DrawFn) -> tuple[Recipe, int]:
    """A recipe and a world size; most of them legal."""
    parallel: dict[str, Any] = {
        "tp": draw(numbers(1, 1, 2, 3, 4, 8)),
        "cp": draw(numbers(1, 1, 1, 2, 3, 8)),
        "pp": draw(numbers(1, 2, 3, 4, 8)),
        "dp_replicate": draw(numbers(1, 1, 2, 3)),
        "zero_stage": draw(numbers(0, 1, 2, 2, 3)),
        "cp_method": draw(st.sampled_from(["all-gather", "ring"])),
    }
    shards = draw(numbers(1, 1, 2, 3, 8))
    world = shards * parallel["tp"] * parallel["cp"] * parallel["pp"] * parallel["dp_replicate"]
    preset = draw(st.sampled_from(sorted(PRESETS)))
    layers = draw(numbers(2, 5, 7, 32, 126))
    pipeline: dict[str, Any] = {
        "schedule": draw(st.sampled_from(SCHEDULES)),
        "stages_per_rank": draw(numbers(2, 2, 3)),
        "microbatches": draw(st.sampled_from([None, None, 1, 3, 8, 20, 64])),
    }
    stages = parallel["pp"] * stages_per_rank(Pipeline.model_validate(pipeline))
    if parallel["pp"] > 1:
        pipeline["blocks_per_stage"] = draw(blocks(layers, stages))
    values = {
        "model": {
            "preset": preset,
            "layers": layers,
            "vocab_size": draw(numbers(257, 272, 1000, 128_256)),
            "tie_embeddings": draw(st.booleans()),
            "qk_norm": draw(st.booleans()),
        },
        "training": {
            "steps": 1000,
            "sequence_length": draw(numbers(48, 96, 768, 8192)) * draw(numbers(1, 1, 16)),
            "global_batch": draw(numbers(1, 7, 24, 60, 64, 512, 1024)),
            "microbatch": draw(st.sampled_from([None, 1, 2, 3, 8])),
        },
        "parallel": {**parallel, "pipeline": pipeline},
        "precision": {"compute": draw(st.sampled_from(["bfloat16", "float32", "float64"]))},
        "recompute": {"mode": draw(st.sampled_from(["none", "selective", "full"])), "every": draw(numbers(1, 2, 4))},
        "compile": {"enabled": draw(st.booleans())},
        "optimizer": {"name": draw(st.sampled_from(["adamw", "muon"]))},
        "data": {"document_mask": draw(st.booleans()), "packing": draw(st.sampled_from(["cut", "best_fit"]))},
    }
    return Recipe.model_validate(values), world


def plan_of(recipe: Recipe, world: int) -> BatchPlan:
    layout = layout_of(recipe.parallel, world)
    assert layout is not None
    return batch_plan(recipe, layout, 0)


def padded(plan: BatchPlan) -> bool:
    return plan.microbatches * plan.microbatch * plan.data_ranks > plan.global_batch


@settings(max_examples=150, deadline=None)
@given(recipes())
def test_what_is_legal_stays_legal_and_keeps_its_structure(case: tuple[Recipe, int]) -> None:
    recipe, world = case
    assume(not errors(recipe, world))
    small = shrink(recipe, world, 4)
    event(f"pp {small.parallel.pp}")
    assert errors(small, world) == []
    assert errors(without_compiler(small), world) == []
    assert errors(reference_of(small), 1) == []

    spec = spec_of(recipe.model.preset)
    before, after, tp = spec.configure(recipe.model), spec.configure(small.model), recipe.parallel.tp
    for switch in ("qk_norm", "tie_embeddings", "rope_scaling", "rope_theta", "norm_eps"):
        assert getattr(after, switch) == getattr(before, switch)
    for size in ("kv_heads", "ffn_dim", "vocab_size"):
        assert tp == 1 or getattr(after, size) % tp == getattr(before, size) % tp, size
    assert (after.heads > after.kv_heads) == (before.heads > before.kv_heads), "grouped or not"
    assert after.dim <= 512 and after.layers <= max(26, len(recipe.parallel.pipeline.blocks_per_stage or ()) + 1)
    assert spec.parameter_count(after) < 3e7

    real, plan = plan_of(recipe, world), plan_of(small, world)
    assert (plan.microbatches > 1) == (real.microbatches > 1), "adds gradients up or not"
    assert plan.microbatches <= real.microbatches and plan.microbatch <= real.microbatch
    if plan.microbatch * plan.data_ranks > 1:
        assert padded(plan) == padded(real)
    assert small.training.sequence_length <= 32 * recipe.parallel.cp * tp
    kept = ("precision", "recompute", "compile")
    assert all(getattr(small, section) == getattr(recipe, section) for section in kept)
    assert small.data == Data(document_mask=recipe.data.document_mask, packing=recipe.data.packing)
    different = {"pipeline"}
    assert small.parallel.model_dump(exclude=different) == recipe.parallel.model_dump(exclude=different)


@pytest.mark.parametrize(
    ("name", "world"),
    [
        ("debug", 1),
        ("llama3_8b", 8),
        ("llama3_8b", 128),
        ("llama3_8b_128k", 64),
        ("llama3_70b", 256),
        ("llama3_405b", 512),
    ],
)
def test_recipes_of_the_house(name: str, world: int) -> None:
    recipe = load_recipe(ROOT / "configs" / f"{name}.toml").recipe
    assert errors(recipe, world) == []
    small = shrink(recipe, world, 4)
    assert errors(small, world) == []
    spec = spec_of(small.model.preset)
    assert spec.parameter_count(spec.configure(small.model)) < 2e7


def test_a_small_405b() -> None:
    recipe = load_recipe(ROOT / "configs" / "llama3_405b.toml").recipe
    small = shrink(recipe, 512, 4)
    config = spec_of(small.model.preset).configure(small.model)
    assert (config.heads, config.kv_heads, config.dim, config.layers) == (32, 8, 256, 17)
    assert small.training.sequence_length == 32
    assert small.parallel == recipe.parallel
