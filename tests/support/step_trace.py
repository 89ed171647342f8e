"""Which files of titanlite the steps of a run enter, by what Python calls in the trainer's thread."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import titanlite
from titanlite.training.feed import Feed
from titanlite.training.trainer import Trainer

_PACKAGE = Path(titanlite.__file__).parent


class StepTrace:
    """Files by their paths in the package, for each step, from one request for a batch to the next."""

    def __init__(self) -> None:
        self.entered: list[set[str]] = []
        self.reading: list[set[str]] = []  # those that are entered only while the loader makes the batch
        self._current = set[str]()

    def note(self, frame: FrameType, event: str, argument: Any) -> None:
        """What Python calls on each call and return."""
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(_PACKAGE):
            self._current.add(file.relative_to(_PACKAGE).as_posix())

    def begin(self) -> None:
        """A step begins, and the one before ends."""
        self.entered.append(set())
        self.reading.append(set())
        self._current = self.entered[-1]

    def read(self, batches: Iterator[Any]) -> Any:
        """The next of the loader's batches."""
        self._current = self.reading[-1]
        try:
            return next(batches)
        finally:
            self._current = self.entered[-1]


class _Traced:
    """A loader that tells the trace when it is at work."""

    def __init__(self, trace: StepTrace, batches: Iterator[Any]) -> None:
        self._trace, self._batches = trace, batches

    def __next__(self) -> Any:
        return self._trace.read(self._batches)


@contextmanager
def traced_steps() -> Iterator[StepTrace]:
    """Trace every step of the runs in this context."""
    trace, take, next_batch = StepTrace(), Trainer._take_steps, Feed._next

    def begin(feed: Feed) -> Any:
        if not isinstance(feed._loader, _Traced):
            feed._loader = _Traced(trace, feed._loader)  # type: ignore[assignment]
        trace.begin()
        return next_batch(feed)

    def traced(*arguments: Any) -> None:
        sys.setprofile(trace.note)
        try:
            take(*arguments)
        finally:
            sys.setprofile(None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Feed, "_next", begin)
        patch.setattr(Trainer, "_take_steps", traced)
        yield trace
