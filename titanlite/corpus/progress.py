"""How far the making of token files is: a line that moves on a terminal, a plain one now and then elsewhere."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import IO

from titanlite.text import format_bytes

PLAIN_SECONDS = 15.0
"""Between two plain lines."""
MOVING_SECONDS = 0.2


class Progress:
    """Counts bytes of text that are done. Used by `with`; stops printing when the stream is closed."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._moves = stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")
        self._what = ""
        self._total = self._done = self._at_start = 0
        self._begun = self._printed = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._print("", "\r")

    def begin(self, what: str, total: int, done: int) -> None:
        """`what` is being done to `total` bytes; `done` of them were done by an earlier start."""
        self._what, self._total, self._done, self._at_start = what, total, done, done
        self._begun = self._printed = time.monotonic()
        if done:
            self.message(f"going on: {format_bytes(done)} of {format_bytes(total)} are done")

    def advance(self, count: int) -> None:
        """`count` bytes more are done."""
        self._done += count
        now = time.monotonic()
        if now - self._printed < (MOVING_SECONDS if self._moves else PLAIN_SECONDS):
            return
        self._printed = now
        speed = (self._done - self._at_start) / max(now - self._begun, 1e-3)
        left = (self._total - self._done) / max(speed, 1.0)
        line = (
            f"{self._what}: {format_bytes(self._done)} of {format_bytes(self._total)}, "
            f"{100 * self._done / max(self._total, 1):.0f} %, {format_bytes(speed)}/s, {left / 60:.0f} min left"
        )
        self._print(line, "\r" if self._moves else "\n")

    def message(self, text: str) -> None:
        """A line for the reader."""
        self._print(text, "\n")

    def _print(self, text: str, end: str) -> None:
        with suppress(OSError):  # the reader has closed the stream
            if self._moves:
                print(end="\x1b[2K", file=self._stream)  # clears the line that moves
            if text or self._moves:
                print(text, end=end, file=self._stream, flush=True)
