"""Everything that a run logs: rows to every sink and console, messages to consoles; other ranks than 0 have neither."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from titanlite.errors import UsageError
from titanlite.observe.console import PlainConsole
from titanlite.observe.jsonl import Row
from titanlite.plan.sinks import SINKS
from titanlite.recipe.sections import Recipe

_RECORD = "jsonl"  # the sink that a run does not go on without


class Sink(Protocol):
    """Takes rows, in the order of their steps. One that raises gets no more of them, and the run goes on."""

    def write(self, row: Row) -> None: ...

    def rewind(self, after_step: int) -> None:
        """The run goes on from `after_step`: the rows of later steps will come again."""

    def sync(self) -> None:
        """Return once the rows so far are on stable storage."""

    def close(self) -> None: ...


class RunLogger:
    """Passes rows and messages on; closes what it passes them to."""

    def __init__(self) -> None:
        self.consoles: list[PlainConsole] = []
        self.sinks: dict[str, Sink] = {}
        self._step = 0  # that of the last row

    def open_sinks(self, recipe: Recipe, folder: Path, after_step: int) -> None:
        """Open the record and the recipe's sinks, for rows of steps after `after_step`. Raises their `UsageError`."""
        self._step = after_step
        asked = (_RECORD, *(["tensorboard"] if recipe.metrics.tensorboard else []), *recipe.metrics.sinks)
        for name in dict.fromkeys(asked):
            try:
                self.sinks[name] = SINKS.get(name)(recipe, folder, after_step, self.info)
            except UsageError:
                raise
            except Exception as error:
                self._drop(name, error)

    def write(self, row: Row) -> None:
        """A metrics, validation or event row."""
        self._step = row["step"]
        self._each_sink(lambda sink: sink.write(row))
        for console in self.consoles:
            console.write(row)

    def event(self, step: int, event: str, detail: str, values: Mapping[str, Any] | None = None) -> None:
        """What happened after `step` steps. `values`, finite, are for machines what `detail` is for people."""
        row = {"step": step, "event": event, "detail": detail}
        self.write(row if values is None else {**row, "values": dict(values)})

    def rewind(self, after_step: int) -> None:
        """The run went back to `after_step`: the sinks drop the rows of later steps, as when a run is resumed."""
        self._each_sink(lambda sink: sink.rewind(after_step))

    def info(self, text: str) -> None:
        """A message for the reader, not for the metrics."""
        for console in self.consoles:
            console.message(text)

    def sync(self) -> None:
        """Return once the sinks' rows so far are on stable storage."""
        self._each_sink(lambda sink: sink.sync())

    def close(self) -> None:
        """Close every sink, then the consoles, which may have something to show about that."""
        self._each_sink(lambda sink: sink.close())
        for console in self.consoles:
            console.close()

    def _each_sink(self, call: Callable[[Sink], None]) -> None:
        for name, sink in reversed(self.sinks.copy().items()):  # the record last: it has what became of the others
            try:
                if name in self.sinks:
                    call(sink)
            except Exception as error:
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        """Report what a sink has raised, and use it no more: a server that is gone ends no run."""
        if name == _RECORD:
            raise error
        self.sinks.pop(name, None)
        detail = f"the metrics sink '{name}' gets no more rows: {type(error).__name__}: {error}"
        self.event(self._step, "sink_failed", detail)
