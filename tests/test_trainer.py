"""Whole runs, through the command line as a user starts them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from titanlite.cli.main import run_command
from titanlite.cli.train import main

TINY = """
[run]
name = "tiny"
[model]
preset = "debug"
dim = 16
layers = 2
heads = 2
kv_heads = 1
ffn_dim = 24
[data]
corpus = "corpus"
validation_percent = 20
[training]
steps = 8
sequence_length = 16
global_batch = 4
[optimizer]
lr = 1e-2
[precision]
compute = "float32"
[metrics]
log_every = 1
tensorboard = false
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe and a corpus of twenty small files."""
    (tmp_path / "corpus").mkdir()
    for number in range(20):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"{number} squared is {number**2}. " * 12)
    (tmp_path / "tiny.toml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*arguments: str) -> int:
    return run_command(main, ["tiny.toml", *arguments])


def rows(run: str = "tiny", key: str = "loss") -> list[dict[str, object]]:
    lines = Path("runs", run, "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if key in row]


def curve(run: str = "tiny") -> list[tuple[object, ...]]:
    """What must not depend on interruptions: bit for bit, since JSON keeps every digit."""
    return [(row["step"], row["samples"], row["tokens"], row["loss"], row["grad_norm"], row["lr"]) for row in rows(run)]


def weights(run: str, step: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    files = sorted(Path("runs", run, "checkpoints", f"step-{step:08d}").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def status(run: str = "tiny") -> dict[str, object]:
    return json.loads(Path("runs", run, "status.json").read_text())


def test_a_run_learns_and_leaves_what_it_promises(folder: Path) -> None:
    assert train("--training.steps=40", "--validation.every_steps=20", "--metrics.tensorboard=true") == 0
    losses = [row["loss"] for row in rows()]
    assert len(losses) == 40 and losses[-1] < 0.6 * losses[0]
    assert set(rows()[0]) == {
        "step", "samples", "tokens", "loss", "grad_norm", "lr", "step_seconds", "data_wait_seconds",
        "tokens_per_second", "tokens_per_second_per_device", "tflops_per_device", "mfu", "memory_peak_gib",
    }  # fmt: skip
    assert [row["step"] for row in rows(key="bits_per_byte")] == [20, 40]
    assert status()["state"] == "done" and status()["exit_code"] == 0 and status()["step"] == 40
    assert Path("runs/tiny/checkpoints/step-00000040/manifest.json").is_file()
    assert list(Path("runs/tiny/tensorboard").iterdir())
    log = Path("runs/tiny/logs/console.log").read_text()
    assert "step 40/40  loss" in log and "12.66K parameters" in log


def test_the_resolved_recipe_given_back_reproduces_the_run(folder: Path) -> None:
    assert train() == 0
    Path("again.toml").write_text(Path("runs/tiny/recipe.toml").read_text())
    assert run_command(main, ["again.toml", "--run.name=again"]) == 0
    assert curve("again") == curve("tiny")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(folder: Path, optimizer: str) -> None:
    name = f"--optimizer.name={optimizer}"
    assert train(name, "--run.name=whole") == 0
    assert train(name, "--run.name=parts", "--run.stop_after_step=3") == 75
    assert status("parts")["state"] == "stopped" and status("parts")["step"] == 3
    assert train(name, "--run.name=parts", "--run.stop_after_step=4") == 75
    assert train(name, "--run.name=parts", "--resume") == 0
    assert curve("parts") == curve("whole")
    whole, parts = weights("whole", 8), weights("parts", 8)
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
    assert train("--training.steps=150", "--debug.overfit_one_batch=true", "--optimizer.name=muon") == 0
    assert rows()[-1]["loss"] < 0.05


def test_a_finished_run_started_again_is_done_at_once(folder: Path) -> None:
    assert train() == 0
    before = curve()
    assert train() == 0
    assert curve() == before


def test_nonfinite_stops_before_the_weights_change(folder: Path, poison: Callable[[int], None]) -> None:
    poison(5)
    assert train("--checkpoint.every_steps=2", "--metrics.log_every=4") == 3
    assert status()["state"] == "failed" and status()["exit_code"] == 3
    assert "step 5" in str(status()["reason"])
    assert sorted(path.name for path in Path("runs/tiny/checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


def test_nonfinite_steps_are_passed_over_if_the_recipe_says_so(folder: Path, poison: Callable[[int], None]) -> None:
    poison(5)
    assert train("--resilience.on_nonfinite=skip", "--metrics.log_every=4") == 0
    events = [row for row in rows(key="event") if row["event"] == "nonfinite"]
    assert len(events) == 1 and "skip (1 of at most 10); samples 16 to 19" in str(events[0]["detail"])
    assert all(torch.isfinite(tensor).all() for tensor in weights("tiny", 8).values() if tensor.is_floating_point())
    poison(5)
    assert train("--resilience.on_nonfinite=skip", "--resilience.max_skips=0", "--run.name=none") == 3


def test_find_nonfinite_names_the_module_and_the_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from titanlite.models import layers

    calls = iter(range(10**6))
    forward = layers.SwiGLU.forward

    def broken(self: layers.SwiGLU, x: torch.Tensor) -> torch.Tensor:
        out = forward(self, x)
        return out * float("inf") if next(calls) == 5 else out  # two layers a step: the second layer of step 3

    monkeypatch.setattr(layers.SwiGLU, "forward", broken)
    assert train("--debug.find_nonfinite=true") == 3
    assert "step 3: layers.1.ffn (SwiGLU)" in capsys.readouterr().err


def test_find_nonfinite_sees_gradients_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from titanlite.models import layers

    forward = layers.RMSNorm.forward

    def broken(self: layers.RMSNorm, x: torch.Tensor) -> torch.Tensor:
        out = forward(self, x)
        return out + torch.sqrt((out - out.detach()).clamp(min=0))  # adds zero; its derivative is infinite, times zero

    monkeypatch.setattr(layers.RMSNorm, "forward", broken)
    assert train("--debug.find_nonfinite=true") == 3
    assert "the gradient of the output" in capsys.readouterr().err


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
        cache.symlink_to(folder / "corpus")
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
