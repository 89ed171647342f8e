"""What a dry run says of messages and memory, against closed forms and against the same program run for real."""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from support import dryrun_runs
from support.parity.parity_runs import small_recipe, write_corpus
from support.pool import Pool
from torch import Tensor
from torch.utils._pytree import tree_leaves

from titanlite.cli.main import main
from titanlite.dryrun import step as dryrun_step
from titanlite.dryrun.collectives import Collective, sum_traffic
from titanlite.dryrun.memory import MemoryTrace
from titanlite.dryrun.step import DryRun, dry_run
from titanlite.models.spec import spec_of
from titanlite.parallel.apply import build
from titanlite.parallel.model import Batch
from titanlite.parallel.world import World
from titanlite.plan.layout import require_layout
from titanlite.plan.memory import local_parameters, state_bytes
from titanlite.plan.placement import place
from titanlite.recipe.load import load_recipe
from titanlite.recipe.sections import Recipe
from titanlite.training.train_state import TrainState

LAYERS, DIM, FFN, VOCABULARY, LENGTH = 2, 32, 48, 272, 16
BLOCK = 4 * DIM * DIM + 3 * DIM * FFN + 2 * DIM
REST = 2 * VOCABULARY * DIM + DIM
PARAMETERS = LAYERS * BLOCK + REST
"""Psi of the ZeRO paper."""


def recipe(**sections: dict[str, Any]) -> Recipe:
    """Four heads, a batch of eight sequences; every size a multiple of eight, so that nothing is padded."""
    values: dict[str, dict[str, Any]] = {
        "model": {
            "preset": "debug", "dim": DIM, "layers": LAYERS, "heads": 4, "kv_heads": 4, "ffn_dim": FFN,
            "vocab_size": VOCABULARY, "qk_norm": False,
        },
        "training": {"steps": 3, "sequence_length": LENGTH, "global_batch": 8},
    }  # fmt: skip
    for name, keys in sections.items():
        values[name] = {**values.get(name, {}), **keys}
    return Recipe.model_validate(values)


def greets(message: Collective) -> bool:
    """One number, by which stages of a pipeline get to know each other; its dtype is another by torch's version."""
    return (message.dimension, message.message_bytes) == ("pp", 4) and message.operation in ("send", "recv")


def elements(run: DryRun, dimension: str) -> dict[str, int]:
    """Operation -> numbers in all its messages over that dimension; without the greetings of a pipeline's stages."""
    width = {"bfloat16": 2, "float32": 4, "float64": 8}
    counted: Counter[str] = Counter()
    for each in run.collectives:
        if each.dimension == dimension and not greets(each):
            counted[each.operation] += each.message_bytes // width[each.dtype]
    return dict(counted)


def test_the_sizes_above_are_the_models() -> None:
    spec = spec_of("debug")
    assert spec.parameter_count(spec.configure(recipe().model)) == PARAMETERS


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bytes_of_a_zero_stage_are_those_of_the_paper(stage: int, microbatches: int) -> None:
    """2 Psi for stages 0 to 2 and 3 Psi for stage 3 (Rajbhandari et al. 2020, section 7), times (n - 1) / n.

    An all-reduce is a reduce-scatter and an all-gather. Of stage 3's third Psi we send the blocks' part: the embedding
    has no use for its values in the backward pass, and the head, whose backward follows its forward, is kept, and so
    is the final norm. Each microbatch has its gradients reduced in stages 2 and 3, and its weights gathered in stage 3.
    """
    ranks = 4
    parallel, training = {"zero_stage": stage}, {"microbatch": 2 // microbatches}
    run = dry_run(recipe(parallel=parallel, training=training, precision={"compute": "float32"}), ranks, 1)
    gathered = PARAMETERS if stage < 3 else microbatches * (PARAMETERS + LAYERS * BLOCK)
    reduced = PARAMETERS if stage < 2 else microbatches * PARAMETERS
    if stage == 0:
        assert elements(run, "dp_replicate") == {"all-reduce": PARAMETERS}
        assert elements(run, "dp_shard") == {}
    else:
        assert elements(run, "dp_shard") == {"all-gather": gathered, "reduce-scatter": reduced}
        assert elements(run, "dp_replicate") == {}
    sent = sum(each.sent_bytes for each in run.collectives if each.dimension != "world")
    assert sent == 4 * (gathered + reduced) * (ranks - 1) // ranks
    if microbatches == 1:
        assert gathered + reduced == 2 * PARAMETERS + LAYERS * BLOCK * (stage == 3)


def test_weights_travel_in_the_compute_dtype_and_gradients_in_the_reduce_dtype() -> None:
    for reduce, width in (("float32", 4), ("bfloat16", 2)):
        run = dry_run(recipe(parallel={"zero_stage": 2}, precision={"compute": "bfloat16", "reduce": reduce}), 4, 0)
        rows = {row.operation: row for row in sum_traffic(run.collectives) if row.dimension == "dp_shard"}
        assert (rows["all-gather"].dtype, rows["all-gather"].message_bytes) == ("bfloat16", 2 * PARAMETERS)
        assert (rows["reduce-scatter"].dtype, rows["reduce-scatter"].message_bytes) == (reduce, width * PARAMETERS)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_copies_of_a_sharded_model_sum_their_part_of_the_gradients_once_a_step(stage: int) -> None:
    """HSDP over 2 copies x 4 ranks: an all-reduce of Psi / 4, however many microbatches there are."""
    parallel = {"zero_stage": stage, "dp_replicate": 2, "dp_shard": 4}
    run = dry_run(recipe(parallel=parallel, training={"global_batch": 16, "microbatch": 1}), 8, 5)
    assert elements(run, "dp_replicate") == {"all-reduce": PARAMETERS // 4}
    assert elements(run, "dp_shard")["reduce-scatter"] == PARAMETERS * (2 if stage >= 2 else 1)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_bytes_of_tensor_and_sequence_parallelism_are_those_of_the_paper(ranks: int, mode: str) -> None:
    """Per block, two all-gathers and two reduce-scatters of [sequence, batch, width] in each pass (Korthikanti et al.
    2022, section 4.2.2, whose backward pass gathers once more, to keep a part of the inputs only: ours keeps them all).

    The embedding scatters forward and gathers backward, the head the other way round; its loss sums three numbers a
    token. Full recomputation repeats a block's forward, except the last reduce-scatter, which nothing is saved for.
    """
    run = dry_run(recipe(parallel={"tp": ranks}, recompute={"mode": mode}), ranks, 1)
    hidden, tokens, repeated = 8 * LENGTH * DIM, 8 * LENGTH, mode == "full"
    norms = (2 * LAYERS + 1) * DIM
    assert elements(run, "tp") == {
        "all-gather": (LAYERS * (4 + 2 * repeated) + 2) * hidden,
        "reduce-scatter": (LAYERS * (4 + repeated) + 2) * hidden,
        "all-reduce": 3 * tokens + norms,
    }
    assert {each.dtype for each in run.collectives if each.operation != "all-reduce"} == {"bfloat16"}


@pytest.mark.parametrize(
    ("keys", "rounded"),
    [({}, 4 * LAYERS), ({"exclude": ["head", "layers.0.ffn.up"]}, 4 * LAYERS - 1), ({"recipe": "mxfp8"}, 0)],
    ids=str,
)
def test_what_converted_linears_take_travels_in_bytes(keys: dict[str, Any], rounded: int) -> None:
    """A byte a number and four for each token's scale, where bfloat16 has two bytes a number.

    Not for embedding and head, nor for a block's input that a linear takes in full.
    """
    section = {"enabled": True, "min_size": 0, "all_gather": True, **keys}
    width = 64
    sizes = {"dim": width, "ffn_dim": width}
    run = dry_run(recipe(model=sizes, parallel={"tp": 2}, precision={"float8": section}), 2, 1)
    sent = {each.dtype: each for each in sum_traffic(run.collectives) if each.operation == "all-gather"}
    tokens = 8 * LENGTH
    in_bytes = [] if not rounded else [(sent["uint8"].count, sent["uint8"].message_bytes)]
    assert in_bytes == ([(rounded, rounded * tokens * (width + 4))] if rounded else [])
    full = 4 * LAYERS - rounded + 2
    assert (sent["bfloat16"].count, sent["bfloat16"].message_bytes) == (full, full * 2 * tokens * width)
    assert {each.dtype for each in run.collectives if each.operation == "reduce-scatter"} == {"bfloat16"}


def test_a_loss_by_chunks_gathers_three_numbers_a_token() -> None:
    """Once, where the one by all logits sums one number and then two."""
    ways = [
        dry_run(recipe(parallel={"tp": 2}, kernels={"linear_cross_entropy": way}), 2, 1) for way in ("off", "torch")
    ]
    by_logits, by_chunks = (elements(run, "tp") for run in ways)
    tokens = 8 * LENGTH
    assert by_chunks["all-gather"] - by_logits["all-gather"] == 2 * 3 * tokens
    assert by_logits["all-reduce"] - by_chunks["all-reduce"] == 3 * tokens
    assert by_chunks["reduce-scatter"] == by_logits["reduce-scatter"]


def test_tensor_parallelism_divides_what_zero_communicates() -> None:
    run = dry_run(recipe(parallel={"tp": 2, "zero_stage": 3}, precision={"compute": "float32"}), 8, 3)
    norms = LAYERS * 2 * DIM
    here = (LAYERS * BLOCK - norms) // 2 + norms
    rest = VOCABULARY * DIM + DIM
    assert elements(run, "dp_shard") == {"all-gather": 2 * here + rest, "reduce-scatter": here + rest}


def test_context_parallelism_gathers_keys_and_values() -> None:
    """Keys and values of whole sequences once a block and forward pass; their gradients are reduce-scattered.

    A ring passes on what it has instead: each rank sends all of its message.
    """
    run = dry_run(recipe(parallel={"cp": 2, "zero_stage": 1}), 2, 1)
    keys_and_values = 2 * 8 * LENGTH * DIM
    assert elements(run, "cp") == {
        "all-gather": LAYERS * keys_and_values,
        "reduce-scatter": LAYERS * keys_and_values,
    }
    assert elements(run, "dp_shard") == {"all-gather": PARAMETERS, "reduce-scatter": PARAMETERS}
    ring = dry_run(recipe(parallel={"cp": 2, "cp_method": "ring"}), 2, 1)
    passed = [each for each in ring.collectives if each.dimension == "cp"]
    assert passed and all(each.sent_bytes == each.message_bytes for each in passed)


@pytest.mark.parametrize(
    ("rank", "schedule", "boundaries"), [(0, "1F1B", 1), (2, "1F1B", 2), (2, "Interleaved1F1B", 3)]
)
def test_a_pipeline_sends_hidden_states_and_their_gradients(rank: int, schedule: str, boundaries: int) -> None:
    """For each microbatch and boundary between stages on different ranks, one [microbatch, sequence / tp, width] each
    way; a middle stage has two boundaries, a rank with the second and the fourth of four stages three.
    """
    ranks = 4 if schedule == "1F1B" else 2
    made = recipe(model={"layers": 4}, parallel={"pp": ranks, "tp": 2, "pipeline": {"schedule": schedule}})
    run = dry_run(made, 2 * ranks, rank)
    hidden = 8 * LENGTH // 2 * DIM
    assert elements(run, "pp") == {"send": boundaries * hidden, "recv": boundaries * hidden}


def test_a_rank_of_a_pipeline_has_its_stage_alone() -> None:
    made = recipe(model={"layers": 4}, parallel={"pp": 2, "pipeline": {"blocks_per_stage": [3, 1]}})
    first, last = (dry_run(made, 2, rank) for rank in (0, 1))
    assert first.shapes["embed.weight"][0] == (VOCABULARY, DIM) and "head.weight" not in first.shapes
    assert {name for name in last.shapes if not name.startswith("layers.3.")} == {"norm.weight", "head.weight"}
    assert first.memory.most["weights"] == 4 * (3 * BLOCK + VOCABULARY * DIM)


REAL: dict[str, dict[str, dict[str, Any]]] = {
    "stage-3-tp-muon": {"parallel": {"tp": 2, "zero_stage": 3}, "optimizer": {"name": "muon"}},
    "hsdp-accumulation": {"parallel": {"dp_replicate": 2, "zero_stage": 2}, "training": {"microbatch": 1}},
    "cp-tp-recompute": {"parallel": {"cp": 2, "tp": 2}, "recompute": {"mode": "selective"}},
    "float8-tp": {
        "parallel": {"tp": 2, "zero_stage": 3},
        "model": {"dim": 64, "heads": 4, "kv_heads": 4, "ffn_dim": 64, "vocab_size": 272},
        "precision": {"float8": {"enabled": True, "min_size": 0, "all_gather": True}},
    },
    "pp-dp": {"parallel": {"pp": 2, "zero_stage": 1}, "training": {"microbatch": 1}},
}


@pytest.mark.parametrize("name", REAL)
def test_a_dry_run_is_what_really_runs(pool: Pool, tmp_path: Path, name: str) -> None:
    """A trainer on four gloo ranks, told by the same log: the same messages in the same order, in each step.

    Only in the first, the stages of a pipeline tell their neighbours that they are there.
    """
    sections: dict[str, dict[str, Any]] = {"model": {"layers": 2}, "validation": {"every_steps": 0}}
    for section, keys in REAL[name].items():
        sections[section] = {**sections.get(section, {}), **keys}
    sections.setdefault("training", {})["steps"] = 2
    made = small_recipe(write_corpus(tmp_path / "corpus.txt"), **sections)
    real = pool.run(dryrun_runs.messages_of_two_steps, 4, made.model_dump_json())
    for rank in (0, 3):
        first, second = real[rank]
        assert dry_run(made, 4, rank).collectives == first, f"rank {rank}"
        assert [each for each in first if not greets(each)] == second


@pytest.mark.parametrize(
    "parallel",
    [
        {"zero_stage": 1},
        {"zero_stage": 3, "dp_replicate": 2},
        {"pp": 2, "pipeline": {"schedule": "Interleaved1F1B"}},
        {"pp": 2, "zero_stage": 1, "pipeline": {"schedule": "ZBVZeroBubble"}},
    ],
)
def test_the_first_step_holds_what_the_second_does(parallel: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """So one step is enough: a second changes no peak, but for the numbers of the first that the guards keep."""
    made = recipe(model={"layers": 4}, parallel=parallel, training={"microbatch": 1})
    one, step = dry_run(made, 4, 0).memory, dryrun_step.take_step

    def twice(learner: TrainState, number: int, batch: Batch, factor: float) -> Any:
        step(learner, number, batch, factor)
        return step(learner, number + 1, batch, factor)

    monkeypatch.setattr(dryrun_step, "take_step", twice)
    two = dry_run(made, 4, 0).memory
    more = {purpose: two.most[purpose] - size for purpose, size in one.most.items() if purpose != "other"}
    assert more.pop("activations") in (0, 8), "the loss"
    assert more == {"weights": 0, "gathered": 0, "gradients": 0, "optimizer": 0}
    assert 0 <= two.peak.total - one.peak.total <= 4 * 8 + 1, "loss, norm, z-scores and judgement until a review"


@pytest.mark.parametrize(
    ("ranks", "rank", "sections"),
    [
        *((4, 1, {"parallel": {"zero_stage": stage}}) for stage in range(4)),
        (1, 0, {"precision": {"compute": "float32"}}),
        (4, 2, {"parallel": {"zero_stage": 2, "dp_replicate": 2}}),
        (8, 7, {"parallel": {"tp": 2, "zero_stage": 3}, "optimizer": {"name": "muon"}}),
        (6, 5, {"parallel": {"cp": 2, "tp": 3, "zero_stage": 3}, "model": {"heads": 6, "dim": 48, "kv_heads": 6},
                "training": {"sequence_length": 24}}),
        (4, 1, {"parallel": {"pp": 2, "zero_stage": 1}, "model": {"layers": 4}}),
        (4, 3, {"parallel": {"pp": 2, "pipeline": {"schedule": "Interleaved1F1B"}},
                "model": {"layers": 4, "tie_embeddings": True}}),
        (4, 3, {"parallel": {"pp": 2, "pipeline": {"schedule": "ZBVZeroBubble"}}, "model": {"layers": 4}}),
    ],
    ids=str,
)  # fmt: skip
def test_what_check_predicts_is_what_the_dry_run_measures(ranks: int, rank: int, sections: dict[str, Any]) -> None:
    """Weights and states to the byte. Gathered weights and gradients lie besides in the buffers of collectives on their
    way: of two FSDP units at most, gradients in both the compute dtype and the reduce dtype.
    """
    made = recipe(**{**sections, "training": {"microbatch": 1, **sections.get("training", {})}})
    layout = require_layout(made.parallel, ranks)
    held = local_parameters(place(made, layout), rank)
    predicted, measured = state_bytes(made, layout, held), dry_run(made, ranks, rank).memory
    units: Counter[str] = Counter()
    for each in held:
        units[".".join(each.name.split(".")[:2]) if each.name.startswith("layers.") else ""] += prod(each.used)
    on_the_way = 2 * max(units.values())
    after = measured.by_phase["optimizer"].by_purpose
    assert after["weights"] == after["gradients"] == predicted["weights"]
    assert after["gathered"] == 0 and after["activations"] <= 16, "losses, and the count of tokens"
    assert after["optimizer"] - predicted["optimizer"] in (0, 4), "AdamW's step count"
    assert 0 <= measured.most["gathered"] - predicted["gathered"] <= 2 * on_the_way
    assert 0 <= measured.most["gradients"] - predicted["gradients"] <= (2 + 4) * on_the_way


def test_memory_of_gathered_weights() -> None:
    """In bfloat16. Stage 2 holds those of all blocks at a time, stage 3 of as many as are at work and on their way."""

    def most(stage: int, layers: int) -> int:
        return dry_run(recipe(model={"layers": layers}, parallel={"zero_stage": stage}), 4, 0).memory.most["gathered"]

    assert most(3, 6) == most(3, 4)
    assert most(2, 6) - most(2, 4) == 2 * 2 * BLOCK


@pytest.mark.parametrize("within", [{}, {"data": {"document_mask": True}}, {"model": {"window": (5, 0, 3, 14, 1)}}])
@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(1, {}), (2, {"tp": 2}), (2, {"pp": 2}), (2, {"cp": 2}), (2, {"cp": 2, "cp_method": "ring"})],
)
def test_no_tensor_has_as_many_elements_as_pairs_of_tokens(
    ranks: int, parallel: dict[str, Any], within: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even of the queries and keys that one rank compares at a time."""
    sizes, record = [], MemoryTrace.record

    def recorded(self: MemoryTrace, function: Any, arguments: Any, named: Any, result: Any) -> None:
        sizes.extend(each.numel() for each in tree_leaves(result) if isinstance(each, Tensor))
        record(self, function, arguments, named, result)

    monkeypatch.setattr(MemoryTrace, "record", recorded)
    length = 8192
    sections = {"training": {"sequence_length": length, "global_batch": 2, "microbatch": 1}, "parallel": parallel}
    dry_run(small_recipe("python-stdlib", **sections, **within), ranks, 0)
    assert length < max(sizes) < (length // (2 * ranks)) ** 2


def test_offload_leaves_the_device_without_states() -> None:
    run = dry_run(recipe(parallel={"zero_stage": 3, "offload": True}), 4, 0)
    assert run.memory.most["weights"] == run.memory.most["optimizer"] == 0
    assert run.memory.host_bytes == 16 * PARAMETERS // 4 + 4
    assert dry_run(recipe(parallel={"zero_stage": 3}), 4, 0).memory.host_bytes == 0


@pytest.mark.parametrize("microbatches", [1, 2])
def test_memory_for_activations_is_what_autograd_saves(microbatches: int) -> None:
    """On one rank in float32, where the CPU computes as a GPU would: the distinct storages saved for the backward pass.

    The dry run counts what outlives the forward pass, whoever holds it.
    """
    made = recipe(precision={"compute": "float32"}, training={"global_batch": 4, "microbatch": 4 // microbatches})
    run = dry_run(made, 1, 0)
    spec = spec_of("debug")
    model = build(spec, spec.configure(made.model), made, World(0, 1, torch.device("cpu")))
    for parameter in model.module.parameters():
        torch.nn.init.normal_(parameter)
    tokens = torch.randint(0, 256, (microbatches, 4 // microbatches, LENGTH))
    batch = Batch(tokens, tokens, None, None, (), 0, 4, tokens.numel())
    apart = {tensor.untyped_storage().data_ptr() for tensor in (tokens, *model.module.parameters())}
    saved: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart:
            kept.append(storage)  # so that no other is given its place
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.module(batch.tokens[0], batch.labels[0])
    del loss
    tables = model.module.rotations.forward(range(LENGTH), torch.empty(0))  # kept for all passes
    for table in (tables.cos, tables.sin):
        del saved[table.untyped_storage().data_ptr()]
    beside = run.memory.most["activations"] - sum(saved.values())
    assert 0 <= beside <= 32, "but the loss itself, its sum, and what it is divided by"


def test_recomputed_activations_are_not_kept() -> None:
    """In full recomputation a block keeps its input, [batch, sequence, width], and one block at a time the rest."""

    def kept(mode: str, layers: int) -> int:
        made = recipe(model={"layers": layers}, recompute={"mode": mode}, precision={"compute": "float32"})
        return dry_run(made, 1, 0).memory.most["activations"]

    hidden = 4 * 8 * LENGTH * DIM
    assert kept("full", 5) - kept("full", 3) == 2 * hidden
    assert kept("none", 5) - kept("none", 3) > 10 * hidden


ARGUMENTS = ["configs/debug.toml", "--model.qk_norm=false", "--world", "8", "--parallel.tp=2", "--dry-run"]


def test_the_command_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *ARGUMENTS, "--rank", "3", "--compile.enabled=true"]) == 0
    text = capsys.readouterr().out
    assert "dry run of rank 3 of 8 (pp 0, data 1, cp 0, tp 1)" in text
    assert "not followed: compile.enabled" in text
    assert "layers.*.attention.wq.weight    16 x 128  128 x 128  0-3" in text
    assert "reduce-scatter" in text and "peak" in text


def test_the_command_prints_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *ARGUMENTS, "--json"]) == 0
    run = json.loads(capsys.readouterr().out)["dry_run"]
    assert run["rank"] == 0 and run["left_out"] == []
    assert sum(each["times"] for each in run["sequence"]) == sum(each["count"] for each in run["collectives"])
    assert run["memory"]["peak"]["total"] == sum(run["memory"]["peak"]["by_purpose"].values())
    gate = next(each for each in run["parameters"] if each["name"] == "layers.*.ffn.gate.weight")
    assert (gate["shape"], gate["whole"], gate["blocks"]) == ([48, 128], [384, 128], "0-3")


def test_a_rank_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *ARGUMENTS, "--rank", "8"]) == 2
    assert "--rank 8: the ranks count from 0 to 7" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "world"), [("llama3_8b", 128), ("llama3_8b_128k", 8), ("llama3_70b", 256), ("llama3_405b", 512)]
)
def test_the_recipes_of_llama_3_run_dry(name: str, world: int) -> None:
    """The first and the last rank: all have something to hold, and what they hold from step to step is their share."""
    made = load_recipe(Path(__file__).parents[1] / "configs" / f"{name}.toml").recipe
    spec = spec_of(made.model.preset)
    parameters = spec.parameter_count(spec.configure(made.model))
    for rank in (0, world - 1):
        run = dry_run(made, world, rank)
        assert {each.dimension for each in run.collectives} >= {
            "dp_shard",
            "world",
        }
        share = run.memory.most["weights"] / (4 * parameters / world)
        # Stages are cut between blocks.
        assert 0.8 < share < 1.2
