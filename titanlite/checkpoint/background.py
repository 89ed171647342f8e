"""A save that goes on beside training: its thread, and how it ended."""

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
        # A daemon: after an error that only this rank met, the save would wait for ranks that are gone.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True) if background else None
        if self._thread is None:
            self._run()
        else:
            self._thread.start()
        self._blocked_seconds = time.monotonic() - began

    def goes_on(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

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
