"""Whole runs, through the command line as a user starts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import curve, rows, status, steps, tensors
from support.tiny import train

from titanlite.cli.main import run_command
from titanlite.cli.train import main
from titanlite.models import layers

TINY = {
    "model": {"layers": 2}, "data": {"validation_percent": 20}, "optimizer": {"lr": 1e-2},
    "training": {"steps": 8, "global_batch": 4},
}  # fmt: skip


def test_a_run_learns_and_leaves_what_it_promises(folder: Path) -> None:
    assert train("--training.steps=40", "--validation.every_steps=20", "--metrics.tensorboard=true") == 0
    trained = rows(key="loss")
    assert len(trained) == 40 and trained[-1]["loss"] < 0.6 * trained[0]["loss"]
    assert set(trained[0]) == {
        "step", "samples", "tokens", "loss", "grad_norm", "lr", "step_seconds", "data_wait_seconds",
        "tokens_per_second", "tokens_per_second_per_device", "tflops_per_device", "mfu", "memory_peak_gib",
    }  # fmt: skip
    assert [row["step"] for row in rows(key="bits_per_byte")] == [20, 40]
    ended = status()
    assert (ended["state"], ended["exit_code"], ended["step"]) == ("done", 0, 40)
    assert steps() == [40]
    assert list(Path("runs/tiny/tensorboard").iterdir())
    log = Path("runs/tiny/logs/console.log").read_text()
    assert "step 40/40  loss" in log and "12.66K parameters" in log


def test_the_resolved_recipe_given_back_reproduces_the_run(folder: Path) -> None:
    assert train() == 0
    Path("again.toml").write_text(Path("runs/tiny/recipe.toml").read_text())
    assert run_command(main, ["again.toml", "--run.name=again"]) == 0
    assert curve("again") == curve()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(folder: Path, optimizer: str) -> None:
    name = f"--optimizer.name={optimizer}"
    assert train(name, "--run.name=whole") == 0
    assert train(name, "--run.name=parts", "--run.stop_after_step=3") == 75
    assert status("parts")["state"] == "stopped" and status("parts")["step"] == 3
    assert train(name, "--run.name=parts", "--run.stop_after_step=4") == 75
    assert train(name, "--run.name=parts", "--resume") == 0
    assert curve("parts") == curve("whole")
    whole, parts = tensors("whole", 8), tensors("parts", 8)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)


def test_accumulation_gives_the_numbers_of_one_pass(folder: Path) -> None:
    """In float64, with a last microbatch that is partly padding: a wrong weight would show, rounding stays below."""
    double = "--precision.compute=float64"
    assert train(double, "--run.name=one", "--training.global_batch=5") == 0
    assert train(double, "--run.name=many", "--training.global_batch=5", "--training.microbatch=2") == 0
    for one, many in zip(rows("one"), rows("many"), strict=True):
        assert many["loss"] == pytest.approx(one["loss"], rel=1e-12)
        assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-12)


def test_worker_processes_change_no_number(folder: Path) -> None:
    assert train("--run.name=none") == 0
    assert train("--run.name=two", "--data.workers=2") == 0
    assert curve("none") == curve("two")


def test_overfitting_one_batch_goes_to_zero(folder: Path) -> None:
    assert train("--training.steps=200", "--debug.overfit_one_batch=true", "--optimizer.name=muon") == 0
    first, *_, last = rows(key="loss")
    assert last["loss"] < 0.05
    assert (last["step"], last["samples"]) == (200, 200 * first["samples"])  # counted as of any run


def test_a_finished_run_started_again_is_done_at_once(folder: Path) -> None:
    assert train() == 0
    before = curve()
    assert train() == 0
    assert curve() == before


@pytest.mark.parametrize(
    ("module", "ruin", "where"),
    [
        (layers.SwiGLU, lambda out: out * float("inf"), "step 3: layers.1.ffn (SwiGLU)"),
        # Adds zero; its derivative is infinite, times zero.
        (layers.RMSNorm, lambda out: out + torch.sqrt((out - out.detach()).clamp(min=0)), "the gradient of the output"),
    ],
    ids=["forward", "backward"],
)
def test_find_nonfinite_names_the_module_and_the_step(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: Any,
    ruin: Any,
    where: str,
) -> None:
    calls, forward = iter(range(10**6)), module.forward

    def broken(self: Any, x: torch.Tensor) -> torch.Tensor:
        out = forward(self, x)
        # Two layers a step: the second layer of step 3.
        return ruin(out) if module is layers.RMSNorm or next(calls) == 5 else out

    monkeypatch.setattr(module, "forward", broken)
    assert train("--debug.find_nonfinite=true") == 3
    assert where in capsys.readouterr().err


def test_shapes_of_one_step_are_traced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--debug.trace_shapes=true") == 0
    traced = [line for line in capsys.readouterr().out.splitlines() if line.startswith("layers.1.ffn.gate")]
    assert len(traced) == 1 and "float32[4, 16, 16]" in traced[0] and "float32[4, 16, 24]" in traced[0]


@pytest.mark.parametrize("fault", ["another owner", "writable", "a link"])
def test_a_compilers_cache_that_others_can_write_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    """It holds pickles, below /tmp under a name that can be guessed (issue 14, item 28)."""
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "restored afterwards")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("LOGNAME", "someone")
    cache = folder / "torchinductor_someone"
    if fault == "a link":
        cache.symlink_to(folder)
    else:
        cache.mkdir()
        cache.chmod(0o777 if fault == "writable" else 0o755)
    if fault == "another owner":
        monkeypatch.setattr("os.getuid", lambda: cache.stat().st_uid + 1)
    assert train("--compile.enabled=true") == 2
    said = capsys.readouterr().err
    assert str(cache) in said and "set TORCHINDUCTOR_CACHE_DIR" in said and not any(cache.glob("fxgraph*"))


@pytest.mark.parametrize("validation", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_compiled_blocks_give_the_eager_curve(folder: Path, validation: int) -> None:
    """In float64, where fusing moves only the last bits; validation runs the compiled blocks without gradients."""
    keys = ("--precision.compute=float64", f"--validation.every_steps={validation}", "--validation.sequences=3")
    assert train(*keys, "--run.name=eager") == 0
    assert train(*keys, "--run.name=compiled", "--compile.enabled=true") == 0
    for key in ("loss", "grad_norm", *["validation_loss"] * (validation > 0)):
        eager, compiled = rows("eager", key), rows("compiled", key)
        assert [row[key] for row in compiled] == pytest.approx([row[key] for row in eager], rel=1e-9)
