"""Where a thread is, seen from another one: whether it waits for other ranks, and in whose function. No torch.

A thread that joins another is where that one is: it is held up by whatever holds up the other. A look costs some
microseconds, of which the thread looked at notices next to nothing. It sees the host's side alone: work that was queued
on a GPU goes on unseen, and what a compiled region waits for counts as work.
"""

from __future__ import annotations

import dis
import sys
import sysconfig
from collections import Counter
from functools import lru_cache
from pathlib import Path
from threading import Thread, get_ident
from types import CodeType, FrameType
from typing import NamedTuple

from titanlite.resilience.progress import Shares

_PACKAGE = str(Path(__file__).parents[1])
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_PASSES_ON = ("/torch/_ops.py", "/torch/utils/_contextlib.py", "/torch/_library/", "/torch/distributed/tensor/")
"""Files of torch whose frames say nothing: what they do, they do for the caller."""
_WAITS = ("wait", "wait_tensor")


class Where(NamedTuple):
    """Where a thread is."""

    waits: bool
    """For other ranks."""
    place: str
    """Innermost `file:function` of titanlite or the user."""


def where(frame: FrameType | None) -> Where:
    """What a thread does whose innermost frame is `frame`."""
    while frame is not None and _is_any(frame.f_code.co_filename, _PASSES_ON):
        frame = frame.f_back
    waits = frame is not None and _waits(frame)
    while frame is not None and not _is_own(frame.f_code.co_filename):
        frame = frame.f_back
    return Where(waits, "?" if frame is None else _place(frame.f_code))


def _joined(frame: FrameType | None) -> Thread | None:
    """The thread that one with this innermost frame waits to see end; older Pythons wait in a function below `join`."""
    for caller in (frame, frame.f_back) if frame is not None else ():
        if caller is not None and caller.f_code is Thread.join.__code__:
            joined: Thread = caller.f_locals["self"]
            return joined
    return None


def _waits(frame: FrameType) -> bool:
    """Inside of torch.distributed, or on a line that calls something's `wait`."""
    return "/torch/distributed/" in frame.f_code.co_filename or frame.f_lineno in _waiting_lines(frame.f_code)


@lru_cache(maxsize=4096)
def _waiting_lines(code: CodeType) -> frozenset[int]:
    """From the bytecode: reading the source might block on the very disk that holds the run up."""
    calls = [step.offset for step in dis.get_instructions(code) if step.argval in _WAITS]
    return frozenset(
        line for start, end, line in code.co_lines() if line is not None and any(start <= at < end for at in calls)
    )


def _is_any(file: str, parts: tuple[str, ...]) -> bool:
    return any(part in file for part in parts)


def _is_own(file: str) -> bool:
    """Whether a file is titanlite's or the user's, and not one of Python's, torch's or another library's."""
    return file.startswith(_PACKAGE) or not file.startswith((*_INSTALLED, "<frozen"))


@lru_cache(maxsize=4096)
def _place(code: CodeType) -> str:
    path = Path(code.co_filename)
    name = path.relative_to(Path(_PACKAGE).parent) if path.is_relative_to(_PACKAGE) else path.name
    return f"{name}:{code.co_name}"


class Sampler:
    """Looks at one thread now and then, and counts where it was."""

    def __init__(self, thread: int) -> None:
        """`thread`: its identifier."""
        self._thread = thread
        self._places: Counter[Where] = Counter()
        self.looks = 0
        """Counted in the window so far."""

    def look(self) -> Where:
        """Where the thread is now, or the one that it waits to see end, such as that of a save."""
        frames = sys._current_frames()
        # This function's own, which holds the others: a cycle that would keep all that they hold, activations too.
        frames.pop(get_ident(), None)
        frame = frames.get(self._thread)
        while (joined := _joined(frame)) is not None and (inner := frames.pop(joined.ident or 0, None)) is not None:
            frame = inner
        return where(frame)

    def count(self, seen: Where) -> None:
        """Add to the window."""
        self._places[seen] += 1
        self.looks += 1

    def window(self) -> Shares:
        """The shares of what was counted in the window, which ends here."""
        total, self.looks = self.looks, 0
        busy = Counter({seen.place: times for seen, times in self._places.items() if not seen.waits})
        self._places.clear()
        place, times = busy.most_common(1)[0] if busy else ("?", 0)
        return Shares(1 - sum(busy.values()) / total, place, times / total)
