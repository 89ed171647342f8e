"""Where a thread is, seen from another one: whether it waits for other ranks, and in whose function. No torch.

A look costs some microseconds. It sees the host's side alone: work queued on a GPU goes unseen, and what a compiled
region waits for counts as work.
"""

from __future__ import annotations

import sys
import sysconfig
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import NamedTuple

_PACKAGE = str(Path(__file__).parents[1])
_LIBRARIES = ("<frozen", *{sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_DISPATCH = ("/torch/_ops.py", "/torch/utils/_contextlib.py", "/torch/_library/", "/torch/distributed/tensor/")
"""Files of torch whose frames say nothing: what they do, they do for the caller."""
_JOINS = ("join", "_wait_for_tstate_lock")
"""Functions of `threading` in which a thread waits for another one to end; the second before Python 3.13."""
_SAVING_THREAD = "checkpoint"
"""Name of the thread in which `checkpoint/save.py` saves."""


class Location(NamedTuple):
    """Where a thread is."""

    waits: bool
    """For other ranks."""
    place: str
    """Innermost `folder/file:function` of titanlite or the user."""


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
    while frame is not None and not _is_own(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return Location(waits, "?")
    return Location(waits, f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_code.co_name}")


def _is_own(file: str) -> bool:
    """Whether it is titanlite's or the user's, and not one of Python's, torch's or another library's."""
    return file.startswith(_PACKAGE) or not file.startswith(_LIBRARIES)


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
