"""Which samples each step read, as the ranks themselves write it down: 40 bytes a step and data rank.

`RUN/logs/samples/rank-00007.bin` is what data rank 7 read, in every start of the run. It only grows: what was read by
steps that a kill or a rollback undid stays there, and `audit.py` tells which records count. No torch.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from titanlite.errors import DataError, UsageError
from titanlite.files import Appender, cause, open_file, read_file
from titanlite.plan.launch import MAX_STARTS

FOLDER = Path("logs") / "samples"
"""Of a run."""

READ, SKIPPED, WENT_BACK = range(1, 4)
"""Kinds of records: samples that a step read; samples that were passed over before a step, by `data.skip_steps`; and
after a step that the run went back to."""

RECORD = np.dtype(
    [
        ("first", "<i8"),
        ("count", "<i8"),
        ("step", "<u4"),
        ("begun", "<u4"),
        ("start", "<u4"),
        ("rank", "<u4"),
        ("ranks", "<u4"),
        ("turn", "<u2"),
        ("kind", "<u2"),
    ]
)
"""`count` samples: `first`, `first + ranks`, …; of those passed over, `first`, `first + 1`, …. Written by data rank
`rank` of `ranks` in `step` of a stretch that went on from step `begun`: the `turn`-th of the run's start `start`, both
from 1; a rollback begins the next one."""
_MOST_AT_ONCE = 2**24
"""Samples of one rank and step: far more than any batch has."""
_FIELDS = struct.Struct("<qqIIIIIHH")
assert _FIELDS.size == RECORD.itemsize

Records = npt.NDArray[Any]
"""`[records]` of `RECORD`."""


class ReadLog:
    """Writes the records of one data rank. Nothing waits for the disk but `sync`."""

    def __init__(self, path: Path, rank: int, ranks: int, start: int, warn: Callable[[str], None]) -> None:
        """Of data rank `rank` of `ranks`, in the run's `start`-th start. Raises `UsageError`."""
        self._rank, self._ranks, self._start = rank, ranks, start
        self._turn = self._begun = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _cut_to_whole_records(path)
            self._file = Appender(path, warn)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {cause(error, path)}.") from error

    def begin(self, after_step: int) -> None:
        """The run goes on after this step: whatever later steps read before, they will read again."""
        self._turn, self._begun = self._turn + 1, after_step

    def read(self, step: int, samples: Sequence[int]) -> None:
        """The rank's `samples` of a step."""
        if not samples:
            return
        first, count = samples[0], len(samples)
        if samples == tuple(range(first, first + count * self._ranks, self._ranks)):
            self._write(READ, step, first, count)
        else:  # what should not be is written down as it is
            for sample in samples:
                self._write(READ, step, sample, 1)

    def passed_over(self, kind: int, step: int, first: int, end: int) -> None:
        """Samples `first` to `end - 1` are not read: `SKIPPED` by this step, or the run `WENT_BACK` to it."""
        self._write(kind, step, first, end - first)

    def sync(self) -> None:
        """Return once all of it is on stable storage."""
        self._file.sync()

    def close(self) -> None:
        self._file.close()

    def _write(self, kind: int, step: int, first: int, count: int) -> None:
        place = (self._begun, self._start, self._rank, self._ranks, self._turn, kind)
        self._file.write(_FIELDS.pack(first, count, step, *place))


class NoLog:
    """In place of a `ReadLog`, where nothing is to be written: on all but one of the ranks with the same samples."""

    def begin(self, after_step: int) -> None: ...

    def read(self, step: int, samples: Sequence[int]) -> None: ...

    def passed_over(self, kind: int, step: int, first: int, end: int) -> None: ...

    def sync(self) -> None: ...


NO_LOG = NoLog()


def log_path(run: Path, rank: int) -> Path:
    """The file of a data rank."""
    return run / FOLDER / f"rank-{rank:05d}.bin"


def read_records(run: Path) -> Records:
    """All whole records of a run, in no order across ranks. Raises `DataError`; also where there are none."""
    parts = []
    for path in sorted((run / FOLDER).glob("rank-*.bin")):
        try:
            data = read_file(path)
        except OSError as error:
            raise DataError(f"cannot read {path}: {cause(error, path)}.") from error
        # A kill can cut the last one in two; and where power was lost, zeros can stand for what had not been synced.
        records = np.frombuffer(data[: len(data) - len(data) % RECORD.itemsize], RECORD)
        records = records[records["start"] > 0]
        strange = np.flatnonzero(
            (records["kind"] < READ) | (records["kind"] > WENT_BACK) | (records["ranks"] == 0)
            | (records["count"] < 0) | ((records["kind"] == READ) & (records["count"] > _MOST_AT_ONCE))
            | (records["first"] < 0) | (records["first"] >= 2**62)
        )  # fmt: skip
        if strange.size:
            raise DataError(f"{path}: {records[strange[0]]}: damaged, or written by a newer titanlite.")
        parts.append(records)
    if not sum(map(len, parts)):
        raise DataError(
            f"{run} has no record of the samples that were read: {run / FOLDER} is empty or not there. Runs of older "
            "versions of titanlite left none."
        )
    return np.concatenate(parts)


def last_start(run: Path) -> int:
    """The last start of the run that any rank wrote down; 0 for none. Raises `UsageError`."""
    last = 0
    for path in (run / FOLDER).glob("rank-*.bin"):
        try:
            whole = path.stat().st_size // RECORD.itemsize
            if whole:
                with open(open_file(path), "rb") as file:
                    record = np.fromfile(file, RECORD, 1, offset=(whole - 1) * RECORD.itemsize)
                start = int(record["start"][0])
                if start >= MAX_STARTS:
                    raise DataError(f"{path} is damaged: its last record is of start {start}. Move it away to go on.")
                last = max(last, start)
        except OSError as error:
            raise UsageError(f"cannot read {path}: {cause(error, path)}.") from error
    return last


def _cut_to_whole_records(path: Path) -> None:
    """Drop half a record at the end, so that what follows is not read askew."""
    if path.exists() and (odd := path.stat().st_size % RECORD.itemsize):
        with open(open_file(path, os.O_RDWR), "r+b") as file:
            file.truncate(path.stat().st_size - odd)
