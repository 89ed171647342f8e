"""What a run read, out of its records: which of them count, and whether the samples are all there, once each. No torch.

A record counts if no later stretch of the run, a restart or a rollback, went on from a step before its own.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from titanlite.data.read_log import READ, SKIPPED, Records

REORDERED = "reordered"
"""The value of a checkpoint that lists, with spaces between, the steps of its history which were the first to read by
another order than the step before."""

Span = tuple[int, int]  # First and last sample, or step
Samples = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Audit:
    """What was found."""

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
    _, first, inverse = np.unique(_stretches(records), return_index=True, return_inverse=True)
    later = np.append(records["begun"][first[1:]], np.iinfo(np.uint32).max if last_step is None else last_step)
    limits = np.minimum.accumulate(later[::-1])[::-1]  # [stretches]: no later one went on from an earlier step
    kept = records[records["step"] <= limits[inverse.reshape(-1)]]
    return kept[np.lexsort((kept["first"], kept["step"]))]


def _stretches(records: Records) -> npt.NDArray[np.int64]:
    """A number for the stretch of each record; later ones have larger numbers."""
    numbers: npt.NDArray[np.int64] = records["start"].astype(np.int64) << 16 | records["turn"]
    return numbers


def steps_read(records: Records) -> Iterator[tuple[int, Records]]:
    """Each step with what its ranks read; `records` of a `history`."""
    reads = records[records["kind"] == READ]
    steps, begins = np.unique(reads["step"], return_index=True)
    for step, part in zip(steps, np.split(reads, begins[1:]), strict=True) if len(steps) else ():
        yield int(step), part


def samples_of(records: Records) -> Samples:
    """The samples of a step, ascending."""
    counts = records["count"]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    samples: Samples = np.repeat(records["first"], counts) + within * np.repeat(records["ranks"], counts)
    return np.sort(samples.astype("<i8"), kind="stable")


def audit(
    records: Records, last_step: int, end: int, begins_elsewhere: bool = False, reordered: Sequence[int] = ()
) -> Audit:
    """Follow the history to `last_step`, by whose state the samples before `end` are read or passed over.

    `begins_elsewhere`: the run may have begun with another's state; it has if its first records go on from a later step
    than 0.
    """
    names = _stretches(records)
    begins_elsewhere = begins_elsewhere and names.size > 0 and bool(records["begun"][names.argmin()])
    kept = history(records, last_step)
    digest = hashlib.blake2b(digest_size=16)
    spans: list[Span] = []
    layouts: list[dict[str, Any]] = []
    steps: list[int] = []
    count, last, in_order = 0, -1, True
    for step, part in steps_read(kept):
        samples = samples_of(part)
        digest.update(samples.data)
        count += len(samples)
        spans += _runs(samples)
        in_order = in_order and int(samples[0]) > last
        last = int(samples[-1])
        steps.append(step)
        ranks = int(part["ranks"][0])
        begun = layouts.pop()["steps"][0] if layouts and layouts[-1]["data_ranks"] == ranks else step
        layouts.append({"steps": (begun, step), "data_ranks": ranks})
    first_step, first = 1, 0
    if begins_elsewhere:
        first_step, first = min(steps, default=last_step + 1), min(spans, default=(end, end))[0]
    gaps, repeated = _gaps_and_repeats(spans, first, end)
    skipped, lost = _explain_gaps(gaps, kept[kept["kind"] != READ])
    unrecorded, _ = _gaps_and_repeats([(step, step) for step in steps], first_step, last_step + 1)
    return Audit(
        steps=len(steps),
        samples=count,
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


def _runs(samples: Samples) -> list[Span]:
    """Ascending samples as spans; one that is there twice ends a span and begins another."""
    parts = np.split(samples, np.flatnonzero(np.diff(samples) != 1) + 1)
    return [(int(part[0]), int(part[-1])) for part in parts]


def _gaps_and_repeats(spans: Sequence[Span], first: int, end: int) -> tuple[list[Span], list[Span]]:
    """Of the numbers from `first` to `end - 1`, those that are in no span; and what is there once more or lies beyond.

    What lies beyond the state's place in the order will be read again by whoever goes on from it.
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
