from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.recipes import pipeline, recipe

from titanlite.checkpoint.save import boxes_to_write
from titanlite.cli.check import check_recipe, format_description
from titanlite.errors import RecipeError
from titanlite.models.llama import Llama
from titanlite.models.spec import spec_of
from titanlite.plan import memory
from titanlite.plan.describe import describe_run, sharding_table
from titanlite.plan.layout import Layout, batch_plan, layout_of
from titanlite.plan.memory import local_parameters
from titanlite.plan.placement import place
from titanlite.plan.rules import RULES, apply_rules
from titanlite.plan.rules.layout import stages
from titanlite.recipe.load import load_recipe
from titanlite.recipe.sections import Recipe

pytestmark = pytest.mark.quick


def sources(*named: str | dict[str, Any], **data: Any) -> dict[str, Any]:
    """Keys of a recipe with several sources."""
    tables = [each if isinstance(each, dict) else {"name": each} for each in named]
    return {"data__sources": [{"path": "texts", **each} for each in tables]} | {
        f"data__{k}": v for k, v in data.items()
    }


SCHEDULES = (
    *("GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS"),
    *("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"),
)
ROUNDS = {"precision__reduce": "bfloat16", "training__microbatch": 4, "world": 2}
CP_TP = {"parallel__cp": 2, "parallel__tp": 2}


def found(world: int = 1, **keys: Any) -> list[tuple[str, str]]:
    return [(finding.severity, finding.key) for finding in apply_rules(recipe(**keys), world)]


def test_a_sound_recipe_has_no_findings() -> None:
    assert found(optimizer__eps=1e-50, optimizer__betas=(0.9, 1 - 1e-9), precision__compute="float64") == []
    assert found() == []
    assert found(world=4) == []
    assert found(training__steps=None, training__tokens=9000) == []
    assert found(**ROUNDS) == found(**ROUNDS, parallel__tp=2) == [], "nothing waits to be sent"


WIDE_405B = {
    **{"model__preset": "custom", "model__layers": 126, "model__dim": 16384, "model__heads": 128},
    **{"model__kv_heads": 8, "model__ffn_dim": 53248, "training__global_batch": 4096, "parallel__tp": 8},
}


@pytest.mark.parametrize(
    ("key", "keys"),
    [
        ("training", {"training__steps": None}),
        ("training.tokens", {"training__tokens": 5}),
        ("training.steps", {"training__steps": 2**32}),  # issue 14, section D: the log of what is read has 32 bits
        ("training.tokens", {"training__steps": None, "training__tokens": 2**62}),
        ("optimizer.name", {"optimizer__name": "adam"}),
        ("schedule.name", {"schedule__name": "cosin"}),
        ("model.preset", {"model__preset": "llama3-8"}),
        ("model.kv_heads", {"model__kv_heads": 3}),
        ("model.window", {"model__window": (4, 4, 0)}),  # over four layers
        ("kernels.attention", {"kernels__attention": "cudnn", "data__document_mask": True}),
        ("kernels.attention", {"kernels__attention": "cudnn", "model__window": 16}),
        ("kernels.attention", {"kernels__attention": "flash", "precision__compute": "float32"}),
        ("model.kv_heads", {"model__kv_heads": 12}),
        ("model.dim", {"model__dim": 130}),
        ("model.heads", {"model__dim": 12}),
        ("model.vocab_size", {"model__vocab_size": 256}),
        ("data.corpus", sources("a", corpus="b")),
        ("data.sources.1.name", sources("a", "a")),
        ("data.corpus", {"data__corpus": ["python-stdlib", "python-stdlib"]}),
        ("data.sources.0.path", sources({"name": "a", "path": ["x", "y", "x"]})),
        (
            "data.validation.1.name",
            {"data__validation": [{"name": "a", "path": "a"}] * 2, "validation__every_steps": 1},
        ),
        ("data.sources.1", sources({"name": "a", "weight": 1.0}, "b")),
        ("data.sources.0.weight", sources({"name": "a", "weight": 1.0}, stages=[{"weights": {"a": 1.0}}])),
        ("data.stages", {"data__stages": [{"weights": {"a": 1.0}}]}),
        ("data.stages.0.weights.b", sources("a", stages=[{"weights": {"a": 1.0, "b": 1.0}}])),
        ("data.sources.1", sources("a", "b", stages=[{"weights": {"a": 1.0}}])),
        ("data.stages.0", sources("a", stages=[{"weights": {"a": 1.0}}] * 2)),
        ("data.stages.0.until", sources("a", stages=[{"until": 9, "weights": {"a": 1.0}}])),
        (
            "data.stages",
            sources("a", stages=[*[{"until": n, "weights": {"a": 1.0}} for n in (9, 5)], {"weights": {"a": 1.0}}]),
        ),
        # Issue 14, item 18: what a number is in the format that it is used in.
        ("optimizer.eps", {"optimizer__eps": 1e-50}),
        ("optimizer.eps", {"optimizer__eps": 1e-30}),
        ("optimizer.clip_norm", {"optimizer__clip_norm": 1e39, "precision__compute": "float32"}),
        ("optimizer.eps", {"optimizer__eps": 1e-160, "precision__compute": "float64"}),
        ("optimizer.lr", {"optimizer__lr": 1e-300}),
        ("optimizer.betas", {"optimizer__betas": (0.9, 1 - 1e-9)}),
        ("optimizer.muon_momentum", {"optimizer__name": "muon", "optimizer__muon_momentum": 1 - 1e-9}),
        ("optimizer.weight_decay", {"optimizer__weight_decay": 1e-39}),
        ("optimizer.clip_norm", {"optimizer__clip_norm": 1e-50}),
        ("model.norm_eps", {"model__norm_eps": 1e-50}),
        ("model.norm_eps", {"model__norm_eps": 1e-50, "precision__compute": "float64"}),
        ("model.rope_theta", {"model__rope_theta": 1e300}),
        ("model.rope_scaling.factor", {"model__rope_scaling": {"factor": 1e-320}}),
        ("model.init_std", {"model__init_std": 1e39}),
        ("resilience.spike_zscore", {"resilience__spike_zscore": 1e300, "resilience__on_spike": "skip"}),
        ("data.sources.1.weight", sources({"name": "a", "weight": 1.0}, {"name": "b", "weight": 1e308})),
        ("model.rope_scaling.low_freq_factor", {"model__rope_scaling": {"low_freq_factor": 4.0}}),
        ("optimizer.lr", {"optimizer__lr": 10.0}),
        ("optimizer.muon_lr", {"optimizer__name": "muon", "optimizer__muon_lr": 10.0}),
        ("parallel.dp_shard", {"parallel__dp_shard": 0}),
        ("parallel.dp_shard", {"parallel__dp_shard": 3, "world": 2}),
        ("parallel.dp_replicate", {"parallel__dp_replicate": 2}),
        ("parallel.dp_replicate", {"parallel__dp_replicate": 4, "parallel__zero_stage": 0, "world": 2}),
        ("parallel.dp_shard", {"parallel__dp_shard": 2, "parallel__tp": 2, "world": 8}),
        ("parallel.dp_shard", {"parallel__dp_shard": 1, "world": 2}),
        ("parallel.cp", {"parallel__cp": 3, "parallel__tp": 2, "training__sequence_length": 240, "world": 8}),
        ("parallel.tp", {"parallel__tp": 2, "world": 3}),
        ("parallel.pp", {"parallel__pp": 4, "world": 6}),
        ("parallel.tp", {"parallel__tp": 4, "world": 4}),
        ("training.sequence_length", {"parallel__tp": 2, "training__sequence_length": 255, "world": 2}),
        ("training.sequence_length", {"parallel__cp": 2, "training__sequence_length": 254, "world": 2}),
        ("training.sequence_length", {**CP_TP, "training__sequence_length": 254, "world": 4}),
        ("parallel.async_tp", {"parallel__tp": 2, "parallel__async_tp": True, "world": 2}),
        ("parallel.offload", {"parallel__offload": True}),
        ("parallel.dp_replicate", {**WIDE_405B, "parallel__zero_stage": 3, "world": 16384}),
        ("model", {"model__ffn_dim": 2**60}),
        ("checkpoint.resume_from", {"checkpoint__warm_start": "a", "checkpoint__resume_from": "b"}),
        ("checkpoint.keep_best", {"checkpoint__keep_best": 1, "checkpoint__every_steps": 2}),
        ("checkpoint.keep_best", {"checkpoint__keep_best": 1, "validation__every_steps": 2}),
        ("parallel.pp", {"parallel__pp": 7, "world": 7}),
        ("parallel.pipeline.blocks_per_stage", {**pipeline("1F1B", blocks_per_stage=[1, 2]), "world": 2}),
        ("parallel.pipeline.microbatches", {**pipeline("1F1B", microbatches=4), "training__microbatch": 4, "world": 2}),
        ("parallel.pipeline.microbatches", {**pipeline("DualPipeV", microbatches=2), "world": 2}),
        ("parallel.zero_stage", {**pipeline("ZBVZeroBubble", zero_stage=3), "world": 4}),
        ("parallel.pipeline.schedule", {**pipeline("DualPipeV"), "model__tie_embeddings": True, "world": 2}),
        ("recompute.budget", {"recompute__budget": 0.5}),
        ("recompute.budget", {"recompute__budget": 0.5, "recompute__mode": "full", "compile__enabled": True}),
        ("debug.find_nonfinite", {"debug__find_nonfinite": True, "compile__enabled": True}),
        ("debug.trace_shapes", {"debug__trace_shapes": True, "compile__enabled": True}),
        ("resilience.rerun_every", {"resilience__rerun_every": 5}),
    ],
)
def test_errors(key: str, keys: dict[str, Any]) -> None:
    assert found(**keys) == [("error", key)]


@pytest.mark.parametrize(
    ("key", "keys"),
    [
        ("parallel.zero_stage", {"parallel__zero_stage": 3, "parallel__dp_replicate": 2, "world": 2}),
        *(
            ("precision.reduce", {"precision__compute": compute, **ROUNDS, "parallel__zero_stage": 1})
            for compute in ("bfloat16", "float32")
        ),
        ("data.tokenizer", {"model__vocab_size": 128_256}),
        ("schedule.warmup_steps", {"schedule__warmup_steps": 100}),
        ("schedule.warmup_steps", {"schedule__name": "wsd", "schedule__warmup_steps": 81}),
        ("schedule.final_lr_ratio", {"training__steps": 1}),
        ("schedule.decay_steps", {"schedule__warmup_steps": 50, "schedule__decay_steps": 51}),
        ("schedule.decay_steps", {"schedule__name": "constant", "schedule__decay_steps": 5}),
        ("schedule.final_lr_ratio", {"schedule__name": "constant", "schedule__final_lr_ratio": 0.1}),
        ("schedule.decay_shape", {"schedule__decay_shape": "sqrt"}),
        ("optimizer.muon_lr", {"optimizer__muon_lr": 0.01}),
        ("resilience.max_skips", {"resilience__max_skips": 3}),
        ("resilience.max_rollbacks", {"resilience__max_rollbacks": 1}),
        ("resilience.spike_zscore", {"resilience__spike_zscore": 5.0}),
        ("resilience.spike_window", {"resilience__spike_window": 64}),
        ("resilience.on_spike", {"resilience__on_spike": "rollback"}),
        ("resilience.on_nonfinite", {"resilience__on_nonfinite": "rollback"}),
        ("resilience.check_replicas_every", {"resilience__check_replicas_every": 5}),
        ("resilience.check_replicas_every", {"resilience__check_replicas_every": 5, "world": 2}),
        ("data.prefetch", {"data__prefetch": 3}),
        ("checkpoint.keep_best", {"checkpoint__keep_best": 1, "checkpoint__keep_last": 0}),
        ("data.fim_tokens", {"data__fim_tokens": ("a", "b", "c")}),
        ("validation.sequences", {"validation__sequences": 3}),
        ("precision.reduce", {"precision__reduce": "bfloat16", "precision__compute": "float64"}),
        ("recompute.every", {"recompute__every": 2}),
        ("recompute.keep", {"recompute__keep": "products"}),
        ("recompute.keep", {"recompute__keep": "attention", "recompute__mode": "full"}),
        *(
            (f"parallel.pipeline.{key}", {"parallel__pipeline": {key: value}})
            for key, value in {
                "schedule": "GPipe",
                "microbatches": 4,
                "stages_per_rank": 3,
                "blocks_per_stage": [4],
            }.items()
        ),
        *(
            ("parallel.pipeline.stages_per_rank", {**pipeline(name, stages_per_rank=3), "world": 2})
            for name in ("GPipe", "1F1B", "ZBVZeroBubble", "DualPipeV")
        ),
        ("parallel.cp_method", {"parallel__cp_method": "ring"}),
        ("model.window", {"model__window": 128, "training__sequence_length": 128}),
        ("parallel.async_tp", {"parallel__async_tp": True}),
        ("parallel.prefetch", {"parallel__prefetch": 2, "parallel__zero_stage": 0, "world": 2}),
        ("parallel.prefetch", {"parallel__prefetch": 2, "parallel__dp_replicate": 2, "world": 2}),
        ("parallel.dp_shard", {"parallel__dp_shard": 2, "parallel__zero_stage": 0, "world": 2}),
        ("parallel.tp", {"parallel__tp": 2, "model__ffn_dim": 385, "world": 2}),
        (
            "parallel.tp",
            {"parallel__tp": 16, "model__dim": 256, "model__heads": 16, "model__kv_heads": 16, "world": 16},
        ),
        ("parallel.pipeline.microbatches", {**pipeline("1F1B", microbatches=20), "world": 2}),
        ("validation.every_steps", {"validation__every_steps": 101}),
        ("checkpoint.every_steps", {"checkpoint__every_steps": 101}),
        ("run.stop_after_step", {"run__stop_after_step": 100}),
        ("training.microbatch", {"training__microbatch": 33}),
        ("training.microbatch", {"training__microbatch": 5}),
        ("training.global_batch", {"training__global_batch": 31, "world": 2}),
        ("training.global_batch", {"training__global_batch": 2, "world": 3}),
    ],
)
def test_warnings(key: str, keys: dict[str, Any]) -> None:
    assert found(**keys) == [("warning", key)]


@pytest.mark.parametrize(
    "keys",
    [
        {"schedule__warmup_steps": 99},
        {"schedule__name": "wsd", "schedule__warmup_steps": 80},
        {"training__steps": 1, "schedule__final_lr_ratio": 0.1},
        {"training__steps": 1, "schedule__name": "constant"},
        {"schedule__warmup_steps": 50, "schedule__decay_steps": 50},
        {"schedule__name": "wsd", "schedule__decay_shape": "sqrt"},
        {"optimizer__name": "muon", "optimizer__muon_lr": 0.01},
        {"resilience__on_nonfinite": "skip", "resilience__max_skips": 3},
        {"resilience__on_spike": "skip", "resilience__max_skips": 3, "resilience__spike_zscore": 5.0},
        {"resilience__on_spike": "rollback", "resilience__max_rollbacks": 1, "checkpoint__every_minutes": 5.0},
        {"resilience__check_replicas_every": 5, "parallel__dp_replicate": 2, "world": 2},
        {"resilience__rerun_every": 5, "run__deterministic": True},
        {"data__workers": 1, "data__prefetch": 3},
        {"validation__every_steps": 100, "checkpoint__every_steps": 100, "run__stop_after_step": 99},
        {"training__microbatch": 8},
        {"training__microbatch": 4, "world": 2},
        {"parallel__dp_replicate": 2, "world": 2},
        {"model__kv_heads": 1},
        {"model__vocab_size": 257},
        {"compile__enabled": True},
        {"debug__find_nonfinite": True},
        {"parallel__tp": 2, "world": 4},
        {"parallel__tp": 2, "parallel__async_tp": True, "compile__enabled": True, "world": 2},
        {"parallel__cp": 2, "parallel__cp_method": "ring", "training__sequence_length": 252, "world": 2},
        {**CP_TP, "training__sequence_length": 256, "world": 4},
        {"parallel__tp": 4, "model__kv_heads": 4, "world": 4},
        {"parallel__tp": 8, "model__dim": 256, "model__heads": 8, "model__kv_heads": 8, "world": 8},
        {"parallel__pp": 6, "training__global_batch": 36, "world": 6},
        {"parallel__prefetch": 2, "parallel__cp": 2, "world": 2},
        {"parallel__prefetch": 2},
        {"parallel__dp_shard": 1, "parallel__dp_replicate": 2, "parallel__zero_stage": 0, "world": 2},
        *({**pipeline(name), "world": 2} for name in SCHEDULES),
        *({**pipeline(name, zero_stage=3), "world": 4} for name in ("GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS")),
        {**pipeline("LoopedBFS", stages_per_rank=3), "world": 2},
        {**pipeline("1F1B"), "model__tie_embeddings": True, "compile__enabled": True, "world": 2},
        {**pipeline("1F1B", 3, blocks_per_stage=[0, 4, 0]), "world": 3, "training__global_batch": 33},
        {**pipeline("1F1B", microbatches=8), "training__microbatch": 4, "world": 2},
        {**pipeline("1F1B", microbatches=16), "world": 2},
        {**pipeline("DualPipeV", microbatches=4), "world": 2},
        {**pipeline("Interleaved1F1B", 4, layers=8), "training__global_batch": 12, "world": 4},
        {"recompute__mode": "selective", "recompute__every": 2, "compile__enabled": True},
        {"recompute__mode": "selective", "recompute__keep": "products"},
        {"recompute__budget": 0.5, "compile__enabled": True},
        {**WIDE_405B, "parallel__zero_stage": 3, "parallel__dp_replicate": 8, "world": 16384},
    ],
)
def test_what_is_right_next_to_what_is_wrong(keys: dict[str, Any]) -> None:
    assert found(**keys) == []


def parallel(world: int, **degrees: int) -> dict[str, int]:
    return {f"parallel__{name}": degree for name, degree in degrees.items()} | {"world": world}


@pytest.mark.parametrize(
    ("problem", "fix", "keys"),
    [
        (
            "dp_replicate 3 x tp 2 = 6 does not divide 8",
            "dp_replicate = 1, 2 or 4; or start a multiple of 6 ranks (titanlite check --world 6).",
            parallel(8, dp_replicate=3, tp=2),
        ),
        ("tp 2 x pp 4 = 8 does not divide 4", "tp = 1, or pp = 1 or 2; or start", parallel(4, tp=2, pp=4)),
        ("tp 2 x pp 2 = 4 does not divide 5", "start a multiple of 4 ranks", parallel(5, tp=2, pp=2)),
        ("dp_shard 3 x tp 2 = 6 does not give 8", "dp_shard = -1", parallel(8, dp_shard=3, tp=2)),
        ("= 12 does not give 6", "tp = 2;", {**parallel(6, dp_shard=3, tp=4), "model__kv_heads": 4}),
        ("4 ranks are more than the 2 parts", "write 1 or 2.", parallel(4, tp=4)),
        ("385 parts of gate, up, down", "1 would be even.", {**parallel(2, tp=2), "model__ffn_dim": 385}),
        (
            "25.0%",
            "1 or 3 would be even.",
            {**parallel(2, tp=2), "model__dim": 96, "model__heads": 6, "model__kv_heads": 3},
        ),
        ("254 tokens", "such as 256.", {**parallel(2, cp=2), "training__sequence_length": 254}),
        (
            "32 sequences makes 8 microbatches of 4, not 4",
            "leave it out",
            {**pipeline("1F1B", microbatches=4), "training__microbatch": 4, "world": 2},
        ),
        (
            "8,905,824 parts, and 8,388,608",
            "dp_replicate = 8, dp_shard = 256.",
            {**WIDE_405B, "parallel__dp_replicate": 4, "parallel__zero_stage": 3, "world": 16384},
        ),
    ],
)
def test_numbers_and_fixes_of_layouts(problem: str, fix: str, keys: dict[str, Any]) -> None:
    world = keys.pop("world")
    (finding,) = apply_rules(recipe(**keys), world)
    assert problem in finding.problem and fix in finding.fix


def test_all_findings_at_once_errors_first() -> None:
    findings = found(model__kv_heads=3, data__prefetch=9, schedule__name="x", optimizer__name="y", model__vocab_size=9)
    assert findings == [
        ("error", "optimizer.name"),
        ("error", "schedule.name"),
        ("error", "model.kv_heads"),
        ("error", "model.vocab_size"),
        ("warning", "data.prefetch"),
    ]


@pytest.mark.parametrize(
    ("model", "own"),
    [
        ({"model__preset": "nothing"}, {"model.preset"}),
        ({"model__kv_heads": 3}, {"model.kv_heads", "parallel.tp", "parallel.pipeline.blocks_per_stage"}),
        ({}, {"precision.float8.exclude", "parallel.tp", "parallel.pipeline.blocks_per_stage"}),
    ],
)
def test_a_refused_model_hides_no_finding_that_does_not_hang_on_it(model: dict[str, Any], own: set[str]) -> None:
    split = pipeline("ZBVZeroBubble", zero_stage=3, blocks_per_stage=[1])
    float8 = {"precision__float8": {"enabled": True, "exclude": ["nothing"]}}
    errors = {
        key for severity, key in found(world=16, parallel__tp=8, **split, **float8, **model) if severity == "error"
    }
    assert errors == own | {"parallel.zero_stage", "precision.float8.enabled"}


def test_every_finding_says_how_to_mend_it() -> None:
    wrong = {"training__steps": None, "model__kv_heads": 3, "optimizer__name": "adm", "schedule__name": "zz"}
    fixes = [finding.fix for finding in apply_rules(recipe(**wrong, parallel__dp_replicate=7))]
    parts = ["training.steps", "'adamw'", "constant, linear, cosine, sqrt, wsd", "1, 2 or 4", "--world 7"]
    assert all(part in fix for part, fix in zip(parts, fixes, strict=True))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.none() | st.integers(1, 12))
def test_padding_is_found_where_there_is_some(global_batch: int, world: int, microbatch: int | None) -> None:
    batch = recipe(training__global_batch=global_batch, training__microbatch=microbatch)
    layout = Layout(dp_replicate=1, dp_shard=world)
    plans = [batch_plan(batch, layout, rank) for rank in range(world)]
    sequences = sum(plan.microbatches * plan.microbatch for plan in plans)
    padding = sequences - sum(len(plan.samples(0)) for plan in plans)
    warned = [f for f in apply_rules(batch, world) if f.key in ("training.global_batch", "training.microbatch")]
    assert bool(warned) == bool(padding)
    if warned:
        assert f"= {sequences} sequences: {padding / sequences:.0%} are padding" in warned[0].problem


def degrees(**most: int) -> dict[str, st.SearchStrategy[int]]:
    return {f"parallel__{name}": st.integers(1, limit) for name, limit in most.items()}


ANY_RECIPE = st.builds(
    recipe,
    training__steps=st.none() | st.integers(1, 50),
    training__tokens=st.none() | st.integers(1, 10**6),
    training__microbatch=st.none() | st.integers(1, 99),
    training__sequence_length=st.sampled_from([1, 8, 240, 255]),
    training__global_batch=st.integers(1, 99),
    model__preset=st.sampled_from(["debug", "30m", "nothing"]),
    model__dim=st.none() | st.integers(1, 300),
    model__heads=st.none() | st.integers(1, 12),
    model__kv_heads=st.none() | st.integers(1, 12),
    model__layers=st.none() | st.integers(1, 9),
    optimizer__name=st.sampled_from(["adamw", "muon", "nothing"]),
    schedule__name=st.sampled_from(["wsd", "sqrt", "nothing"]),
    schedule__warmup_steps=st.integers(0, 60),
    parallel__dp_shard=st.integers(-1, 3),
    parallel__zero_stage=st.integers(0, 3),
    parallel__offload=st.booleans(),
    parallel__async_tp=st.booleans(),
    parallel__prefetch=st.integers(0, 3),
    parallel__pipeline=st.fixed_dictionaries(
        {"schedule": st.sampled_from(SCHEDULES)},
        optional={
            "microbatches": st.none() | st.integers(1, 40),
            "stages_per_rank": st.integers(2, 4),
            "blocks_per_stage": st.none() | st.lists(st.integers(0, 4), max_size=6),
        },
    ),
    **degrees(dp_replicate=3, cp=2, tp=3, pp=4),
    recompute__budget=st.none() | st.just(0.5),
    compile__enabled=st.booleans(),
)


@settings(max_examples=200, deadline=None)
@given(ANY_RECIPE, st.integers(1, 3), st.none() | st.integers(1, 70))
def test_no_rule_ever_fails_and_sound_recipes_can_be_described(
    any_recipe: Recipe, times: int, any_world: int | None
) -> None:
    parallel = any_recipe.parallel
    least = parallel.dp_replicate * max(1, parallel.dp_shard) * parallel.cp * parallel.tp * parallel.pp
    world = any_world or least * times
    findings = apply_rules(any_recipe, world)
    if all(finding.severity == "warning" for finding in findings):
        assert describe_run(any_recipe, world)["steps"] >= 1
        assert format_description(any_recipe, world)
        assert sharding_table(any_recipe)


MOSTLY_SOUND = st.builds(
    recipe,
    model__preset=st.sampled_from(["debug", "30m"]),
    model__kv_heads=st.sampled_from([2, None]),
    model__layers=st.integers(2, 6),
    model__ffn_dim=st.sampled_from([384, 130]),
    optimizer__name=st.sampled_from(["adamw", "muon"]),
    training__sequence_length=st.just(240),
    training__global_batch=st.sampled_from([36, 72, 144]),
    parallel__zero_stage=st.integers(0, 3),
    parallel__dp_shard=st.integers(1, 3),
    parallel__offload=st.booleans(),
    parallel__prefetch=st.integers(0, 3),
    parallel__pipeline=st.fixed_dictionaries({"schedule": st.sampled_from(SCHEDULES)}),
    **degrees(dp_replicate=2, cp=2, tp=2, pp=3),
)


@settings(max_examples=150, deadline=None)
@given(MOSTLY_SOUND)
def test_all_ranks_together_hold_the_model_as_often_as_there_are_copies(any_recipe: Recipe) -> None:
    parallel = any_recipe.parallel
    world = parallel.dp_replicate * parallel.dp_shard * parallel.cp * parallel.tp * parallel.pp
    layout = layout_of(parallel, world)
    assert layout is not None
    if any(finding.severity == "error" for finding in apply_rules(any_recipe, world)):
        return
    assert format_description(any_recipe, world)
    assert sharding_table(any_recipe)
    cut = layout.dp_shard * layout.cp if parallel.zero_stage else 1
    copies = world // (layout.pp * layout.tp * cut)
    config = spec_of(any_recipe.model.preset).configure(any_recipe.model)
    with torch.device("meta"):
        model = Llama(config, torch.float32)
    # Norms are in whole on each tensor parallel rank, and a tied table is at both ends of a pipeline.
    once = sum(p.numel() * (layout.tp if "norm" in name else 1) for name, p in model.named_parameters())
    twice = config.vocab_size * config.dim if config.tie_embeddings and layout.pp > 1 else 0
    table = place(any_recipe, layout)
    held = [local_parameters(table, rank) for rank in range(world)]
    sizes = [sum(prod(item.kept) for item in rank) for rank in held]
    assert sum(sizes) == (once + twice) * copies
    assert describe_run(any_recipe, world)["parameters_kept"] == max(sizes)


@settings(max_examples=40, deadline=None)
@given(MOSTLY_SOUND, st.sampled_from([2**24, 2**10]), st.sampled_from([2**29, 2**14]))
def test_parts_of_a_checkpoint_are_counted_as_the_ranks_cut_them(
    any_recipe: Recipe, shared_bytes: int, file_bytes: int
) -> None:
    """Issue 14, section D: a run writes no table that its own reader refuses."""
    parallel, spec = any_recipe.parallel, spec_of(any_recipe.model.preset)
    layout = layout_of(parallel, parallel.dp_replicate * parallel.dp_shard * parallel.cp * parallel.tp * parallel.pp)
    assert layout is not None
    assume(not any(stages(any_recipe, layout)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "SHARED_BYTES", shared_bytes)
        number = 0
        for name, placement in place(any_recipe, layout).items():
            tensors = 2 if any_recipe.optimizer.name == "muon" and spec.is_block_matrix(name) else 3
            for rank in filter(placement.on_stage_of, range(layout.size)):
                part = placement.part(rank)
                nbytes = 4 * prod(part[1])
                number += tensors * len(boxes_to_write(name, part, nbytes, *placement.copies(rank), file_bytes))
        assert memory.count_parts(any_recipe, spec, layout, file_bytes) == number


def test_rules_are_documented() -> None:
    assert all(rule.__doc__ for rules in RULES.values() for rule in rules)


def test_findings_of_a_file_have_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('[training]\nsteps = 5\n[model]\npreset = "debug"\nkv_heads = 3\n[compile]\nenabled = true\n')
    with pytest.raises(RecipeError) as caught:
        check_recipe(load_recipe(path, ["--debug.trace_shapes=true"]))
    assert [(f.key, f.file, f.line) for f in caught.value.findings] == [
        ("model.kv_heads", str(path), 5),
        ("debug.trace_shapes", "command line", 0),
    ]
    path.write_text("[training]\nsteps = 5\nmicrobatch = 64\n")
    (warning,) = check_recipe(load_recipe(path))
    assert (warning.severity, warning.file, warning.line) == ("warning", str(path), 3)
