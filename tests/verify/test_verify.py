"""Layouts that are right pass, and mistakes are found and named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import verify_ranks
from support.pool import Pool
from support.ports import free_port

from titanlite.cli.main import main
from titanlite.parallel.model import GradientAccumulation
from titanlite.recipe.sections import Recipe
from titanlite.verify import compare
from titanlite.verify.verdict import Comparison, first_difference

RECIPE = """
[run]
name = "large"
[model]
preset = "llama3-8b"
[data]
corpus = "nowhere.txt"
[training]
steps = 100000
sequence_length = 8192
global_batch = 1024
microbatch = 4
[schedule]
warmup_steps = 2000
[precision]
compute = "float64"
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("recipe.toml").write_text(RECIPE)
    return "recipe.toml"


def recipe_of(compute: str = "float64", **sections: dict[str, Any]) -> str:
    values: dict[str, dict[str, Any]] = {
        "model": {"preset": "debug"},
        "training": {"steps": 100, "global_batch": 64, "microbatch": 8},
        "precision": {"compute": compute},
    }
    for name, keys in sections.items():
        values[name] = {**values.get(name, {}), **keys}
    return Recipe.model_validate(values).model_dump_json()


LAYOUTS = [
    pytest.param(2, {"zero_stage": 3}, {"precision": {"compute": "float32", "reduce": "bfloat16"}}, id="stage-3"),
    pytest.param(2, {"zero_stage": 0}, {"optimizer": {"name": "muon"}}, id="stage-0-muon"),
    pytest.param(4, {"tp": 2}, {"recompute": {"mode": "selective"}}, id="tp-dp-recompute"),
    pytest.param(
        4, {"dp_replicate": 2, "cp": 2}, {"data": {"document_mask": True, "packing": "best_fit"}}, id="hsdp-cp-packed"
    ),
    pytest.param(2, {"pp": 2}, {"model": {"tie_embeddings": True}}, id="pp-tied"),
    pytest.param(4, {"pp": 2, "tp": 2, "pipeline": {"schedule": "Interleaved1F1B"}}, {}, id="pp-tp-interleaved"),
]


@pytest.mark.parametrize(("world", "parallel", "sections"), LAYOUTS)
def test_a_layout_computes_what_one_process_does(
    pool: Pool, world: int, parallel: dict[str, Any], sections: dict[str, Any]
) -> None:
    sections = {"precision": {"compute": "bfloat16"}, **sections}
    results = pool.run(verify_ranks.verified, world, recipe_of(parallel=parallel, **sections))
    for found in results:
        assert [each.compute for each in found] == ["float64", sections["precision"]["compute"]]
        assert first_difference(found) is None
        for each in found:
            assert [row.step for row in each.rows] == [*range(verify_ranks.STEPS + 1)]
            assert each.rows[0].weight.difference == 0, "initial weights do not depend on the layout"
            assert each.rows[-1].grad_norm.here > 0.1
        assert found[0].rows == results[0][0].rows


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("gradients are means", "the gradient norm of step 1 is"),
        ("each rank clips by its own norm", "the gradient norm of step 1 is"),
        ("a rank begins with another's rows", "before the first step, "),
        ("a part of a weight is nowhere", "before the first step, norm.weight is not"),
        ("a copy takes another step", "after step 1, norm.weight is not"),
    ],
)
def test_a_mistake_is_found_and_named(pool: Pool, fault: str, said: str) -> None:
    copies = {"dp_replicate": 2 if "copy" in fault else 1, "dp_shard": -1}
    results = pool.run(verify_ranks.verified, 2, recipe_of(parallel={"zero_stage": 2, **copies}), fault)
    differences = [first_difference(found) for found in results]
    assert differences[0] is not None and said in differences[0], differences
    assert differences == differences[:1] * 2, "every rank comes to the same verdict"


def test_alone(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", recipe, "--steps=2"]) == 0
    said = capsys.readouterr().out
    assert "llama3-8b, shrunken to" in said and "2 steps of" in said
    assert "\nthe same; at most apart in float64: loss" in said
    assert not Path("runs").exists()


def test_alone_with_a_mistake(recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    forward = GradientAccumulation._forward

    def dropped(self: GradientAccumulation, batch: Any, index: int) -> Any:
        output = forward(self, batch, index)
        return output._replace(result=output.result * (index != 1))

    monkeypatch.setattr(GradientAccumulation, "_forward", dropped)
    assert main(["verify", recipe, "--json"]) == 3
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["same"] is False and found["run"]["microbatches"] == 3
    assert found["first_difference"].startswith("float64: the loss of step 1 is")
    assert found["first_difference"] in printed.err
    assert [len(each["rows"]) for each in found["passes"]] == [5]


def test_json(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    float8 = "--precision.float8.enabled=true"
    assert main(["verify", recipe, "--json", "--steps=1", "--precision.compute=float32", float8]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [note.partition(":")[0] for note in found["notes"]] == ["float8 is left out"]
    assert found["same"] is True and found["first_difference"] is None
    assert [(each["compute"], each["same"]) for each in found["passes"]] == [("float64", True), ("float32", True)]
    assert found["passes"][0]["rows"][1]["loss"]["here"] == pytest.approx(5.6, abs=1)


def test_a_wrong_recipe_is_refused(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", recipe, "--parallel.tp=3"]) == 2
    assert "parallel.tp" in capsys.readouterr().err
    for steps in (0, 2**62, 2**70):  # issue 14, section D
        assert main(["verify", recipe, f"--steps={steps}"]) == 2
        assert f"--steps {steps}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "fails", "note", "formats"),
    [
        ("--precision.compute=bfloat16", lambda recipe: recipe.precision.compute == "float64",
         "float32 in place of float64: ", ["float32", "bfloat16"]),
        ("--compile.enabled=true", lambda recipe: recipe.compile.enabled, "not compiled", ["float64"]),
    ],
    ids=["float64", "compiler"],
)  # fmt: skip
def test_what_a_device_lacks_gives_way(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    override: str, fails: Callable[[Recipe], bool], note: str, formats: list[str],
) -> None:  # fmt: skip
    run = compare._run

    def refuse(recipe: Recipe, world: Any) -> Any:
        if fails(recipe):
            raise RuntimeError("not implemented for 'Double'\nwith more lines")
        return run(recipe, world)

    monkeypatch.setattr(compare, "_run", refuse)
    assert main(["verify", recipe, "--steps=1", "--json", override]) == 0
    found = json.loads(capsys.readouterr().out)["passes"]
    assert [each["compute"] for each in found] == formats
    (text,) = found[0]["notes"]
    assert text.startswith(note) and text.endswith("RuntimeError: not implemented for 'Double'")


@pytest.mark.slow
def test_compiled(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", recipe, "--steps=2", "--compile.enabled=true", "--precision.compute=float32"]) == 0
    assert "not compiled" not in capsys.readouterr().out


def test_ranks_of_a_launcher(recipe: str) -> None:
    """As processes with torchrun's variables: one voice, one exit code."""
    port, processes = free_port(), []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
        environment = {**os.environ, **place, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "titanlite", "verify", recipe, "--steps=2", "--parallel.tp=2"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **pipes))
    said = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "layout     tp 2, ZeRO stage 2" in said[0][0] and "\nthe same; at most" in said[0][0]
    assert said[1][0] == ""


def test_what_is_no_number_is_a_difference() -> None:
    from titanlite.verify.verdict import NumberDifference, StepDifference, WeightDifference, tolerance_in

    same, bad = NumberDifference(1.0, 1.0, 0.0), NumberDifference(float("nan"), float("nan"), float("inf"))
    weight = WeightDifference("norm.weight", 0.0, 1e-9)
    rows = StepDifference(0, same, same, weight), StepDifference(1, same, bad, weight)
    found = Comparison("float64", tolerance_in("float64", "float32", 2), (), rows)
    assert (first_difference([found]) or "").startswith("float64: the gradient norm of step 1 is nan")
