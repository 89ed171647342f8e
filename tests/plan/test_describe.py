from __future__ import annotations

from typing import Any

import pytest
import torch
from support.recipes import pipeline, recipe

from titanlite.cli.check import format_description
from titanlite.models.llama import Llama
from titanlite.models.spec import spec_of
from titanlite.plan.describe import describe_run, format_sharding_table, sharding_table
from titanlite.plan.memory import checkpoint_bytes
from titanlite.plan.placement import pattern_of
from titanlite.recipe.sections import Recipe

pytestmark = pytest.mark.quick


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
        keys = pipeline(schedule, 4, layers=16, stages_per_rank=max(stages, 2))
        run = describe_run(recipe(**keys, training__global_batch=8), world=4)
        assert run["pipeline"]["bubble_share"] == pytest.approx(share)

    def test_bubbles_of_split_backward_passes_follow_from_the_timetable(self) -> None:
        run = describe_run(recipe(**pipeline("ZBVZeroBubble", 4, layers=16)), world=4)
        assert run["pipeline"]["bubble_share"] is None

    def test_a_checkpoint_holds_everything_whatever_the_layout(self) -> None:
        parameters = describe_run(recipe())["parameters"]
        for keys in ({}, {"parallel__dp_replicate": 2}, {"parallel__dp_shard": 4, "parallel__zero_stage": 3}):
            assert checkpoint_bytes(recipe(**keys)) == 3 * 4 * parameters

    def test_published_sizes(self) -> None:
        run = describe_run(recipe(model__preset="llama3-8b"), world=8)
        assert run["parameters"] == 8_030_261_248


class TestShardingTable:
    def rows(self, **keys: Any) -> dict[tuple[str, str], dict[str, Any]]:
        table = sharding_table(recipe(**keys))
        return {(row["modules"], row["style"]): row for row in table}

    def test_shapes_are_those_of_the_first_rank(self) -> None:
        rows = self.rows(parallel__tp=2, parallel__cp=2)
        assert rows["layers.*.attention.wk", "column"]["local"] == [32, 128]
        assert rows["layers.*.ffn.down", "row"]["local"] == [128, 192]
        assert rows["embed", "vocab"]["whole"] == [272, 128]
        assert rows["layers.*.attention.input", "gather"]["whole"] == [128]
        assert rows["layers.*.attention.input", "gather"]["local"] == [64]
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
