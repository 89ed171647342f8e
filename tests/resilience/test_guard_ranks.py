"""Several ranks meet a bad step, a flipped bit, or arithmetic that does not repeat: all do the same, and say where."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import guard_ranks
from support.pool import Pool

from titanlite.models.shard import Shard
from titanlite.parallel.ranks import ALONE
from titanlite.recipe.sections import Recipe
from titanlite.resilience.corruption import checksum, compare_replicas


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("".join(f"{n} cubed is {n**3}.\n" for n in range(300)))
    return str(path)


def recipe(corpus: str, **sections: dict[str, Any]) -> str:
    values: dict[str, dict[str, Any]] = {
        "run": {"deterministic": True},
        "model": {"preset": "debug", "dim": 16, "layers": 2, "heads": 2, "kv_heads": 2, "ffn_dim": 24},
        "data": {"corpus": corpus},
        "training": {"steps": 6, "sequence_length": 16, "global_batch": 8},
        "optimizer": {"lr": 1e-2},
        "precision": {"compute": "float64"},
        "metrics": {"log_every": 1, "tensorboard": False},
        "checkpoint": {"every_steps": 2},
    }
    for name, keys in sections.items():
        values[name] = {**values.get(name, {}), **keys}
    return Recipe.model_validate(values).model_dump_json()


def curve(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["step"], row["samples"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def flat(curve: list[tuple[Any, ...]]) -> list[float]:
    return [number for row in curve for number in row]


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {"zero_stage": 3}),
    (2, {"zero_stage": 0}),
    (4, {"pp": 2, "zero_stage": 1}),
    (4, {"dp_replicate": 2, "tp": 2}),
]


@pytest.mark.parametrize("fault", ["nan", "ruined"])
@pytest.mark.parametrize(
    "action", [pytest.param("stop", marks=pytest.mark.slow), "rollback", pytest.param("skip", marks=pytest.mark.slow)]
)
def test_what_is_not_finite_on_one_rank_is_bad_on_all(
    pool: Pool, corpus: str, tmp_path: Path, action: str, fault: str
) -> None:
    """Step 5's gradient, after the checkpoint of step 4, or a weight before that (issue 14, item 12: it cannot be
    skipped); then the numbers of one process that met the same.
    """
    step, event = {"nan": (5, "nonfinite"), "ruined": (4, "nonfinite_state")}[fault]
    stops = action == "stop" or (action == "skip" and fault == "ruined")
    text = recipe(corpus, resilience={"on_nonfinite": action})
    said, rows, _ = guard_ranks.train(0, 1, text, str(tmp_path / "one"), (fault, 0, step))
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, step + 1 if stops else 7))
    reference = [row for row in curve(rows) if row[3] == row[3]]  # the bad one's norm is NaN
    layouts = LAYOUTS if action == "rollback" else LAYOUTS[::2]
    for number, (world, parallel) in enumerate(layouts):
        text = recipe(corpus, resilience={"on_nonfinite": action}, parallel=parallel)
        ended = pool.run(guard_ranks.train, world, text, str(tmp_path / str(number)), (fault, world - 1, step))
        (words,) = {words for words, _, _ in ended}
        assert words == said if fault == "nan" else bool(words) == bool(said)
        assert (f"step {step}: " in words and "GuardStop" in words) == stops
        for _, found, weights in ended:
            got = [row for row in curve(found) if row[3] == row[3]]
            assert flat(got) == pytest.approx(flat(reference), rel=1e-10)
            if fault == "nan" or not stops:
                assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
            (bad,) = [row for row in found if row.get("event") == event]
            samples = [(step - 1) * 8, step * 8 - 1]
            assert bad["step"] == step and bad["values"]["samples"] == samples
            assert bad["values"]["action"] == ("stop" if stops else action)
            assert len([row for row in found if row.get("event") == "rollback"]) == (action == "rollback")
        if fault == "ruined" and stops:
            assert [path.name for path in (tmp_path / str(number)).iterdir()] == ["step-00000002"]


HOST = r" \([^)]+\)"


@pytest.mark.parametrize(
    ("world", "parallel", "fault", "words"),
    [
        (3, {"zero_stage": 0}, "weight", f"rank 1{HOST} .*model.norm.weight"),
        (2, {"zero_stage": 0}, "moment", f"ranks 0{HOST} and 1{HOST} .*optimizer.norm.weight/square"),
        (4, {"dp_replicate": 2}, "weight", f"ranks 1{HOST} and 3{HOST} .*model.norm.weight"),
        (2, {"tp": 2}, "weight", f"ranks 0{HOST} and 1{HOST} .*model.norm.weight"),
    ],
)
def test_a_flipped_bit_is_found_with_rank_and_name(
    pool: Pool, corpus: str, tmp_path: Path, world: int, parallel: dict[str, Any], fault: str, words: str
) -> None:
    """At step 3, seen at step 4 before its checkpoint is committed."""
    text = recipe(corpus, resilience={"check_replicas_every": 4}, parallel=parallel)
    ended = pool.run(guard_ranks.train, world, text, str(tmp_path), (fault, 1, 3))
    (said,) = {words for words, _, _ in ended}
    assert said.startswith("GuardStop: step 4: ")
    assert re.search(words, said), said
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_checkpoints_are_compared_first_whatever_the_interval(pool: Pool, corpus: str, tmp_path: Path) -> None:
    text = recipe(corpus, resilience={"check_replicas_every": 1000}, parallel={"zero_stage": 0})
    ended = pool.run(guard_ranks.train, 2, text, str(tmp_path), ("weight", 0, 3))
    assert all("GuardStop: step 4: " in said for said, _, _ in ended)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


@pytest.mark.parametrize(
    ("world", "parallel", "optimizer", "tied"),
    [
        (1, {}, "adamw", False),
        (2, {"zero_stage": 2}, "muon", True),
        (4, {"dp_replicate": 2, "dp_shard": 2, "zero_stage": 3}, "adamw", True),
        pytest.param(4, {"dp_replicate": 2, "tp": 2}, "muon", False, marks=pytest.mark.slow),
        pytest.param(4, {"pp": 2, "dp_replicate": 2}, "adamw", True, marks=pytest.mark.slow),
        pytest.param(2, {"pp": 2, "pipeline": {"schedule": "ZBVZeroBubble"}}, "adamw", False, marks=pytest.mark.splits),
    ],
)
def test_the_checks_change_no_bit_and_raise_no_false_alarm(
    pool: Pool, corpus: str, tmp_path: Path, world: int, parallel: dict[str, Any], optimizer: str, tied: bool
) -> None:
    sections: dict[str, Any] = {
        "parallel": parallel, "optimizer": {"name": optimizer}, "model": {"tie_embeddings": tied, "layers": 4},
        "training": {"steps": 4},
    }  # fmt: skip
    plain = recipe(corpus, **sections)
    checked = recipe(corpus, **sections, resilience={"check_replicas_every": 1, "rerun_every": 2})
    without, with_checks = (
        pool.run(guard_ranks.train, world, text, str(tmp_path / name))
        for name, text in (("without", plain), ("with", checked))
    )
    for (said, rows, weights), (_, expected, expected_weights) in zip(with_checks, without, strict=True):
        assert said == "" and curve(rows) == curve(expected) and len(curve(rows)) == 4
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected_weights.items())


@pytest.mark.parametrize(
    ("world", "fault", "words"),
    [
        (1, "gradient twice", r"rank 0 .*the gradient of norm.weight"),
        (2, "loss twice", r"rank 1 .*loss"),
    ],
)
def test_arithmetic_that_does_not_repeat_is_found(
    pool: Pool, corpus: str, tmp_path: Path, world: int, fault: str, words: str
) -> None:
    """Every second step is computed twice: the fifth pass is step 4's first, the sixth its second."""
    text = recipe(corpus, resilience={"rerun_every": 2})
    ended = pool.run(guard_ranks.train, world, text, str(tmp_path), (fault, world - 1, 6))
    (said,) = {words for words, _, _ in ended}
    assert said.startswith("GuardStop: step 4: ")
    assert re.search(words, said), said


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("elements", [0, 1, 3, 8, 21])
def test_a_checksum_sees_every_bit(dtype: torch.dtype, elements: int) -> None:
    """Also of a tensor that lies at no multiple of eight bytes, and of one that is not contiguous."""
    tensor = (torch.rand(elements + 1) * 100).to(dtype)[1:]
    before = int(checksum(tensor))
    assert int(checksum(tensor.clone())) == before
    strided = torch.stack((tensor, tensor), dim=1)[:, 0] if elements else tensor
    assert int(checksum(strided)) == before
    data = tensor.view(torch.uint8)
    for byte in range(data.numel()):
        bit = 1 << (byte % 8)
        if dtype != torch.bool or bit == 1:
            data[byte] ^= bit
            assert int(checksum(tensor)) != before
            data[byte] ^= bit


def test_one_process_has_no_copies() -> None:
    compare_replicas(1, {"w": Shard.whole(torch.ones(3))}, ALONE)
