"""The table of a run's ranks: which step and phase each is in, who holds up the run, and who slows it down. No torch.

Also where a thread is, seen from another one: whether it waits for other ranks, and in whose function. A look costs
some microseconds. It sees the host's side alone: work queued on a GPU goes unseen, and what a compiled region waits for
counts as work.
"""

from __future__ import annotations

import sys
import sysconfig
import threading
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import FrameType
from typing import NamedTuple

_STRAGGLES_FROM = 0.2  # share of its time that a straggler waits less than the others, who lose as much to it
LEFT = "left"  # phase of a rank that needs no watching any more


@dataclass(frozen=True)
class RankStatus:
    """One rank's row of the table."""

    rank: int
    host: str
    pid: int
    pid_namespace: str  # equal for processes that can signal each other by `pid`
    step: int = 0  # the last one that it finished
    phase: str = "starting"
    silent_seconds: float = 0.0  # since the last step or other sign of life of its trainer
    waits: bool = False  # whether its trainer waits for other ranks right now
    place: str = "?"  # `file:function` of titanlite or the user in which its trainer is
    waited: float | None = None  # share of the last window of training in which it waited so; None before the first
    busiest: str = ""  # where it was most often in that window while it did not wait, and for which share
    updates: int = 0  # goes up with every update of the row: a process that does not run makes none

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"

    @property
    def stage(self) -> str:
        """How far it has come."""
        return f"after step {self.step}, {self.phase}"

    @property
    def last_seen(self) -> str:
        verb = "waits for others" if self.waits else "is"
        return f"{self.stage} for {self.silent_seconds:.0f} s, {verb} in {self.place}"


@dataclass(frozen=True)
class HangReport:
    """Why the run stands still; the same on all ranks."""

    reason: str
    table: str
    rank: int  # one that holds up the run; if none stands out, any
    host: str  # that rank's
    to_signal: list[tuple[int, int]]  # (rank, pid): the rank signals the process, so that its stacks are written too

    @classmethod
    def of(cls, before: Sequence[RankStatus], after: Sequence[RankStatus]) -> HangReport:
        """What follows from two readings of the table: a rank that made no update between them does not run."""
        updates = {row.rank: row.updates for row in before}
        stopped = {row.rank for row in after if row.phase != LEFT and updates.get(row.rank) == row.updates}
        why, lagging = lagging_ranks(after, stopped)
        lines = [f"{row.name} holds up the run: it {why}; {row.last_seen}" for row in lagging]
        reason = "\n".join(lines) or "no rank stands out: all wait for each other (a lost message, unlike collectives)"
        blamed = lagging[0] if lagging else after[0]
        # Beside a process that does not run, the first rank that does signals it.
        runs = {row.pid_namespace: row.rank for row in reversed(after) if row.rank not in stopped}
        found = [row for row in after if row.rank in stopped and row.pid_namespace in runs]
        to_signal = [(runs[row.pid_namespace], row.pid) for row in found]
        table = "\n".join(f"  {row.name} {row.last_seen}" for row in after)
        return cls(reason, table, blamed.rank, blamed.host, to_signal)


def lagging_ranks(table: Sequence[RankStatus], stopped: Collection[int]) -> tuple[str, list[RankStatus]]:
    """The ranks that the others wait for, and the reason to think so; none where all wait for each other.

    These are those `stopped`, or else those that do not wait while others do, or else those with fewer steps.
    """
    furthest = max((row.step for row in table), default=0)
    busy = [row for row in table if not row.waits or len(table) == 1]
    if len(busy) == len(table) > 1:
        busy = []
    reasons = {
        "does not run at all (stopped, dead, or in a call that lets no other thread of the process run)": [
            row for row in table if row.rank in stopped
        ],
        "waits for no other rank": busy,
        "has finished fewer steps than others": [row for row in table if row.step < furthest],
    }
    return next(((why, found) for why, found in reasons.items() if found), ("", []))


def find_stragglers(table: Sequence[RankStatus]) -> dict[int, str]:
    """Ranks that waited a fifth of the last window less than the others' median, each with a sentence for the log."""
    waited = {row.rank: row.waited for row in table if row.waited is not None}
    above = sorted(waited.values())[len(waited) // 2 :][:2]  # the last is no less than the median without any row
    found = {}
    for row in table:
        if row.waited is None or above[-1] - row.waited < _STRAGGLES_FROM:
            continue  # of many thousand rows, few are compared with all others
        others = [share for rank, share in waited.items() if rank != row.rank]
        if others and median(others) - row.waited >= _STRAGGLES_FROM:
            found[row.rank] = (
                f"{row.name} slows the others down: it waited {row.waited:.0%} of the time, they {median(others):.0%}; "
                f"it spent {row.busiest}"
            )
    return found


# ---- where a thread is -----------------------------------------------------------------------------------------------

_PACKAGE = str(Path(__file__).parents[1])
_LIBRARIES = ("<frozen", *{sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_DISPATCH = ("/torch/_ops.py", "/torch/utils/_contextlib.py", "/torch/_library/", "/torch/distributed/tensor/")
"""Files of torch whose frames say nothing: what they do, they do for the caller."""
_JOINS = ("join", "_wait_for_tstate_lock")
"""Functions of `threading` in which a thread waits for another one to end; the second before Python 3.13."""
_SAVING_THREAD = "checkpoint"  # name of the thread in which `checkpoint/save.py` saves


class Location(NamedTuple):
    """Where a thread is."""

    waits: bool  # for other ranks
    place: str  # innermost `folder/file:function` of titanlite or the user


def locate(frame: FrameType | None) -> Location:
    """Where a thread with this innermost frame is. It waits inside of torch.distributed, and in functions that call a
    `wait` or `wait_tensor`: those of ours do little else.
    """
    while frame is not None and any(part in frame.f_code.co_filename for part in _DISPATCH):
        frame = frame.f_back
    waits = frame is not None and (
        "/torch/distributed/" in frame.f_code.co_filename
        or not {"wait", "wait_tensor"}.isdisjoint(frame.f_code.co_names)
    )
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        if frame.f_code.co_filename.startswith(_PACKAGE):  # installed among them
            break
        frame = frame.f_back
    if frame is None:
        return Location(waits, "?")
    return Location(waits, f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_code.co_name}")


def look_at(thread: int) -> Location:
    """Where the thread with this identifier is now; while it waits for a save to end, where that is."""
    frames = sys._current_frames()
    # This function's own, which holds the others: a cycle that would keep all that they hold, activations too.
    frames.pop(threading.get_ident(), None)
    frame = frames.get(thread)
    if frame is not None and frame.f_code.co_filename == threading.__file__ and frame.f_code.co_name in _JOINS:
        saving = (each.ident for each in threading.enumerate() if each.name == _SAVING_THREAD)
        frame = next((frames[ident] for ident in saving if ident in frames), frame)
    return locate(frame)


def summarize(looks: Counter[Location]) -> tuple[float, str]:
    """The share of `looks` at a thread that saw it wait, and where it was most often in the others."""
    busy = [(count / looks.total(), seen.place) for seen, count in looks.most_common() if not seen.waits]
    share, place = busy[0] if busy else (0.0, "?")
    return 1 - sum(share for share, _ in busy), f"{share:.0%} in {place}"
