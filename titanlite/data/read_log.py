"""Which samples each step read, as the ranks write it down: 40 bytes for each stretch of steps. No torch.

`RUN/logs/samples/rank-00007.bin` is what data rank 7 read, in every start of the run. It only grows: `audit.py` tells
which records count. The first step of a stretch is written at once, so that every start leaves a record; those after it
when the stretch ends, and before anything shows that they were taken: a row of metrics, a checkpoint, a snapshot.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from titanlite.errors import DataError
from titanlite.files import Appender, read_file, wrap_os_errors
from titanlite.plan.launch import MAX_STARTS
from titanlite.plan.layout import BatchPlan

FOLDER = Path("logs") / "samples"  # of a run
Records = npt.NDArray[Any]  # `[records]` of `RECORD`
_MOST = 2**24  # samples of one batch, or steps of one record: far more than there ever are

READ, SKIPPED, WENT_BACK, READ_STEPS = range(1, 5)
"""Kinds of records: samples that a step read; those passed over before a step, by `data.skip_steps`, and after a step
that the run went back to; samples that several steps read."""

RECORD = np.dtype(
    [(name, "<i8") for name in ("first", "count")]
    + [(name, "<u4") for name in ("step", "begun", "start", "rank", "ranks")]
    + [(name, "<u2") for name in ("turn", "kind")]
)
"""`count` samples: `first`, `first + ranks`, …; of those passed over, `first`, `first + 1`, …. Written by data rank
`rank` of `ranks` in `step` of a stretch that went on from step `begun`: the `turn`-th of the run's start `start`, both
from 1; a rollback begins the next one.

Of `READ_STEPS`, `count` is steps x 2^32 + batch: from `step` on, each step read the rank's part of `batch` samples, the
first of those from `first - rank` on, and the next ones of those that follow."""


class ReadLog:
    """Writes the records of the data rank that `plan` is for. Nothing waits for the disk but `sync`.

    Without a path nothing is written: on all but one of the ranks with the same samples. Raises `UsageError`.
    """

    def __init__(self, path: Path | None, plan: BatchPlan, start: int, warn: Callable[[str], None]) -> None:
        self._plan, self._start = plan, start
        self._turn = self._begun = 0
        self._next = (0, 0)  # the step that would go on with the stretch, and the rank's first sample then
        self._unwritten = 0  # steps up to there that have no record yet
        self._file: Appender | None = None
        if path is not None:
            with wrap_os_errors(f"cannot write {path}", path):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = Appender(path, warn)
                size = path.stat().st_size
                os.truncate(path, size - size % RECORD.itemsize)  # a record that a kill has cut in two

    def begin(self, after_step: int) -> None:
        """The run goes on after this step: whatever later steps read before, they will read again."""
        self.flush()
        self._turn, self._begun, self._next = self._turn + 1, after_step, (0, 0)

    def read(self, step: int, samples: Sequence[int]) -> None:
        """The rank's `samples` of a step."""
        if not samples:
            return
        first = samples[0]
        planned = samples == tuple(self._plan.samples(first - self._plan.data_rank))
        if planned and (step, first) == self._next:
            self._unwritten += 1
        else:
            self.flush()
            for each in [samples] if planned else [[sample] for sample in samples]:
                self._write(READ, step, each[0], len(each))  # what should not be is written down as it is
        self._next = step + 1, first + self._plan.global_batch

    def passed_over(self, kind: int, step: int, first: int, end: int) -> None:
        """Samples `first` to `end - 1` are not read: `SKIPPED` by this step, or the run `WENT_BACK` to it."""
        self._write(kind, step, first, end - first)

    def flush(self) -> None:
        """Have a record of every step that was read."""
        if steps := self._unwritten:
            batch = self._plan.global_batch
            self._write(READ_STEPS, self._next[0] - steps, self._next[1] - steps * batch, steps << 32 | batch)
            self._unwritten = 0

    def sync(self) -> None:
        """Return once all of it is on stable storage."""
        self.flush()
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()

    def _write(self, kind: int, step: int, first: int, count: int) -> None:
        if self._file is not None:
            place = (self._begun, self._start, self._plan.data_rank, self._plan.data_ranks, self._turn, kind)
            self._file.write(np.array((first, count, step, *place), RECORD).tobytes())


NO_LOG = ReadLog(None, BatchPlan(global_batch=1, data_ranks=1, data_rank=0, microbatch=1), 1, print)


def log_path(run: Path, rank: int) -> Path:
    return run / FOLDER / f"rank-{rank:05d}.bin"


def read_records(run: Path) -> Records:
    """All records of a run, one for each step, in no order across ranks. Raises `DataError`, also where none are."""
    parts = [_read_file(path) for path in sorted((run / FOLDER).glob("rank-*.bin"))]
    if not sum(map(len, parts)):
        where = f"{run / FOLDER} is empty or not there"
        raise DataError(f"{run} has no record of the samples that were read: {where}; older versions left none.")
    return np.concatenate(parts)


def _read_file(path: Path) -> Records:
    records = _whole_records(path)
    several = records["kind"] == READ_STEPS
    steps = np.where(several, records["count"] >> 32, 1)
    batch = np.where(several, records["count"] & 2**32 - 1, 0)
    strange = np.flatnonzero(
        (records["kind"] < READ) | (records["kind"] > READ_STEPS) | (records["ranks"] == 0) | (records["count"] < 0)
        | ((records["kind"] == READ) & (records["count"] > _MOST)) | (steps < 1) | (steps > _MOST) | (batch > _MOST)
        | (several & (batch <= records["rank"])) | (records["first"] < 0) | (records["first"] >= 2**62)
    )  # fmt: skip
    if strange.size:
        raise DataError(f"{path}: {records[strange[0]]}: damaged, or written by a newer titanlite.")
    each, batch = np.repeat(records, steps), np.repeat(batch, steps)
    later = np.arange(len(each)) - np.repeat(np.cumsum(steps) - steps, steps)  # steps after the record's first
    each["step"] += later.astype(np.uint32)
    each["first"] += later * batch
    each["count"] = np.where(batch > 0, -((each["rank"] - batch) // each["ranks"]), each["count"])
    each["kind"][batch > 0] = READ
    return each


def last_start(run: Path) -> int:
    """The last start of the run that any rank wrote down; 0 for none. Raises `DataError`."""
    last = 0
    for path in (run / FOLDER).glob("rank-*.bin"):
        last = max([last, *_whole_records(path)["start"][-1:].tolist()])
        if last >= MAX_STARTS:
            raise DataError(f"{path} is damaged: its last record is of start {last}. Move it away to go on.")
    return last


def _whole_records(path: Path) -> Records:
    """Those that a kill has not cut in two; zeros, which may stand for what a loss of power took, are none."""
    with wrap_os_errors(f"cannot read {path}", path, kind=DataError):
        data = read_file(path)
    records = np.frombuffer(data[: len(data) - len(data) % RECORD.itemsize], RECORD)
    return records[records["start"] > 0]
