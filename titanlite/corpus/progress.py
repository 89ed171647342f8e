"""How far `titanlite data prepare` is: a line that moves on a terminal, a plain one now and then elsewhere."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import IO, Any

from titanlite.text import format_bytes

PLAIN_SECONDS = 15.0
"""Between two plain lines."""


class Progress:
    """Counts bytes of text that are done. Use by `with`; falls silent when nobody reads any more."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._bar: Any = None
        self._task: Any = None
        self._what = ""
        self._total = self._done = self._at_start = 0
        self._begun = self._told = time.monotonic()

    def __enter__(self) -> Progress:
        if self._stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb"):
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}", markup=False), BarColumn(bar_width=24),
                TextColumn("{task.percentage:.0f} %"), TextColumn("{task.fields[speed]}"), TimeRemainingColumn(),
            )  # fmt: skip
            self._bar = Bar(*columns, console=Console(file=self._stream, force_terminal=True), auto_refresh=False)
            self._task = self._bar.add_task("looking", total=None, speed="")
            with suppress(OSError):
                self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()

    def begin(self, what: str, total: int, done: int) -> None:
        """What is being done, to so many bytes; so many of them were done by an earlier start."""
        self._what, self._total, self._done, self._at_start = what, total, done, done
        self._begun = self._told = time.monotonic()
        if done:
            self.message(f"going on: {format_bytes(done)} of {format_bytes(total)} are done")
        self.advance(0)

    def advance(self, count: int) -> None:
        """So many bytes more are done."""
        self._done += count
        now = time.monotonic()
        speed = f"{format_bytes((self._done - self._at_start) / max(now - self._begun, 1e-3))}/s"
        if self._bar is not None:
            with suppress(OSError):
                self._bar.update(
                    self._task,
                    description=self._what,
                    total=self._total,
                    completed=self._done,
                    speed=speed,
                    refresh=True,
                )
        elif now - self._told >= PLAIN_SECONDS:
            self._told = now
            self.message(f"{self._what}: {format_bytes(self._done)} of {format_bytes(self._total)}, {speed}")

    def message(self, text: str) -> None:
        """A line for the reader."""
        with suppress(OSError):
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=self._stream, flush=True)
