"""What a run begins with and what it may change: warm starts, branches, chosen steps, keys that are allowed by name."""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from support import bpe
from support.runs import curve, rows, spoil_weight, steps, tensors
from support.tiny import train

from titanlite.checkpoint import manager
from titanlite.checkpoint.format import folder_name
from titanlite.checkpoint.storage import BEGINS_WITH
from titanlite.cli.main import main as cli
from titanlite.data.splits import Split
from titanlite.errors import CheckpointError
from titanlite.resilience.guards import Guards
from titanlite.training import restore, trainer
from titanlite.training.train_state import TrainState

TINY = {
    "run": {"name": "a"}, "model": {"layers": 2}, "data": {"validation_percent": 20}, "optimizer": {"lr": 1e-2},
    "training": {"steps": 8, "global_batch": 4}, "checkpoint": {"every_steps": 2, "keep_last": 0}, "lines": 300,
}  # fmt: skip


def test_a_warm_start_takes_the_weights_and_nothing_else(folder: Path) -> None:
    """With a rate that moves no weight, those after one step are those that the run began with."""
    assert train() == 0
    warm = ("--checkpoint.warm_start=runs/a/4", "--training.steps=1", "--optimizer.lr=1e-30")
    assert train("--run.name=b", *warm) == 0
    before, after = tensors("a", 4), tensors("b", 1)
    weights = [name for name in before if name.startswith("model.")]
    assert weights and all(torch.equal(before[name], after[name]) for name in weights)
    assert after["optimizer.adamw/steps"] == 1 and [row[:2] for row in curve("b")] == [(1, 4)]


def test_a_warm_start_in_another_number_format_rounds_the_weights(folder: Path) -> None:
    assert train("--training.steps=2") == 0
    warm = ("--checkpoint.warm_start=runs/a", "--training.steps=1", "--optimizer.lr=1e-30")
    assert train("--run.name=b", "--precision.compute=float64", *warm) == 0
    before, after = tensors("a", 2), tensors("b", 1)
    name = "model.head.weight"
    assert after[name].dtype == torch.float64 and torch.equal(after[name].float(), before[name])


@pytest.mark.parametrize(
    ("change", "key", "before", "now"),
    [
        ("--model.rope_theta=500000.0", "model.rope_theta", "10000.0 for the weights of", " 500000.0 here"),
        ("--model.rope_scaling.factor=8.0", "model.rope_scaling", "None for the weights of", " RopeScaling("),
        ("--model.norm_eps=0.1", "model.norm_eps", "1e-05 for the weights of", " 0.1 here"),
    ],
)
def test_a_warm_start_in_a_changed_model_names_both_values(
    folder: Path, change: str, key: str, before: str, now: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Issue 14, item 1: what may be meant is warned of."""
    assert train("--run.stop_after_step=2") == 75
    capsys.readouterr()
    warm = ("--run.name=b", "--checkpoint.warm_start=runs/a", "--training.steps=1")
    assert train(*warm) == 0 and "for the weights of" not in capsys.readouterr().out
    assert train(*warm, "--run.name=c", change) == 0
    said = capsys.readouterr().out
    assert f"warning: {key}: {before}" in said and now in said


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        (["--model.heads=4", "--model.kv_heads=2"], True),
        (["--model.dim=32"], False),
        (["--model.vocab_size=288"], False),
        (["--model.qk_norm=true"], False),
        (["--data.tokenizer=level"], True),
        (['--data.special_tokens=["<a>"]'], True),
    ],
)
def test_a_warm_start_in_another_model_or_by_another_tokenizer_is_refused(
    folder: Path, changes: list[str], fits: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Issue 14, item 1: the keys are named, with both values; weights that fit may be meant, by name."""
    bpe.saved(bpe.byte_level(260), folder / "level")
    assert train("--run.stop_after_step=2", "--model.qk_norm=false") == 75
    warm = ("--run.name=b", "--checkpoint.warm_start=runs/a", "--training.steps=1", "--model.qk_norm=false", *changes)
    assert train(*warm) == 2
    said = capsys.readouterr().err
    keys = [change.removeprefix("--").partition("=")[0] for change in changes]
    assert all(f"{key}: " in said and " here; give it the value" in said for key in keys) and len(said.splitlines()) < 7
    allowed = [word for key in keys for word in ("--allow-change", key)]
    assert train(*warm, *allowed) == (0 if fits else 2)
    assert not fits or f"warning: {keys[0]}: " in capsys.readouterr().out


def test_weights_that_are_not_finite_are_passed_over_or_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Issue 14, item 18, wherever weights enter: a resumed run, a warm start, a branch, a text, an export."""
    assert train("--run.stop_after_step=4") == 75
    newest = folder / "runs/a/checkpoints/step-00000004"
    spoil_weight(newest, "model.embed.weight")
    for words in (["--run.name=b", f"--checkpoint.{key}=runs/a/4"] for key in ("warm_start", "resume_from")):
        assert train(*words) == 4
        assert "model.embed.weight holds numbers that are not finite" in capsys.readouterr().err
    assert cli(["checkpoint", "export-hf", "runs/a/4", "out"]) == 4 and not (folder / "out").exists()
    assert "model.embed.weight holds numbers that are not finite" in capsys.readouterr().err
    assert cli(["generate", "runs/a", "--tokens=1"]) == 0
    assert "step 4 is passed over" in capsys.readouterr().err
    assert train() == 0 and rows("a", "resumed")[-1]["step"] == 2
    for step in steps("a"):
        spoil_weight(folder / "runs/a/checkpoints" / folder_name(step), "model.norm.weight")
    assert cli(["generate", "runs/a", "--tokens=1"]) == 4
    assert "model.norm.weight holds numbers that are not finite" in capsys.readouterr().err


def test_a_run_that_goes_on_needs_no_warm_start_any_more(folder: Path) -> None:
    assert train() == 0
    warm = ("--run.name=b", "--checkpoint.warm_start=runs/a")
    assert train(*warm, "--run.stop_after_step=3") == 75
    assert train(*warm) == 0
    assert train("--run.name=c", "--checkpoint.warm_start=runs/a") == 0
    assert curve("b") == curve("c")


@pytest.mark.parametrize("key", ["warm_start", "resume_from"])
def test_a_run_that_saves_on_is_begun_with_as_it_was_at_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """The first start of b dies before it has saved; a has come further when the second is made."""

    def killed(self: TrainState, number: int, *rest: Any) -> Any:
        raise KeyboardInterrupt

    begins = ("--run.name=b", f"--checkpoint.{key}=runs/a")
    assert train("--run.stop_after_step=4") == 75
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(trainer, "take_step", killed)
        train(*begins)
    assert train() == 0
    assert train(*begins) == 0
    assert train("--run.name=c", f"--checkpoint.{key}=runs/a/4") == 0 and curve("b") == curve("c") != []


def test_what_a_path_meant_at_first_it_means_until_that_is_gone(tmp_path: Path) -> None:
    def save(step: int) -> Path:
        (folder := checkpoints / folder_name(step)).mkdir(parents=True)
        return folder

    run = tmp_path / "run"
    checkpoints = run / "checkpoints"
    two, own = save(2), manager.CheckpointManager(tmp_path, pytest.fail)
    assert own.begins_with(run) == two
    four = save(4)
    assert own.begins_with(run) == two
    assert own.begins_with(checkpoints) == four, "another path"
    six = save(6)
    assert own.begins_with(checkpoints) == four
    four.rmdir()
    assert own.begins_with(checkpoints) == six
    (tmp_path / BEGINS_WITH).write_text("[")
    assert own.begins_with(checkpoints) == six
    with pytest.raises(CheckpointError, match=r"cannot write .*nowhere"):
        manager.CheckpointManager(tmp_path / "nowhere", pytest.fail).begins_with(run)


@pytest.mark.parametrize("key", ["warm_start", "resume_from"])
def test_what_cannot_be_begun_with_is_named(folder: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(f"--checkpoint.{key}=runs/nothing") == 2
    assert "there is no folder 'runs/nothing'" in capsys.readouterr().err


def test_a_branch_goes_on_with_the_whole_state_of_another_run(folder: Path) -> None:
    assert train() == 0
    assert train("--run.name=b", "--checkpoint.resume_from=runs/a/4") == 0
    assert curve("b") == curve("a")[4:]
    ours, theirs = tensors("a", 8), tensors("b", 8)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert steps("a") == [2, 4, 6, 8]


def test_a_branch_of_another_recipe_is_refused_or_allowed_by_name(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--run.stop_after_step=4") == 75
    branch = ("--run.name=b", "--checkpoint.resume_from=runs/a", "--optimizer.lr=0.02")
    assert train(*branch) == 2
    said = capsys.readouterr().err
    assert "optimizer.lr: 0.01 there, 0.02 here" in said and "--allow-change optimizer.lr" in said
    assert train(*branch, "--allow-change", "optimizer.lr") == 0
    assert [row[0] for row in curve("b")] == [5, 6, 7, 8]


def test_a_resumed_run_may_change_a_key_that_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--run.stop_after_step=4") == 75
    changed = ("--optimizer.lr=0.02", "--optimizer.weight_decay=0.0")
    assert train(*changed, "--allow-change=optimizer.lr") == 2
    said = capsys.readouterr().err
    assert "optimizer.weight_decay" in said and "optimizer.lr:" not in said
    assert train(*changed, "--allow-change=optimizer.*") == 0
    assert [row["detail"] for row in rows("a", "resumed")] and "optimizer.lr: 0.01 -> 0.02" in str(rows("a", "resumed"))


def test_a_key_that_there_is_not_cannot_be_allowed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--allow-change", "optimizer.learning_rate") == 2
    assert "--allow-change optimizer.learning_rate: there is no such recipe key" in capsys.readouterr().err


def test_another_text_is_refused_or_allowed_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--run.stop_after_step=4") == 75
    (folder / "corpus.txt").write_text("".join(f"{n} cubed is {n**3}.\n" for n in range(300)))
    assert train() == 2 and "--allow-change data.corpus" in capsys.readouterr().err
    assert train("--allow-change=data.corpus") == 0


def test_going_on_from_a_chosen_step(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train() == 0
    whole = curve("a")
    assert train("--from-step=5") == 4
    assert "there are those of 2, 4, 6, 8" in capsys.readouterr().err
    assert train("--from-step=4", "--run.stop_after_step=5") == 75
    assert curve("a") == whole[:5]
    assert 5 in steps("a") and (folder / "runs/a/checkpoints/set-aside-1-step-00000008").is_dir()
    assert train() == 0 and curve("a") == whole


def under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)


def test_a_restart_by_torchrun_does_not_begin_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--fresh --force` was done by the first start."""
    assert train("--run.stop_after_step=4") == 75
    under_torchrun(monkeypatch)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train("--fresh", "--force") == 0
    assert [row["detail"] for row in rows("a", "resumed")]


def test_a_restart_does_what_the_first_start_could_not_and_no_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--from-step 4`: the first start fails before it goes back, the second stops at 6, the third goes on there."""
    assert train() == 0
    whole = curve("a")
    under_torchrun(monkeypatch)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/torchelastic_x/none_y/attempt_0/0/error.json")

    def failing(*arguments: Any) -> None:
        raise CheckpointError("the disk is away")

    with monkeypatch.context() as patch:
        patch.setattr(manager.CheckpointManager, "load_chosen", failing)
        assert train("--from-step=4") == 4
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train("--from-step=4", "--run.stop_after_step=6") == 75
    assert steps("a")[-1] == 6 and curve("a") == whole[:6]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert train("--from-step=4") == 0
    assert not list(Path("runs/a/checkpoints").glob("set-aside-2*6"))
    assert [row["step"] for row in rows("a", "resumed")] == [4, 6] and curve("a") == whole


def test_another_environment_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--run.stop_after_step=4") == 75
    there = restore.environment
    monkeypatch.setattr(restore, "environment", lambda device: {**there(device), "torch": "9.9"})
    assert train() == 0
    assert f"torch {torch.__version__} -> 9.9" in capsys.readouterr().out


def test_a_run_that_a_guard_stops_finishes_the_save_under_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of step 4 is still being written when the loss of step 6 is found to be no number."""
    write, judge = manager.save_state, Guards.judge

    def slowly(*arguments: Any, **names: Any) -> None:
        time.sleep(0.5)
        write(*arguments, **names)

    def bad(self: Guards, step: int, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        return judge(self, step, loss * torch.nan if step == 6 else loss, norm)

    monkeypatch.setattr(manager, "save_state", slowly)
    monkeypatch.setattr(Guards, "judge", bad)
    assert train("--checkpoint.every_steps=4") == 3
    assert steps("a") == [4]


def unreadable(monkeypatch: pytest.MonkeyPatch, sample: int) -> None:
    read = Split.sample

    def failing(self: Split, number: int) -> Any:
        if number == sample:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "corpus.txt")
        return read(self, number)

    monkeypatch.setattr(Split, "sample", failing)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_cannot_be_read_ends_the_run_with_its_state_saved(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    with monkeypatch.context() as patch:
        unreadable(patch, sample=21)
        assert train(f"--data.workers={workers}") == 2
    said = capsys.readouterr().err
    assert "step 6: one of the samples 20 to 23 cannot be read: [Errno 5] Input/output error: 'corpus.txt'. The" in said
    assert "The state after step 5 is saved." in said and steps("a")[-1] == 5
    assert train() == 0 and train("--run.name=b") == 0 and curve("a") == curve("b")
