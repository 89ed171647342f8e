"""What runs wrote down of the samples that they read, and what the audit makes of it. Runs here have no model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.corpus.tokenizers import open_tokenizer
from titanlite.data.loader import train_loader
from titanlite.data.read_log import (
    FOLDER,
    RECORD,
    SKIPPED,
    WENT_BACK,
    Audit,
    ReadLog,
    Records,
    audit,
    history,
    last_start,
    log_path,
    read_records,
    samples_of,
    steps_read,
)
from titanlite.data.splits import split_of
from titanlite.errors import DataError
from titanlite.plan.layout import BatchPlan, SampleSchedule, ceil_div

RANKS = (1, 2, 3, 5, 8)
SPLIT = split_of(np.arange(401, dtype=np.uint16) % 256, open_tokenizer("bytes"), 8)


def digest_of(*samples: range) -> str:
    """By the documented words alone."""
    return hashlib.blake2b(
        b"".join(number.to_bytes(8, "little") for each in samples for number in each), digest_size=16
    ).hexdigest()


def fail(text: str) -> None:
    raise AssertionError(text)


@dataclass(frozen=True)
class Life:
    """A start of a run: on so many ranks, killed when each had read up to some step; or it went back."""

    ranks: int
    reached: list[int]
    """Steps that each rank reads in this start, from where it goes on; the shortest counts for the next save."""
    saved: int
    """Of the steps that all ranks read, the part (in hundredths) that the next start finds saved."""
    torn: int
    """Bytes of a last record that a kill cut in two."""
    goes_back: bool
    """The next stretch is a rollback in the same start, past what was read."""
    logged: int = 1
    """Steps from one row of metrics to the next; what was read after the last row and the last save, the kill takes."""


@st.composite
def lives(draw: st.DrawFn) -> Life:
    ranks = draw(st.sampled_from(RANKS))
    least, logged = draw(st.integers(0, 5)), draw(st.integers(1, 4))
    reached = draw(st.lists(st.integers(least, 6), min_size=ranks, max_size=ranks))
    saved, torn = draw(st.integers(0, 100)), draw(st.integers(0, 39))
    return Life(ranks, reached, saved, torn, draw(st.booleans()), logged)


class Run:
    """A run by its logs, its state two integers, as a checkpoint keeps them."""

    def __init__(self, folder: Path, batch: int, skipped: tuple[int, ...] = ()) -> None:
        self.folder, self.batch, self.skipped = folder, batch, skipped
        self.step = self.samples = self.starts = 0
        self.read: dict[int, range] = {}
        """What the steps that count read."""

    def live(self, life: Life, *, loader: bool = False, workers: int = 0) -> None:
        self.starts += 1
        paths = [log_path(self.folder, rank) for rank in range(life.ranks)]
        logs = [ReadLog(path, self._plan(rank, life.ranks), self.starts, fail) for rank, path in enumerate(paths)]
        for log in logs:
            log.begin(self.step)
        self._steps(life, logs, loader, workers)
        if life.goes_back:
            # All ranks hear of it after the same step, and save where they went back to.
            furthest = max(life.reached)
            schedule = self._schedule()
            self._steps(replace(life, reached=[furthest] * life.ranks), logs, False, 0)
            read = schedule.end_sample(self.step + furthest) if furthest else self.samples
            for log in logs:
                log.begin(self.step)
                log.write(WENT_BACK, self.step, self.samples, read - self.samples)
                log.sync()
            self.samples = read
        common = min(life.reached) * life.saved // 100
        if not life.goes_back and common:
            schedule = self._schedule()
            for step in range(self.step + 1, self.step + common + 1):
                self.read[step] = range(schedule.first_sample(step), schedule.end_sample(step))
            self.step, self.samples = self.step + common, schedule.end_sample(self.step + common)
        for path, log in zip(paths, logs, strict=True):
            left = path.read_bytes()
            log.close()
            path.write_bytes(left)  # killed before
        if life.torn:
            with open(log_path(self.folder, 0), "ab") as file:
                file.write(bytes(range(1, life.torn + 1)))

    def _schedule(self) -> SampleSchedule:
        return SampleSchedule(self.step, self.samples, self.batch, self.skipped)

    def _plan(self, rank: int, ranks: int) -> BatchPlan:
        return BatchPlan(self.batch, ranks, rank, ceil_div(self.batch, ranks))

    def _steps(self, life: Life, logs: list[ReadLog], loader: bool, workers: int) -> None:
        schedule = self._schedule()
        for rank, (log, reached) in enumerate(zip(logs, life.reached, strict=True)):
            plan = self._plan(rank, life.ranks)
            firsts = [schedule.first_sample(step) for step in range(self.step + 1, self.step + reached + 1)]
            if loader:
                own = [batch.samples for batch in train_loader(SPLIT, plan, firsts, workers=workers)]
            else:
                own = [tuple(plan.samples(first)) for first in firsts]
            at = self.samples
            for step, samples in enumerate(own, self.step + 1):
                if schedule.first_sample(step) > at:
                    log.write(SKIPPED, step, at, schedule.first_sample(step) - at)
                at = schedule.end_sample(step)
                log.read(step, samples)
                if step % life.logged == 0:
                    log.flush()
                if step == self.step + min(life.reached) * life.saved // 100:
                    log.sync()

    def audit(self) -> Audit:
        return audit(read_records(self.folder), self.step, self.samples)

    def require_whole(self) -> None:
        found = self.audit()
        assert found.whole, found
        assert found.steps == self.step == len(self.read)
        assert found.samples == self.step * self.batch
        assert found.digest == digest_of(*(self.read[step] for step in sorted(self.read)))
        passed = {number for each in found.skipped for number in range(each["samples"][0], each["samples"][1] + 1)}
        assert passed == set(range(self.samples)) - {number for each in self.read.values() for number in each}


WHOLE = Life(1, [5], 100, 0, False)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 17),
    skipped=st.sets(st.integers(1, 20)),
    several=st.lists(lives(), max_size=6),
)
def test_kills_layouts_and_rollbacks_lose_and_repeat_nothing(
    tmp_path_factory: pytest.TempPathFactory, batch: int, skipped: set[int], several: list[Life]
) -> None:
    run = Run(tmp_path_factory.mktemp("run"), batch, tuple(sorted(skipped)))
    for life in (*several, WHOLE):
        run.live(life)
        if any((run.folder / FOLDER).glob("*")) and run.step:
            run.require_whole()
    assert last_start(run.folder) == run.starts


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize(
    ("workers", "skipped"),
    [
        (0, ()),
        (0, (2, 4, 5)),
        *(pytest.param(workers, (), marks=pytest.mark.slow) for workers in (1, 2, 3)),
        (3, (2, 4, 5)),
    ],
)
def test_the_loaders_samples_are_the_same_on_any_layout_and_interrupted_anywhere(
    tmp_path: Path, workers: int, skipped: tuple[int, ...]
) -> None:
    whole = Run(tmp_path / "whole", 7, skipped)
    whole.live(Life(1, [6], 100, 0, False))
    whole.require_whole()
    parts = Run(tmp_path / "parts", 7, skipped)
    layouts = RANKS if workers == 0 else (1, 3)
    for turn, ranks in enumerate(layouts):
        left = 6 - parts.step
        reached = min(left, 2 if workers == 0 else 4)
        parts.live(Life(ranks, [reached] * ranks, 50, 7 * turn, False), loader=True, workers=workers)
    left = 6 - parts.step
    parts.live(Life(2, [left] * 2, 100, 0, False), loader=True, workers=workers)
    parts.require_whole()
    assert parts.audit().digest == whole.audit().digest
    assert parts.audit().restarts == len(layouts)


def test_a_stretch_has_two_records_and_a_start_one_however_soon_it_is_killed(tmp_path: Path) -> None:
    run = Run(tmp_path, 4)
    run.live(Life(2, [100, 100], 100, 0, False, logged=1000))
    assert [log_path(tmp_path, rank).stat().st_size for rank in (0, 1)] == [2 * RECORD.itemsize] * 2
    run.live(Life(2, [3, 1], 0, 0, False, logged=1000))
    assert run.audit().restarts == 1
    run.require_whole()


def test_layouts_and_restarts_are_reported(tmp_path: Path) -> None:
    run = Run(tmp_path, 4)
    run.live(Life(2, [3, 4], 100, 3, False))
    run.live(Life(3, [2, 2, 2], 100, 0, False))
    found = run.audit()
    assert found.layouts == ({"steps": (1, 3), "data_ranks": 2}, {"steps": (4, 5), "data_ranks": 3})
    assert found.restarts == 1 and found.digest == digest_of(range(20))
    assert [step for step, _ in steps_read(history(read_records(tmp_path)))] == [1, 2, 3, 4, 5]
    # The last start undid what rank 1 had read of step 4.
    (fourth,) = (part for step, part in steps_read(history(read_records(tmp_path))) if step == 4)
    assert samples_of(fourth).tolist() == [12, 13, 14, 15] and set(fourth["start"]) == {2}


def rewrite(folder: Path, rank: int, change: Callable[[Records], Records]) -> None:
    path = log_path(folder, rank)
    change(np.fromfile(path, RECORD)).tofile(path)


def spans(*samples: int) -> tuple[tuple[int, int], ...]:
    return tuple((sample, sample) for sample in samples)


def delete(row: int) -> Callable[[Records], Records]:
    return lambda records: np.delete(records, row)


def change(field: str, row: int, value: int) -> Callable[[Records], Records]:
    def changed(records: Records) -> Records:
        records[field][row] = value
        return records

    return changed


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Ten steps of five samples on two ranks, the last six after a kill; a record for each step and rank."""
    run = Run(tmp_path, 5)
    run.live(Life(2, [6, 5], 80, 0, False))
    run.live(Life(2, [6, 6], 100, 0, False))
    run.require_whole()
    assert (run.step, run.samples) == (10, 50)
    return run


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # Lost, repeated, unrecorded; in order? Step 7 on rank 1, which reads the second and fourth sample of five.
        ([(1, delete(-4))], (spans(31, 33), (), (), True)),
        # Step 5, which the killed start had read too: that was undone with it.
        ([(0, delete(-6)), (1, delete(-6))], (((20, 24),), (), spans(5), True)),
        # The last step reads what the one before it had read, on rank 0; or what rank 0 reads, on rank 1.
        ([(0, change("first", -1, 40))], (spans(45, 47, 49), spans(40, 42, 44), (), False)),
        ([(1, change("first", -1, 45))], (spans(46, 48), spans(45, 47), (), True)),
        # The last two steps change places: each sample is read once all the same.
        ([(r, change("first", -k, 35 + 5 * k + r)) for r in (0, 1) for k in (1, 2)], ((), (), (), False)),
    ],
    ids=["lost record", "lost step", "repeated", "twice within a step", "out of order"],
)
def test_damage_is_found(
    run: Run, changes: list[tuple[int, Callable[[Records], Records]]], expected: tuple[Any, ...]
) -> None:
    for rank, what in changes:
        rewrite(run.folder, rank, what)
    found = run.audit()
    assert (found.lost, found.repeated, found.unrecorded, found.in_order) == expected
    assert not found.whole


def test_a_state_that_says_less_was_read_is_found(run: Run) -> None:
    """Whoever goes on from it reads these again; from one that says more, they would never be read."""
    records = read_records(run.folder)
    assert audit(records, 10, 45).repeated == ((45, 49),)
    assert audit(records, 10, 55).lost == ((50, 54),)


def test_what_was_not_saved_does_not_count(run: Run) -> None:
    found = audit(read_records(run.folder), 6, 30)
    assert found.whole and (found.steps, found.digest) == (6, digest_of(range(30)))


def test_a_run_that_began_with_anothers_state_has_its_first_samples_there(tmp_path: Path) -> None:
    run = Run(tmp_path, 4)
    run.step, run.samples = 10, 40
    run.live(Life(2, [3, 3], 100, 0, False))
    records = read_records(tmp_path)
    assert audit(records, 13, 52, begins_elsewhere=True).whole
    found = audit(records, 13, 52)
    assert found.lost == ((0, 39),) and found.unrecorded == ((1, 10),)


def test_a_passing_over_that_was_undone_excuses_no_loss(tmp_path: Path) -> None:
    run = Run(tmp_path, 4)
    run.live(Life(1, [4], 75, 0, False))
    run.live(Life(1, [2], 0, 0, True))  # back to step 3, past samples 12 to 19
    run.step, run.samples = 2, 8
    run.live(Life(1, [4], 100, 0, False))
    rewrite(tmp_path, 0, delete(-1))
    assert run.audit().lost == ((20, 23),)
    rewrite(tmp_path, 0, delete(-2))
    assert run.audit().lost == ((12, 15), (20, 23))


def test_zeros_at_the_end_are_no_records(run: Run) -> None:
    """What a file system may leave where power was lost."""
    with open(log_path(run.folder, 0), "ab") as file:
        file.write(bytes(90))
    run.live(Life(2, [1, 1], 100, 0, False))
    assert run.audit().whole and run.step == 11


def test_a_run_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="logs/samples"):
        read_records(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("kind", 9), ("count", 2**60), ("count", -1), ("first", -1), ("first", 2**63 - 1), ("ranks", 0)],
)
def test_records_that_no_run_writes_are_refused(run: Run, field: str, value: int) -> None:
    rewrite(run.folder, 1, change(field, 3, value))
    with pytest.raises(DataError, match=r"rank-00001\.bin: .*damaged"):
        run.audit()


def test_a_start_of_an_impossible_number_is_refused(run: Run) -> None:
    rewrite(run.folder, 1, change("start", -1, 2**32 - 1))
    with pytest.raises(DataError, match=r"rank-00001\.bin is damaged"):
        last_start(run.folder)


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(1, 5), start=st.integers(0, 6), skipped=st.sets(st.integers(1, 15)))
def test_a_course_is_all_batches_but_those_passed_over(batch: int, start: int, skipped: set[int]) -> None:
    """By walking through them; and a run that goes on from any step of it reads the same."""
    walked = [number for number in range(start + 1, 40) if number not in skipped]
    schedule = SampleSchedule(7, start * batch, batch, tuple(sorted(skipped)))
    firsts = [schedule.first_sample(step) for step in range(8, 18)]
    assert firsts == [(number - 1) * batch for number in walked[:10]]
    for step in range(8, 17):
        resumed = SampleSchedule(step, schedule.end_sample(step), batch, tuple(sorted(skipped)))
        assert [resumed.first_sample(later) for later in range(step + 1, 18)] == firsts[step - 7 :]
