from __future__ import annotations

import itertools
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.checkpoint.plan import boxes_to_write
from titanlite.cli.check import check_recipe, format_description
from titanlite.errors import Finding, RecipeError
from titanlite.models.llama import Llama
from titanlite.models.spec import spec_of
from titanlite.plan import checkpoint_parts
from titanlite.plan.describe import bubble_share, describe_run
from titanlite.plan.layout import Layout, batch_plan, layout_of
from titanlite.plan.memory import checkpoint_bytes, local_parameters
from titanlite.plan.rules import RULES, apply_rules
from titanlite.plan.sharding_table import format_sharding_table, sharding_table
from titanlite.plan.slicing import GroupRank, find_placements, local_slices, pattern_of
from titanlite.recipe.load import load_recipe
from titanlite.recipe.sections import Recipe

pytestmark = pytest.mark.quick


def recipe(**keys: Any) -> Recipe:
    """A valid recipe of 100 steps of the debug model with `section__key=value` laid over it."""
    values: dict[str, dict[str, Any]] = {"training": {"steps": 100}, "model": {"preset": "debug"}}
    for key, value in keys.items():
        section, _, name = key.partition("__")
        values.setdefault(section, {})[name] = value
    return Recipe.model_validate(values)


def pipeline(schedule: str, pp: int = 2, zero_stage: int = 2, layers: int = 4, **keys: Any) -> dict[str, Any]:
    """Keys of a recipe whose blocks `pp` ranks share."""
    section = {"schedule": schedule, **keys}
    return {
        "parallel__pp": pp,
        "parallel__zero_stage": zero_stage,
        "parallel__pipeline": section,
        "model__layers": layers,
    }


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
VALIDATES = {"validation__every_steps": 1}
ROUNDS = {"precision__reduce": "bfloat16", "training__microbatch": 4, "world": 2}
CP_TP = {"parallel__cp": 2, "parallel__tp": 2}


def found(world: int = 1, **keys: Any) -> list[tuple[str, str]]:
    return [(finding.severity, finding.key) for finding in apply_rules(recipe(**keys), world)]


def test_a_model_without_a_preset_is_plain_llama() -> None:
    """Issue 14, item 23: nothing of `debug` (QK-norm, rope_theta 10,000) shows through, and `check` names the model."""
    sizes = {"dim": 96, "layers": 2, "heads": 6, "vocab_size": 300}
    made = Recipe.model_validate({"model": sizes, "training": {"steps": 1}})
    run = describe_run(made)
    assert {key: run[key] for key in sizes} == sizes
    assert (run["preset"], run["architecture"]) == ("custom", "LlamaForCausalLM")
    plain = {"kv_heads": 6, "ffn_dim": 256, "rope_theta": 500_000.0, "rope_scaling": None, "norm_eps": 1e-5}
    plain |= {"qk_norm": False, "tie_embeddings": False}
    assert {key: run[key] for key in plain} == plain
    for part in ("custom: ", "LlamaForCausalLM", "rope_theta 500000", "norm_eps 1e-05", "no qk_norm"):
        assert part in format_description(made)
    assert describe_run(recipe(model__dim=256, model__qk_norm=False))["changed"] == ["dim", "qk_norm"]
    assert "Qwen3ForCausalLM" in format_description(recipe()) and "debug with another dim" in format_description(
        recipe(model__dim=256)
    )


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
        (
            "parallel.cp_method",
            {"parallel__cp": 2, "parallel__cp_method": "ring", "data__document_mask": True, "world": 2},
        ),
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
        {"recompute__mode": "selective"},
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
    samples = [sample for rank in range(world) for sample in batch_plan(batch, layout, rank).samples(0)]
    warned = [f for f in apply_rules(batch, world) if f.key in ("training.global_batch", "training.microbatch")]
    assert bool(warned) == (None in samples)
    if warned:
        assert f"= {len(samples)} sequences: {samples.count(None) / len(samples):.0%} are padding" in warned[0].problem


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
    held = [
        local_parameters(any_recipe, layout, tp_rank, cut_rank)
        for tp_rank in range(layout.tp)
        for cut_rank in range(cut)
    ]
    sizes = [[sum(prod(item.kept) for item in rank) for rank in ranks] for ranks in held]
    assert sum(map(sum, sizes)) * copies == (once + twice) * copies
    assert describe_run(any_recipe, world)["parameters_kept"] == max(map(max, sizes))


@settings(max_examples=40, deadline=None)
@given(MOSTLY_SOUND, st.sampled_from([2**24, 2**10]), st.sampled_from([2**29, 2**14]))
def test_parts_of_a_checkpoint_are_counted_as_the_ranks_cut_them(
    any_recipe: Recipe, shared_bytes: int, file_bytes: int
) -> None:
    """Issue 14, section D: a run writes no table that its own reader refuses."""
    parallel, spec = any_recipe.parallel, spec_of(any_recipe.model.preset)
    layout = layout_of(parallel, parallel.dp_replicate * parallel.dp_shard * parallel.cp * parallel.tp * parallel.pp)
    assert layout is not None
    config = spec.configure(any_recipe.model)
    cuts, tied = find_placements(spec.shapes(config), spec.sharding(config)), spec.tied(config).values()
    copies, cut = layout.weights(parallel.zero_stage)
    ranks = list(itertools.product(range(layout.tp), range(cut), range(copies), range(2)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_parts, "SHARED_BYTES", shared_bytes)
        number = 0
        for name, shape in spec.shapes(config).items():
            for tp, row, copy, end in ranks:
                at_both_ends = name in tied and layout.pp > 1
                if end and not at_both_ends:
                    continue
                held, holder = copies * (1 + at_both_ends), copy * (1 + at_both_ends) + end
                if name not in cuts:
                    held, holder = held * layout.tp, holder * layout.tp + tp
                part = local_slices(shape, cuts.get(name), GroupRank(tp, layout.tp), GroupRank(row, cut))
                nbytes = 4 * prod(part[1])
                written = boxes_to_write(name, part, nbytes, held, holder, file_bytes)
                number += len(written) * (
                    2 if any_recipe.optimizer.name == "muon" and spec.is_block_matrix(name) else 3
                )
        assert checkpoint_parts.count_parts(any_recipe, spec, layout, file_bytes) == number


def test_rules_are_documented() -> None:
    assert all(rule.__doc__ for rule in RULES)


class TestDescribe:
    def test_numbers_of_a_small_model(self) -> None:
        """By hand: dim 4, 2 layers, 2 heads of 2 (1 of keys and values), ffn 6, 300 rows, untied."""
        small = recipe(
            model__dim=4,
            model__layers=2,
            model__heads=2,
            model__kv_heads=1,
            model__ffn_dim=6,
            model__vocab_size=300,
            model__qk_norm=False,
            model__tie_embeddings=False,
            training__steps=None,
            training__tokens=1001,
            training__global_batch=5,
            training__sequence_length=10,
            training__microbatch=2,
        )
        matrices = 2 * (4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 6)
        parameters = matrices + 2 * 2 * 4 + 4 + 2 * 300 * 4
        run = describe_run(small, world=2)
        assert (run["parameters"], run["embedding_parameters"]) == (parameters, 1200)
        assert (run["steps"], run["tokens"], run["tokens_per_step"]) == (21, 1050, 50)
        assert (run["world"], run["mesh"], run["microbatch"], run["microbatches"]) == (
            2,
            {"pp": 1, "dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 1},
            2,
            2,
        )
        # Stage 2 over two ranks: half of the weights, gradients and moments, and all weights gathered in bfloat16.
        assert run["state_bytes"] == {
            "weights": 2 * parameters,
            "gathered": 2 * parameters,
            "gradients": 2 * parameters,
            "optimizer": 4 * parameters,
            "total": 10 * parameters,
        }
        # 6 operations a multiplied parameter. Attention, in each of 2 layers and 2 heads: 2 products with 10 positions
        # of 2 values, 2 operations a multiply-add, and the backward costs twice the forward.
        assert run["flops_per_token"] == 6 * (parameters - 1200) + 2 * 2 * (2 * 10 * 2 * 2) * 3
        assert run["flops"] == run["flops_per_token"] * 1050

    def test_muon_keeps_one_moment_of_matrices(self) -> None:
        adamw, muon = (describe_run(recipe(optimizer__name=name))["state_bytes"] for name in ("adamw", "muon"))
        kept = 4 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 384)
        assert adamw["optimizer"] - muon["optimizer"] == 4 * kept

    def test_float64_doubles(self) -> None:
        single, double = (
            describe_run(recipe(precision__compute=name))["state_bytes"] for name in ("float32", "float64")
        )
        assert double["total"] == 2 * single["total"]

    @pytest.mark.parametrize(
        ("stage", "cut"),
        [(0, ()), (1, ("weights", "optimizer")), (2, ("weights", "optimizer", "gradients")),
         (3, ("weights", "optimizer", "gradients"))],
    )  # fmt: skip
    def test_a_zero_stage_cuts_what_its_name_says(self, stage: int, cut: tuple[str, ...]) -> None:
        """Table 1 of the ZeRO paper, but for the masters: FSDP keeps them cut from stage 1 on, and gathers copies.

        Even where nothing is cut, what computes is a copy of the masters in the compute dtype.
        """
        alone, together = (describe_run(recipe(parallel__zero_stage=stage), world)["state_bytes"] for world in (1, 4))
        for part in ("weights", "gradients", "optimizer"):
            assert together[part] == -(-alone[part] // 4 if part in cut else -alone[part])
        # In stage 3 two of the four blocks, the head and the last norm.
        block = 128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 384 + 2 * 128 + 2 * 32
        resting = 2 * block + 272 * 128 if stage == 3 else 0
        assert alone["gathered"] == 0
        assert together["gathered"] == 2 * (describe_run(recipe(), 4)["parameters"] - resting)

    def test_a_rank_of_a_three_dimensional_mesh(self) -> None:
        """By hand: 5 blocks of dim 8, 4 heads (2 of keys and values), ffn 6, 300 rows; pp 2 x dp_shard 2 x tp 2."""
        sizes = {"dim": 8, "layers": 5, "heads": 4, "kv_heads": 2, "ffn_dim": 6, "vocab_size": 300, "qk_norm": False}
        mesh = {"tp": 2, "pp": 2, "pipeline": {"blocks_per_stage": [3, 2]}}
        keys = {f"model__{name}": value for name, value in sizes.items()}
        keys |= {f"parallel__{name}": value for name, value in mesh.items()}
        run = describe_run(recipe(**keys, training__global_batch=16), world=8)
        # Each rank has half of the heads: wq and wo are [4, 8] and [8, 4], wk and wv [2, 8]; of the FFN 3 of 6 columns.
        block = 2 * 4 * 8 + 2 * 2 * 8 + 3 * 3 * 8 + 2 * 8
        first, last = 150 * 8 + 3 * block, 150 * 8 + 2 * block + 8
        assert run["mesh"] == {"pp": 2, "dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 2}
        assert (run["microbatch"], run["microbatches"], run["data_ranks"]) == (1, 8, 2)
        # FSDP cuts rows: 3 of ffn.gate's and ffn.up's are 2 and 1, the even ones halves.
        kept = 150 * 8 // 2 + 3 * (2 * 4 * 8 // 2 + 2 * 2 * 8 // 2 + 2 * 2 * 8 + 8 * 3 // 2 + 2 * 8 // 2)
        assert (run["parameters_used"], run["parameters_kept"]) == (max(first, last), kept)
        assert run["shapes"]["layers.*.ffn.up.weight"] == {"whole": [6, 8], "used": [3, 8], "kept": [2, 8]}
        assert run["shapes"]["layers.*.ffn.down.weight"] == {"whole": [8, 6], "used": [8, 3], "kept": [4, 3]}
        assert run["state_bytes"] == {
            "weights": 4 * kept,
            "gathered": 2 * first,
            "gradients": 4 * kept,
            "optimizer": 8 * kept,
            "total": 16 * kept + 2 * first,
        }
        stages = run["pipeline"]["stages"]
        whole_block = 2 * 8 * 8 + 2 * 4 * 8 + 3 * 6 * 8 + 2 * 8
        assert [stage["parameters"] for stage in stages] == [2400 + 3 * whole_block, 2400 + 2 * whole_block + 8]
        assert [stage["blocks"] for stage in stages] == [3, 2]
        assert sum(stage["flops_share"] for stage in stages) == pytest.approx(1)
        assert run["pipeline"]["bubble_share"] == pytest.approx(1 / 9)

    def test_split_backward_passes_have_gradients_in_whole(self) -> None:
        run = {name: describe_run(recipe(**pipeline(name)), world=4) for name in ("1F1B", "InterleavedZeroBubble")}
        assert run["1F1B"]["state_bytes"]["gradients"] == 4 * run["1F1B"]["parameters_kept"]
        split = run["InterleavedZeroBubble"]
        assert split["state_bytes"]["gradients"] == 4 * split["parameters_used"]

    def test_context_parallel_ranks_cut_the_weights_too(self) -> None:
        alone, shared = (describe_run(recipe(parallel__cp=cp), world=4) for cp in (1, 4))
        assert alone["parameters_kept"] == shared["parameters_kept"]
        assert (alone["microbatch"], shared["microbatch"]) == (8, 32)

    def test_prefetched_blocks_are_there_beside_the_one_at_work(self) -> None:
        def gathered(prefetch: int) -> int:
            run = describe_run(recipe(parallel__zero_stage=3, parallel__prefetch=prefetch), world=2)
            return int(run["state_bytes"]["gathered"])

        block = 2 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 384 + 2 * 128 + 2 * 32)
        assert [gathered(depth) - gathered(1) for depth in (0, 1, 2, 3)] == [0, 0, block, 2 * block]
        everything = describe_run(recipe(), world=2)["state_bytes"]["gathered"]
        assert gathered(4) == gathered(9) == everything

    @pytest.mark.parametrize(
        ("schedule", "stages", "share"),
        [("GPipe", 1, 3 / 11), ("1F1B", 1, 3 / 11), ("Interleaved1F1B", 2, 3 / 19), ("LoopedBFS", 4, 3 / 35)],
    )
    def test_bubbles_of_four_ranks_and_eight_microbatches(self, schedule: str, stages: int, share: float) -> None:
        assert bubble_share(schedule, 4, stages, 8) == pytest.approx(share)
        assert bubble_share("ZBVZeroBubble", 4, 2, 8) is None

    def test_a_checkpoint_holds_everything_whatever_the_layout(self) -> None:
        parameters = describe_run(recipe())["parameters"]
        for keys in ({}, {"parallel__dp_replicate": 2}, {"parallel__dp_shard": 4, "parallel__zero_stage": 3}):
            assert checkpoint_bytes(recipe(**keys)) == 3 * 4 * parameters

    def test_published_sizes(self) -> None:
        run = describe_run(recipe(model__preset="llama3-8b"), world=8)
        assert run["parameters"] == 8_030_261_248


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


def test_a_finding_reads_as_one_line() -> None:
    finding = Finding("a.b", "is wrong;", "mend it.", "f.toml", 3)
    assert str(finding) == "f.toml:3: a.b: is wrong; mend it."


class TestShardingTable:
    def rows(self, **keys: Any) -> dict[tuple[str, str], dict[str, Any]]:
        table = sharding_table(recipe(**keys))
        return {(row["modules"], row["style"]): row for row in table}

    def test_shapes_are_those_of_the_first_rank(self) -> None:
        rows = self.rows(parallel__tp=2, parallel__cp=2)
        assert rows["layers.*.attention.wk", "column"]["local"] == [32, 128]
        assert rows["layers.*.ffn.down", "row"]["local"] == [128, 192]
        assert rows["embed", "vocab"]["whole"] == [272, 128]
        assert rows["layers.*.attention", "gather"]["whole"] == [128]
        assert rows["layers.*.attention", "gather"]["local"] == [64]
        assert rows["layers.*.attention.core", "attention"]["whole"] == [256]
        assert rows["layers.*.attention.q_norm", "whole"]["local"] == [32]

    def test_every_parameter_is_in_it_once(self) -> None:
        for tied in (False, True):
            rows = self.rows(model__tie_embeddings=tied)
            with torch.device("meta"):
                model = Llama(spec_of("debug").configure(recipe(model__tie_embeddings=tied).model), torch.float32)
            names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
            patterns = {pattern_of(name).removesuffix(".weight") for name in names}
            listed = [modules for (modules, style) in rows if style in ("vocab", "column", "row", "whole")]
            assert sorted(listed) == sorted(patterns)

    def test_the_ring_passes_keys_round(self) -> None:
        gathered, ring = (self.rows(parallel__cp_method=method) for method in ("all-gather", "ring"))
        assert "all-gather" in gathered["layers.*.attention.core", "attention"]["told"]
        assert "passed round" in ring["layers.*.attention.core", "attention"]["told"]

    def test_text(self) -> None:
        text = format_sharding_table(sharding_table(recipe(parallel__tp=2)))
        assert "layers.*.attention.wo" in text
        assert "128 x 128 -> 128 x 64" in text
