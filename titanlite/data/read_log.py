"""Which samples each step read, as the ranks write it down, 40 bytes for each stretch of steps; and the audit of that:
whether the samples are all there, once each. No torch.

`RUN/logs/samples/rank-00007.bin` is what data rank 7 read, in every start of the run. It only grows: a record counts if
no later stretch, of a restart or a rollback, went on from a step before its own. The first step of a stretch is written
at once, so that every start leaves a record; those after it when the stretch ends, and before anything shows that they
were taken: a row of metrics, a checkpoint, a snapshot.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    """Writes the records of the data rank that `plan` is for; nothing without a path: on all but one of the ranks with
    the same samples. Nothing waits for the disk but `sync`. Raises `UsageError`.
    """

    def __init__(self, path: Path | None, plan: BatchPlan, start: int, warn: Callable[[str], None]) -> None:
        self._plan, self._start = plan, start
        self._turn = self._begun = 0
        self._next = (0, 0)  # the step that would go on with the stretch, and the rank's first sample then
        self._unwritten = 0  # steps up to there that have no record yet
        self.pending: list[tuple[int, Sequence[int]]] = []  # steps for `flush` to `read`, with the rank's samples
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
                self.write(READ, step, each[0], len(each))  # what should not be is written down as it is
        self._next = step + 1, first + self._plan.global_batch

    def flush(self) -> None:
        """Have a record of every step that was read."""
        pending, self.pending = self.pending, []
        for step, samples in pending:
            self.read(step, samples)
        if steps := self._unwritten:
            batch = self._plan.global_batch
            self.write(READ_STEPS, self._next[0] - steps, self._next[1] - steps * batch, steps << 32 | batch)
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

    def write(self, kind: int, step: int, first: int, count: int) -> None:
        """Add a record: for others, of samples not read, `SKIPPED` by this step or for the run `WENT_BACK` to it."""
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


REORDERED = "reordered"  # value of a checkpoint: steps, spaces between, the first ones in another order of samples

Span = tuple[int, int]  # first and last sample, or step


@dataclass(frozen=True)
class Audit:
    steps: int  # the steps of the history that have a record
    samples: int
    lost: tuple[Span, ...]  # samples that no step read
    repeated: tuple[Span, ...]  # samples that were read again, a span for each time
    in_order: bool  # whether each step read samples later than those of the step before
    unrecorded: tuple[Span, ...]  # steps without a record
    skipped: tuple[dict[str, Any], ...]  # passed over: `step`, `by` (data.skip_steps or rollback), `samples`, a span
    reordered: tuple[int, ...]  # of `REORDERED`: some texts may then be read twice, others never; no number shows that
    digest: str
    """BLAKE2b (128 bits) of the numbers of the samples, 8 bytes each, little-endian, in the order of the steps and
    ascending within a step: equal for runs that read the same in the same steps, on whatever layouts."""
    restarts: int  # starts of the run after the first that read anything
    layouts: tuple[dict[str, Any], ...]  # data ranks by steps: `steps`, a span, and `data_ranks`

    @property
    def whole(self) -> bool:
        """Whether every sample was read in its turn, and once."""
        return not (self.lost or self.repeated or self.unrecorded or self.reordered) and self.in_order


def reordered_steps(values: Mapping[str, Any]) -> list[int]:
    return [int(step) for step in re.findall(r"\b[0-9]{1,18}\b", str(values.get(REORDERED, "")))]


def history(records: Records, last_step: int | None = None) -> Records:
    """The records that count in the history that leads to `last_step` (None: to the last that was taken), by steps."""
    _, first, inverse = np.unique(_number_stretches(records), return_index=True, return_inverse=True)
    later = np.append(records["begun"][first[1:]], np.iinfo(np.uint32).max if last_step is None else last_step)
    limits = np.minimum.accumulate(later[::-1])[::-1]  # [stretches]: no later one went on from an earlier step
    kept = records[records["step"] <= limits[inverse.reshape(-1)]]
    return kept[np.lexsort((kept["first"], kept["step"]))]


def _number_stretches(records: Records) -> npt.NDArray[np.int64]:
    """A number for the stretch of each record; later ones have larger numbers."""
    numbers: npt.NDArray[np.int64] = records["start"].astype(np.int64) << 16 | records["turn"]
    return numbers


def steps_read(records: Records) -> Iterator[tuple[int, Records]]:
    """Each step with what its ranks read; `records` of a `history`."""
    reads = records[records["kind"] == READ]
    steps, begins = np.unique(reads["step"], return_index=True)
    for step, part in zip(steps, np.split(reads, begins[1:]), strict=True) if len(steps) else ():
        yield int(step), part


def samples_of(records: Records) -> npt.NDArray[np.int64]:
    """The samples of a step, ascending."""
    counts = records["count"]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    samples = np.repeat(records["first"], counts) + within * np.repeat(records["ranks"], counts)
    return np.sort(samples.astype("<i8"), kind="stable")


def audit(
    records: Records, last_step: int, end: int, begins_elsewhere: bool = False, reordered: Sequence[int] = ()
) -> Audit:
    """Follow the history to `last_step`, by whose state the samples before `end` are read or passed over. A run that
    `begins_elsewhere` may have begun with another's state; it has if its first records go on from a later step than 0.
    """
    kept = history(records, last_step)
    digest = hashlib.blake2b(digest_size=16)
    spans: list[Span] = []
    layouts: list[dict[str, Any]] = []
    steps: list[int] = []
    in_order = True
    for step, part in steps_read(kept):
        samples = samples_of(part)
        digest.update(samples.data)
        in_order = in_order and (not spans or int(samples[0]) > spans[-1][1])
        runs = np.split(samples, np.flatnonzero(np.diff(samples) != 1) + 1)  # a sample that is there twice parts two
        spans += [(int(run[0]), int(run[-1])) for run in runs]
        steps.append(step)
        ranks = int(part["ranks"][0])
        begun = layouts.pop()["steps"][0] if layouts and layouts[-1]["data_ranks"] == ranks else step
        layouts.append({"steps": (begun, step), "data_ranks": ranks})
    first_step, first = 1, 0
    if begins_elsewhere and len(records) and records["begun"][_number_stretches(records).argmin()]:
        first_step, first = min(steps, default=last_step + 1), min(spans, default=(end, end))[0]
    gaps, repeated = _gaps_and_repeats(spans, first, end)
    skipped, lost = _explain_gaps(gaps, kept[kept["kind"] != READ])
    unrecorded, _ = _gaps_and_repeats([(step, step) for step in steps], first_step, last_step + 1)
    return Audit(
        steps=len(steps),
        samples=sum(high - low + 1 for low, high in spans),
        lost=tuple(lost),
        repeated=tuple(repeated),
        in_order=in_order,
        unrecorded=tuple(unrecorded),
        skipped=tuple(skipped),
        reordered=tuple(reordered),
        digest=digest.hexdigest(),
        restarts=max(0, len(np.unique(records["start"][records["kind"] == READ])) - 1),
        layouts=tuple(layouts),
    )


def _gaps_and_repeats(spans: Sequence[Span], first: int, end: int) -> tuple[list[Span], list[Span]]:
    """Of the numbers from `first` to `end - 1`, those that are in no span; and what is there once more, or lies beyond:
    whoever goes on from there will read it again.
    """
    gaps, repeated = list[Span](), list[Span]()
    for low, high in [*sorted(spans), (end, sys.maxsize)]:
        if low > first:
            gaps.append((first, low - 1))
        elif low < first:
            repeated.append((low, min(high, first - 1)))
        first = max(first, high + 1)
    return gaps, repeated


def _explain_gaps(gaps: Sequence[Span], passed: Records) -> tuple[list[dict[str, Any]], list[Span]]:
    """What of the gaps was passed over on purpose, and what was not. All ranks have the same records of the first."""
    skipped: list[dict[str, Any]] = []
    lost = list(gaps)
    fields = ("first", "count", "step", "kind")
    for first, count, step, kind in sorted({tuple(int(each[name]) for name in fields) for each in passed}):
        last, by = first + count - 1, "data.skip_steps" if kind == SKIPPED else "rollback"
        inside = [(max(low, first), min(high, last)) for low, high in lost]
        skipped += [{"step": step, "by": by, "samples": span} for span in inside if span[0] <= span[1]]
        around = [span for low, high in lost for span in ((low, min(high, first - 1)), (max(low, last + 1), high))]
        lost = [span for span in around if span[0] <= span[1]]
    return skipped, lost
