"""When a run saves beside its every so many steps: after so many minutes, and when a file asks for it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from titanlite.files import cause

SAVE_NOW = "save-now"  # the file in the run folder that asks for a checkpoint; deleted once it is committed
_LOOK_EVERY_SECONDS = 1.0  # a look at a shared file system may take a while; steps may be short
_RETRY_SECONDS = 30.0  # from a save that failed to the next: a full disk may have been cleared by then


class SaveRequests:
    """Asks once for each save that is due, and not again before it is known how it ended; on rank 0 alone.

    `file` asks for a save by being there; with `every_minutes` 0, the clock asks for none.
    """

    def __init__(self, file: Path, every_minutes: float, warn: Callable[[str], None], is_rank0: bool = True) -> None:
        self._file: Path | None = file
        self._limit_seconds = 60 * every_minutes or math.inf
        self._warn = warn
        self._is_rank0 = is_rank0
        self._saved_at = time.monotonic()
        self._retry_at = math.inf
        self._looked_at = -math.inf
        self._asked = self._asked_by_file = self._saves_for_file = False

    def due(self) -> bool:
        """Whether to ask for a checkpoint now."""
        if self._asked or not self._is_rank0:
            return False
        now = time.monotonic()
        if self._file is not None and now - self._looked_at >= _LOOK_EVERY_SECONDS:
            self._looked_at = now
            self._asked_by_file = os.path.exists(self._file)
        if math.isfinite(self._retry_at):  # whatever asked for the save that failed still does
            self._asked = now >= self._retry_at
        else:
            self._asked = self._asked_by_file or now - self._saved_at >= self._limit_seconds
        return self._asked

    def begun(self) -> None:
        """A save of the state of now was begun, for whatever reason: the clock begins anew."""
        self._saves_for_file = self._asked_by_file
        self._saved_at = time.monotonic()

    def failed(self) -> None:
        """A save came to nothing: ask for another one in a while."""
        self._asked = self._saves_for_file = False
        self._retry_at = time.monotonic() + _RETRY_SECONDS

    def saved(self) -> None:
        """The save that was begun last is committed: the file that had asked for it before goes."""
        if self._saves_for_file and self._file is not None:
            try:
                self._file.unlink(missing_ok=True)
            except OSError as error:
                self._warn(f"cannot delete {self._file}: {cause(error, self._file)}. It is not looked for any more.")
                self._file = None
        self._asked = self._asked_by_file = self._asked_by_file and not self._saves_for_file
        self._saves_for_file = False
        self._retry_at = math.inf
