"""Saves beside the training: what they hold, that there is one at a time, and what becomes of those that fail."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from support import background_ranks
from support.pool import Pool

from titanlite.checkpoint import manager, storage
from titanlite.checkpoint.format import CheckpointMetadata
from titanlite.checkpoint.load import load_state
from titanlite.checkpoint.manager import VALIDATION_LOSS, CheckpointManager
from titanlite.checkpoint.save import BackgroundSaver
from titanlite.errors import CheckpointError, RunFolderLost
from titanlite.models.shard import Shard
from titanlite.observe.logger import RunLogger
from titanlite.parallel.world import World
from titanlite.recipe.sections import Checkpoint, Recipe
from titanlite.training.saving import Saving
from titanlite.training.setup import Run


def begin(checkpoints: CheckpointManager, step: int, weights: torch.Tensor, **values: Any) -> None:
    checkpoints.begin({"w": Shard.whole(weights)}, CheckpointMetadata(step, values=values))


def loaded(folder: Path) -> tuple[int, torch.Tensor]:
    into = torch.zeros(40, 3)
    manifest = CheckpointManager(folder, pytest.fail).load_latest({"w": Shard.whole(into)})
    assert manifest is not None
    return manifest.step, into


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until it is set, no save gets further than its beginning."""
    go, save_state = threading.Event(), manager.save_state

    def waiting(*arguments: Any, **names: Any) -> None:
        assert go.wait(timeout=60)
        save_state(*arguments, **names)

    monkeypatch.setattr(manager, "save_state", waiting)
    return go


def test_what_is_saved_is_the_state_from_when_the_save_began(tmp_path: Path, held: threading.Event) -> None:
    checkpoints, weights = CheckpointManager(tmp_path, pytest.fail, section=Checkpoint()), torch.randn(40, 3)
    before = weights.clone()
    begin(checkpoints, 5, weights)
    weights.add_(1)
    assert checkpoints.result() is None and checkpoints.current is None and checkpoints.steps() == []
    held.set()
    saved = checkpoints.wait()
    assert saved is not None and (saved.step, saved.error) == (5, None) and 0 <= saved.blocked_seconds <= saved.seconds
    assert checkpoints.current == 5 and checkpoints.result() is None and checkpoints.wait() is None
    assert loaded(tmp_path)[0] == 5 and torch.equal(loaded(tmp_path)[1], before)


def test_each_save_is_of_a_copy_as_the_tensor_is() -> None:
    saver, matrix, saved = BackgroundSaver(pytest.fail, background=True), torch.arange(6.0).reshape(2, 3).t(), []
    for _ in range(2):
        matrix.mul_(2)
        saver.begin(1, {"w": Shard.whole(matrix)}, lambda plan, warn: saved.append(plan["w"].source))
        saver.result(wait=True)
        copy = saved[-1].read(((0, 0), (3, 2)))
        assert torch.equal(copy, matrix) and copy.data_ptr() != matrix.data_ptr()


def fail_first(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The first so many saves meet a full disk."""
    calls, write = [0], manager.save_state

    def failing(final: Path, *arguments: Any, **names: Any) -> None:
        calls[0] += 1
        if calls[0] <= times:
            raise CheckpointError(f"{final}: {os.strerror(errno.ENOSPC)}")
        write(final, *arguments, **names)

    monkeypatch.setattr(manager, "save_state", failing)


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_failures_are_told_and_too_many_in_a_row_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Literal["async", "sync"]
) -> None:
    checkpoints = CheckpointManager(tmp_path, pytest.fail, section=Checkpoint(mode=mode, max_failures=2))
    fail_first(monkeypatch, 2)
    for step in (1, 2):
        begin(checkpoints, step, torch.zeros(40, 3))
        saved = checkpoints.wait()
        assert saved is not None and saved.step == step and "No space left" in str(saved.error)
        assert checkpoints.current is None
    begin(checkpoints, 3, torch.zeros(40, 3))
    assert checkpoints.wait().error is None and checkpoints.current == 3  # type: ignore[union-attr]
    fail_first(monkeypatch, 3)
    for step in (4, 5):
        begin(checkpoints, step, torch.zeros(40, 3))
        checkpoints.wait()
    begin(checkpoints, 6, torch.zeros(40, 3))
    with pytest.raises(CheckpointError, match="3 saves in a row have failed"):
        checkpoints.wait()
    assert loaded(tmp_path)[0] == 3


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_lost_folder_ends_the_run_where_all_ranks_are(tmp_path: Path, mode: Literal["async", "sync"]) -> None:
    """Not where one of them looks, perhaps steps before the others (issue 14, item 13)."""

    def refuse() -> None:
        raise RunFolderLost("taken")

    section = Checkpoint(mode=mode, max_failures=99)
    checkpoints = CheckpointManager(tmp_path, pytest.fail, section=section, require_own=refuse)
    nothing: Any = None
    saving = Saving(Run(Recipe(), "", World(1, 2, torch.device("cpu")), nothing, checkpoints, RunLogger()))
    state = {"w": Shard.whole(torch.zeros(3))}
    saving.begin(state, CheckpointMetadata(1))
    checkpoints._saver.join()
    saving.look()
    assert saving.due() and saving.due(), "so that all ranks save, and end there"
    with pytest.raises(RunFolderLost, match="taken"):
        saving.begin(state, CheckpointMetadata(2))
    assert checkpoints.steps() == []


def test_a_mistake_of_ours_is_raised_where_the_save_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(*arguments: Any, **names: Any) -> None:
        raise TypeError("ours")

    monkeypatch.setattr(manager, "save_state", mistaken)
    checkpoints = CheckpointManager(tmp_path, pytest.fail, section=Checkpoint())
    begin(checkpoints, 1, torch.zeros(40, 3))
    with pytest.raises(TypeError, match="ours"):
        checkpoints.wait()


def test_ranks_save_in_the_background_while_they_talk_of_other_things(pool: Pool, tmp_path: Path) -> None:
    """Their messages about the save and those of the steps do not mix."""
    assert pool.run(background_ranks.train_while_saving, 3, str(tmp_path), 4) == [[1, 2, 3, 4]] * 3
    into = torch.zeros(9)
    manifest = CheckpointManager(tmp_path, pytest.fail).load_latest({"w": Shard.whole(into)})
    assert manifest is not None and manifest.step == 4 and into.tolist() == [4.0] * 9


# --- which stay


@pytest.mark.parametrize(
    ("last", "best", "losses", "kept"),
    [
        (1, 2, [(1, 4.0), (2, 2.0), (3, 3.0), (4, None), (5, 2.5), (6, 9.0), (7, 8.0)], [2, 5, 7]),
        (2, 1, [(1, 5.0), (2, 1.0), (2, 9.0), (3, 8.0)], [1, 2, 3]),
    ],
    ids=["beside the newest", "by the loss of the last save"],
)
def test_the_best_by_validation_stay(tmp_path: Path, last: int, best: int, losses: Any, kept: list[int]) -> None:
    section = Checkpoint(mode="sync", keep_last=last, keep_best=best)
    checkpoints = CheckpointManager(tmp_path, pytest.fail, section=section)
    for step, loss in losses:
        begin(checkpoints, step, torch.zeros(2), **({VALIDATION_LOSS: loss} if loss is not None else {}))
        checkpoints.wait()
    assert checkpoints.steps() == kept


# --- which is loaded


def three(tmp_path: Path, warn: Callable[[str], None]) -> CheckpointManager:
    checkpoints = CheckpointManager(tmp_path, warn)
    for step in (10, 20, 30):
        begin(checkpoints, step, torch.full((40, 3), float(step)))
        checkpoints.wait()
    return checkpoints


def test_going_back_loads_that_step_and_later_ones_are_never_the_latest_again(tmp_path: Path) -> None:
    said: list[str] = []
    checkpoints, into = three(tmp_path, said.append), torch.zeros(40, 3)
    assert checkpoints.load_chosen(10, {"w": Shard.whole(into)}).step == 10 and into[0, 0] == 10
    checkpoints.set_aside_after(10)
    assert checkpoints.steps() == [10] and loaded(tmp_path)[0] == 10
    assert (tmp_path / "set-aside-1-step-00000030").is_dir()
    assert ["later than step 10" in text for text in said] == [True, True]


def test_going_back_to_a_step_without_a_checkpoint_says_which_there_are(tmp_path: Path) -> None:
    checkpoints = three(tmp_path, pytest.fail)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 15; there are those of 10, 20, 30"):
        checkpoints.load_chosen(15, {})
    assert checkpoints.steps() == [10, 20, 30]


def test_values_of_another_float_are_taken_where_asked_for(tmp_path: Path) -> None:
    values = torch.randn(40, 3)
    checkpoints = CheckpointManager(tmp_path, pytest.fail)
    begin(checkpoints, 1, values)
    checkpoints.wait()
    for dtype in (torch.bfloat16, torch.float64):
        into = {"w": Shard.whole(torch.zeros(40, 3, dtype=dtype))}
        with pytest.raises(CheckpointError, match="float32 in the checkpoint"):
            load_state(checkpoints.path(1), into)
        load_state(checkpoints.path(1), into, convert=True)
        assert torch.equal(into["w"].tensor, values.to(dtype))
    whole = {"w": Shard.whole(torch.zeros(40, 3, dtype=torch.int32))}
    with pytest.raises(CheckpointError, match="int32 here"):
        load_state(checkpoints.path(1), whole, convert=True)


def test_the_best_is_kept_while_its_manifest_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = CheckpointManager(tmp_path, pytest.fail, section=Checkpoint(mode="sync", keep_last=1, keep_best=1))
    read, unreadable = storage.read_manifest, [True]

    def sometimes(folder: Path) -> Any:
        if unreadable[0] and folder.name.endswith("1"):
            raise CheckpointError("stale file handle")
        return read(folder)

    monkeypatch.setattr(storage, "read_manifest", sometimes)
    for step, loss in ((1, 1.0), (2, 3.0)):
        begin(checkpoints, step, torch.zeros(2), **{VALIDATION_LOSS: loss})
        checkpoints.wait()
    unreadable[0] = False
    begin(checkpoints, 3, torch.zeros(2), **{VALIDATION_LOSS: 4.0})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3]
