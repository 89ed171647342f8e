"""Saves that the clock or a file asks for: when they are asked for, and that all ranks do them after the same step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support import save_request_ranks
from support.pool import Pool
from support.runs import rows
from support.tiny import train

from titanlite.checkpoint.manager import CheckpointManager
from titanlite.checkpoint.storage import select_superseded
from titanlite.training import saving, trainer
from titanlite.training.saving import SAVE_NOW, SaveRequests


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets what time it is, in seconds since a start."""
    now = [0.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def committed() -> list[object]:
    """Steps after which a checkpoint was committed, kept or not."""
    return [row["step"] for row in rows("tiny", "checkpoint")]


def kept() -> list[int]:
    return CheckpointManager(Path("runs/tiny/checkpoints"), print).steps()


def test_the_clock_asks_once_and_begins_anew_with_each_save(tmp_path: Path, clock: Callable[[float], None]) -> None:
    asks = SaveRequests(tmp_path / SAVE_NOW, every_minutes=2, warn=pytest.fail)
    said = []
    for seconds in (0, 119, 120, 121):
        clock(seconds)
        said.append(asks.due())
    asks.begun()
    asks.saved()
    for seconds in (240, 241):
        clock(seconds)
        said.append(asks.due())
    assert said == [False, False, True, False, False, True]


def test_the_file_is_deleted_after_the_save(tmp_path: Path) -> None:
    file = tmp_path / SAVE_NOW
    asks = SaveRequests(file, every_minutes=0, warn=pytest.fail)
    assert not asks.due()
    file.touch()
    assert asks.due() and not asks.due() and file.exists()
    asks.begun()
    asks.saved()
    assert not file.exists() and not asks.due()


def test_a_file_that_came_after_the_last_look_asks_for_another_save(
    tmp_path: Path, clock: Callable[[float], None]
) -> None:
    file = tmp_path / SAVE_NOW
    asks = SaveRequests(file, every_minutes=0, warn=pytest.fail)
    assert not asks.due()
    file.touch()
    asks.saved()  # for another reason, of a state from before the request
    clock(1.0)
    assert asks.due()


def test_a_file_that_cannot_be_deleted_asks_once(tmp_path: Path, clock: Callable[[float], None]) -> None:
    file, warnings = tmp_path / SAVE_NOW, list[str]()
    (file / "held").mkdir(parents=True)
    asks = SaveRequests(file, every_minutes=0, warn=warnings.append)
    assert asks.due()
    asks.begun()
    asks.saved()
    clock(10.0)
    assert not asks.due()
    assert [str(file) in text for text in warnings] == [True]


def test_all_ranks_save_after_the_same_step(pool: Pool, tmp_path: Path) -> None:
    """The first rank asks after step 2; they agree while they take the next one."""
    saved = pool.run(save_request_ranks.asked_after, 2, str(tmp_path), 2, 6)
    assert saved == [[3]] * 2
    assert CheckpointManager(tmp_path / "checkpoints", print).steps() == saved[0]
    assert not (tmp_path / SAVE_NOW).exists()


def test_a_wish_to_stop_and_one_to_save_do_not_mix(pool: Pool) -> None:
    answers = pool.run(save_request_ranks.agreements, 2, 4)
    assert [[(bool(stop), save) for stop, save in of_rank] for of_rank in answers] == [
        [(False, False), (False, True), (True, False), (False, False)]
    ] * 2


def test_a_run_saves_by_the_clock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "_LOOK_EVERY_SECONDS", 0.0)
    assert train("--checkpoint.every_minutes=1e-9", "--checkpoint.keep_last=1", "--checkpoint.mode=sync") == 0
    assert committed() == [1, 2, 3, 4, 5, 6] and kept() == [6]


@pytest.mark.parametrize(
    ("every", "steps", "saved"), [(0, 6, [1, 2, 6]), (1, 3, [1, 2, 3])], ids=["asked alone", "saved anyway"]
)
def test_a_run_saves_when_asked_to(folder: Path, every: int, steps: int, saved: list[int]) -> None:
    assert train("--run.stop_after_step=1") == 75
    file = Path("runs/tiny", SAVE_NOW)
    file.touch()
    assert train(f"--checkpoint.every_steps={every}", f"--run.stop_after_step={steps}") == (0 if steps == 6 else 75)
    assert committed() == saved and not file.exists()


def test_every_nth_step_is_kept(folder: Path) -> None:
    assert train("--checkpoint.every_steps=1", "--checkpoint.keep_last=1", "--checkpoint.keep_every=2") == 0
    assert kept() == [2, 4, 6]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "go"),
    [(1, 0, [10, 15, 20, 25]), (2, 10, [15]), (0, 0, []), (0, 10, []), (9, 0, []), (1, 7, [10, 15, 20, 25])],
)
def test_what_need_not_be_kept(keep_last: int, keep_every: int, go: list[int]) -> None:
    assert select_superseded([10, 15, 20, 25, 30], keep_last, keep_every) == go


def test_a_request_that_comes_while_a_save_is_written_is_kept(tmp_path: Path, clock: Callable[[float], None]) -> None:
    file = tmp_path / SAVE_NOW
    asks = SaveRequests(file, every_minutes=0, warn=pytest.fail)
    asks.begun()
    file.touch()
    clock(1.0)
    assert asks.due()
    asks.saved()  # the one from before the request
    assert file.exists()
    asks.begun()
    asks.saved()
    assert not file.exists()


@pytest.mark.parametrize("by_file", [True, False])
def test_what_asked_for_a_save_that_failed_waits_too(
    tmp_path: Path, clock: Callable[[float], None], by_file: bool
) -> None:
    file = tmp_path / SAVE_NOW
    asks = SaveRequests(file, every_minutes=0 if by_file else 0.1, warn=pytest.fail)
    if by_file:
        file.touch()
    clock(10.0)
    assert asks.due()
    asks.begun()
    asks.failed()
    clock(10.0 + saving._RETRY_SECONDS - 1)
    assert not asks.due()
    clock(10.0 + saving._RETRY_SECONDS)
    assert asks.due()
