"""Everything a run says, in one place: rows to every sink and console, messages to the consoles.

On ranks other than the first a journal has neither, and says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titanlite.observe.console import PlainConsole, TerminalConsole
from titanlite.observe.rows import Row, event_row
from titanlite.observe.sinks import Sink


class Journal:
    """Passes on what it is told; closes what it passes it to."""

    def __init__(self) -> None:
        self._consoles: list[PlainConsole | TerminalConsole] = []
        self._sinks: list[Sink] = []

    def add_console(self, console: PlainConsole | TerminalConsole) -> None:
        """Rows and messages go to `console` too from now on."""
        self._consoles.append(console)

    def add(self, sink: Sink) -> None:
        """Rows go to `sink` too from now on."""
        self._sinks.append(sink)

    def write(self, row: Row) -> None:
        """A metrics, validation or event row."""
        for sink in (*self._sinks, *self._consoles):
            sink.write(row)

    def event(self, step: int, event: str, detail: str, values: Mapping[str, Any] | None = None) -> None:
        """Something that happened after `step` steps and that nobody should have to guess later; see `event_row`."""
        self.write(event_row(step, event, detail, values))

    def rewind(self, after_step: int) -> None:
        """The run went back to `after_step`: the sinks drop the rows of later steps, as when a run is resumed."""
        for sink in self._sinks:
            sink.rewind(after_step)

    def say(self, text: str) -> None:
        """A message for the reader, not for the metrics."""
        for console in self._consoles:
            console.message(text)

    def sync(self) -> None:
        """Return once the sinks' rows so far are on stable storage."""
        for sink in self._sinks:
            sink.sync()

    def close(self) -> None:
        """Close every sink, then the consoles, which may have something to say about that."""
        for sink in (*self._sinks, *self._consoles):
            sink.close()
