from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.check import RULES, check, checked, checkpoint_bytes, describe, report
from titanlite.errors import Finding, RecipeError
from titanlite.parallel.layout import batch_plan
from titanlite.recipe.load import load_recipe
from titanlite.recipe.sections import Recipe


def recipe(**keys: Any) -> Recipe:
    """A valid recipe of 100 steps with `section__key=value` laid over it."""
    values: dict[str, dict[str, Any]] = {"training": {"steps": 100}}
    for key, value in keys.items():
        section, _, name = key.partition("__")
        values.setdefault(section, {})[name] = value
    return Recipe.model_validate(values)


def found(world: int = 1, **keys: Any) -> list[tuple[str, str]]:
    return [(finding.severity, finding.key) for finding in check(recipe(**keys), world)]


def test_a_sound_recipe_has_no_findings() -> None:
    assert found() == []
    assert found(world=4) == []
    assert found(training__steps=None, training__tokens=5) == []


@pytest.mark.parametrize(
    ("key", "keys"),
    [
        ("training", {"training__steps": None}),
        ("training.tokens", {"training__tokens": 5}),
        ("optimizer.name", {"optimizer__name": "adam"}),
        ("schedule.name", {"schedule__name": "cosin"}),
        ("model.preset", {"model__preset": "llama3-8"}),
        ("model.kv_heads", {"model__kv_heads": 3}),
        ("model.kv_heads", {"model__kv_heads": 12}),
        ("model.dim", {"model__dim": 130}),
        ("model.heads", {"model__dim": 12}),
        ("model.vocab_size", {"model__vocab_size": 256}),
        ("model.rope_scaling.low_freq_factor", {"model__rope_scaling": {"low_freq_factor": 4.0}}),
        ("optimizer.lr", {"optimizer__lr": 10.0}),
        ("optimizer.muon_lr", {"optimizer__name": "muon", "optimizer__muon_lr": 10.0}),
        ("parallel.dp_shard", {"parallel__dp_shard": 0}),
        ("parallel.dp_shard", {"parallel__dp_shard": 3, "world": 2}),
        ("parallel.dp_replicate", {"parallel__dp_replicate": 2}),
        ("parallel.dp_replicate", {"parallel__dp_replicate": 4, "parallel__zero_stage": 0, "world": 2}),
        ("debug.find_nonfinite", {"debug__find_nonfinite": True, "compile__enabled": True}),
        ("debug.trace_shapes", {"debug__trace_shapes": True, "compile__enabled": True}),
    ],
)
def test_errors(key: str, keys: dict[str, Any]) -> None:
    assert found(**keys) == [("error", key)]


@pytest.mark.parametrize(
    ("key", "keys"),
    [
        ("schedule.warmup_steps", {"schedule__warmup_steps": 100}),
        ("schedule.decay_steps", {"schedule__warmup_steps": 50, "schedule__decay_steps": 51}),
        ("schedule.decay_steps", {"schedule__name": "constant", "schedule__decay_steps": 5}),
        ("schedule.final_lr_ratio", {"schedule__name": "constant", "schedule__final_lr_ratio": 0.1}),
        ("schedule.decay_shape", {"schedule__decay_shape": "sqrt"}),
        ("optimizer.muon_lr", {"optimizer__muon_lr": 0.01}),
        ("resilience.max_skips", {"resilience__max_skips": 3}),
        ("data.prefetch", {"data__prefetch": 3}),
        ("validation.sequences", {"validation__sequences": 3}),
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
        {"schedule__warmup_steps": 50, "schedule__decay_steps": 50},
        {"schedule__name": "wsd", "schedule__decay_shape": "sqrt"},
        {"optimizer__name": "muon", "optimizer__muon_lr": 0.01},
        {"resilience__on_nonfinite": "skip", "resilience__max_skips": 3},
        {"data__workers": 1, "data__prefetch": 3},
        {"validation__every_steps": 100, "checkpoint__every_steps": 100, "run__stop_after_step": 99},
        {"training__microbatch": 8},
        {"training__microbatch": 4, "world": 2},
        {"parallel__dp_replicate": 2, "world": 2},
        {"model__kv_heads": 1},
        {"model__vocab_size": 257},
        {"compile__enabled": True},
        {"debug__find_nonfinite": True},
    ],
)
def test_what_is_right_next_to_what_is_wrong(keys: dict[str, Any]) -> None:
    assert found(**keys) == []


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
    wrong = recipe(
        training__steps=None, model__kv_heads=3, optimizer__name="adm", schedule__name="zz", parallel__dp_replicate=7
    )
    assert [finding.fix for finding in check(wrong)] == [
        'give training.steps, or training.tokens such as "2M".',
        "did you mean 'adamw'?",
        "known: constant, linear, cosine, sqrt, wsd.",
        "choose one of 1, 2, 4.",
        "write one of 1, or start a multiple of 7 ranks (titanlite check --world 7).",
    ]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.none() | st.integers(1, 12))
def test_padding_is_found_where_there_is_some(global_batch: int, world: int, microbatch: int | None) -> None:
    batch = recipe(training__global_batch=global_batch, training__microbatch=microbatch)
    samples = [sample for rank in range(world) for sample in batch_plan(batch.training, world, rank).samples(0)]
    warned = [f for f in check(batch, world) if f.key in ("training.global_batch", "training.microbatch")]
    assert bool(warned) == (None in samples)
    if warned:
        assert f"= {len(samples)} sequences: {samples.count(None) / len(samples):.0%} are padding" in warned[0].problem


@settings(max_examples=100, deadline=None)
@given(
    st.builds(
        recipe,
        training__steps=st.none() | st.integers(1, 50),
        training__tokens=st.none() | st.integers(1, 10**6),
        training__microbatch=st.none() | st.integers(1, 99),
        model__preset=st.sampled_from(["debug", "llama3-8b", "nothing"]),
        model__dim=st.none() | st.integers(1, 300),
        model__heads=st.none() | st.integers(1, 12),
        model__kv_heads=st.none() | st.integers(1, 12),
        schedule__name=st.sampled_from(["wsd", "sqrt", "nothing"]),
        schedule__warmup_steps=st.integers(0, 60),
        parallel__dp_replicate=st.integers(1, 3),
    ),
    st.integers(1, 70),
)
def test_no_rule_ever_fails_and_sound_recipes_can_be_described(any_recipe: Recipe, world: int) -> None:
    findings = check(any_recipe, world)
    if all(finding.severity == "warning" for finding in findings):
        assert describe(any_recipe, world)["steps"] >= 1
        assert report(any_recipe, world)


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
        run = describe(small, world=2)
        assert (run["parameters"], run["embedding_parameters"]) == (parameters, 1200)
        assert (run["steps"], run["tokens"], run["tokens_per_step"]) == (21, 1050, 50)
        assert (run["world"], run["mesh"], run["microbatch"], run["microbatches"]) == (
            2,
            {"dp_replicate": 1, "dp_shard": 2},
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
        adamw, muon = (describe(recipe(optimizer__name=name))["state_bytes"] for name in ("adamw", "muon"))
        kept = 4 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 384)
        assert adamw["optimizer"] - muon["optimizer"] == 4 * kept

    def test_float64_doubles(self) -> None:
        single, double = (describe(recipe(precision__compute=name))["state_bytes"] for name in ("float32", "float64"))
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
        alone, together = (describe(recipe(parallel__zero_stage=stage), world)["state_bytes"] for world in (1, 4))
        for part in ("weights", "gradients", "optimizer"):
            assert together[part] == -(-alone[part] // 4 if part in cut else -alone[part])
        # In stage 3 two of the four blocks, and what lies outside them.
        run = describe(recipe(), 4)
        matrices = 4 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 384)
        assert (alone["gathered"], together["gathered"]) == (0, 2 * (run["parameters"] - matrices // 2 * (stage == 3)))

    def test_a_checkpoint_holds_everything_whatever_the_layout(self) -> None:
        parameters = describe(recipe())["parameters"]
        for keys in ({}, {"parallel__dp_replicate": 2}, {"parallel__dp_shard": 4, "parallel__zero_stage": 3}):
            assert checkpoint_bytes(recipe(**keys)) == 3 * 4 * parameters

    def test_published_sizes(self) -> None:
        run = describe(recipe(model__preset="llama3-8b"), world=8)
        assert run["parameters"] == 8_030_261_248


def test_findings_of_a_file_have_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('[training]\nsteps = 5\n[model]\npreset = "debug"\nkv_heads = 3\n[compile]\nenabled = true\n')
    with pytest.raises(RecipeError) as caught:
        checked(load_recipe(path, ["--debug.trace_shapes=true"]))
    assert [(f.key, f.file, f.line) for f in caught.value.findings] == [
        ("model.kv_heads", str(path), 5),
        ("debug.trace_shapes", "command line", 0),
    ]
    path.write_text("[training]\nsteps = 5\nmicrobatch = 64\n")
    (warning,) = checked(load_recipe(path))
    assert (warning.severity, warning.file, warning.line) == ("warning", str(path), 3)


def test_a_finding_reads_as_one_line() -> None:
    finding = Finding("a.b", "is wrong;", "mend it.", "f.toml", 3)
    assert str(finding) == "f.toml:3: a.b: is wrong; mend it."
