"""Saves that go on beside training, one at a time: their thread, and how they ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from titanlite.errors import CheckpointError

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Saved:
    """How a save ended; the same on all ranks."""

    step: int
    error: CheckpointError | None
    """Why there is nothing of this step; None: it is committed."""
    blocked_seconds: float
    """How long training stood still for it."""
    seconds: float
    """From its beginning to its end."""


class Writing:
    """A save on its way, in a thread of its own or, in the foreground, over and done with."""

    def __init__(self, step: int, write: Callable[[Warn], None], began: float, background: bool) -> None:
        """`began`: the monotonic time from which training stands still for it."""
        self.warnings: list[str] = []
        self.step = step
        self._write = write
        self._began = began
        self._error: Exception | None = None
        # A daemon: after an error that only this rank met, the save would wait for ranks that are gone. The watchdog
        # finds the thread by its name.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True) if background else None
        if self._thread is None:
            self._run()
        else:
            self._thread.start()
        self._blocked_seconds = time.monotonic() - began

    def goes_on(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def join(self, seconds: float | None = None) -> None:
        """Wait until it has ended, or for so long."""
        if self._thread is not None:
            self._thread.join(seconds)

    def result(self) -> Saved:
        """Raises what was no matter of disks."""
        if self._error is not None and not isinstance(self._error, CheckpointError):
            raise self._error
        return Saved(self.step, self._error, self._blocked_seconds, self._ended - self._began)

    def _run(self) -> None:
        try:
            self._write(self.warnings.append)
        except Exception as error:  # for the thread that asks for the result
            self._error = error
        self._ended = time.monotonic()


class Writings:
    """The saves of one kind, one after the other."""

    def __init__(self, warn: Warn, background: bool) -> None:
        """`warn` gets what a save warned of, in the thread that asks how it went."""
        self._warn = warn
        self._background = background
        self._last: Writing | None = None

    def begin(self, step: int, write: Callable[[Warn], None], began: float) -> None:
        """Have `write` run; the save before must have ended, and have been told of. `began`: see `Writing`."""
        self.require_none()
        self._last = Writing(step, write, began, self._background)

    def require_none(self) -> None:
        """Where a save's memory is about to be used again."""
        assert self._last is None, "a save that was begun must be waited for, or have ended"

    def ended(self) -> Saved | None:
        """How the last one went; None if there is none, or it goes on. Told once, here or by `wait`."""
        last = self._last
        if last is None or last.goes_on():
            return None
        self._last = None
        saved = last.result()
        for text in last.warnings:
            self._warn(text)
        return saved

    def wait(self) -> Saved | None:
        """As `ended`, once it has ended."""
        self.join()
        return self.ended()

    def join(self, seconds: float | None = None) -> None:
        """Wait until it has ended, or for so long, without asking how it went."""
        if self._last is not None:
            self._last.join(seconds)
