"""Everything a run says, in one place: rows to every sink (files and console), messages to the console.

On ranks other than the first a journal has no sinks, and says nothing.
"""

from __future__ import annotations

from titanlite.observe.console import PlainConsole, TerminalConsole
from titanlite.observe.rows import Row, event_row
from titanlite.observe.sinks import Sink


class Journal:
    """Hands each row to the console, if there is one, and to the sinks that were added."""

    def __init__(self, console: PlainConsole | TerminalConsole | None) -> None:
        self._console = console
        self._sinks: list[Sink] = [] if console is None else [console]

    def add(self, sink: Sink) -> None:
        """Rows go to `sink` too from now on; it is closed with the journal."""
        self._sinks.append(sink)

    def write(self, row: Row) -> None:
        """A metrics or validation row."""
        for sink in self._sinks:
            sink.write(row)

    def event(self, step: int, event: str, detail: str) -> None:
        """Something that happened after `step` steps and that nobody should have to guess later."""
        self.write(event_row(step, event, detail))

    def say(self, text: str) -> None:
        """A message for the reader, kept nowhere."""
        if self._console is not None:
            self._console.message(text)

    def close(self) -> None:
        """Close every sink, the console last."""
        for sink in reversed(self._sinks):
            sink.close()
