"""What the person at the keyboard, or the log of a job, sees of a run: the rows that the sinks take, and messages."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import IO

from titanlite.files import APPEND, open_file, wrap_os_errors
from titanlite.observe.jsonl import Row
from titanlite.text import format_count


def open_console(stream: IO[str], total_steps: int, title: str) -> PlainConsole:
    """The console that suits `stream`: a progress line if it is a terminal that can move its cursor."""
    if stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb"):
        return TerminalConsole(stream, total_steps, title)
    return PlainConsole(stream, total_steps)


class PlainConsole:
    """One line a row, in fixed columns, flushed. Stops printing, without an error, once its reader is gone (EPIPE)."""

    def __init__(self, stream: IO[str], total_steps: int) -> None:
        self._stream = stream
        self._total_steps = total_steps
        self._seconds: deque[float] = deque(maxlen=50)  # what steps took: their median, for one may compile or wait
        self._gone = False

    def write(self, row: Row) -> None:
        if "step_seconds" in row:
            self._seconds.append(row["step_seconds"])
        self._show(row, median(self._seconds) if self._seconds else None)

    def _show(self, row: Row, pace: float | None) -> None:
        self.message(describe_row(row, self._total_steps, pace))

    def message(self, text: str) -> None:
        """A line, or several, for the reader."""
        self._draw(lambda: print(text, file=self._stream, flush=True))

    def close(self) -> None:
        """Nothing to put back: the stream is the caller's."""

    def _draw(self, draw: Callable[[], object]) -> None:
        """Draw, unless the reader has gone (`train | head`, a full disk, a closed terminal): the run is worth more."""
        if self._gone:
            return
        try:
            draw()
        except OSError:
            self._gone = True
            with suppress(OSError):  # what the stream still holds goes nowhere, so that flushing it at the end succeeds
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


class LogFile(PlainConsole):
    """The plain lines in a file of the run folder, where a run on a terminal leaves them too; appended to."""

    def __init__(self, path: Path, total_steps: int) -> None:
        """Raises `UsageError` if the file cannot be written."""
        with wrap_os_errors(f"cannot write {path}", path):
            file = open(open_file(path, APPEND), "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 - see `close`
        super().__init__(file, total_steps)

    def close(self) -> None:
        """Close the file, whether the disk takes its last line or not."""
        self._gone = True
        with suppress(OSError):
            self._stream.close()


class TerminalConsole(PlainConsole):
    """A progress line by rich, redrawn with each metrics row; other rows and messages scroll by above it."""

    def __init__(self, stream: IO[str], total_steps: int, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        super().__init__(stream, total_steps)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
        )
        # Redrawn by rows alone: a refreshing thread would take the interpreter from the trainer ten times a second.
        self._progress = Progress(*columns, console=Console(file=stream, force_terminal=True), auto_refresh=False)
        self._task = self._progress.add_task(title, total=total_steps, facts="starting")
        self._progress.start()
        self._progress.console.show_cursor(True)  # rich hides it, and a killed run could not give it back

    def _show(self, row: Row, pace: float | None) -> None:
        if "loss" not in row:
            super()._show(row, pace)
            return
        shown = [fact for fact in _facts(row, self._total_steps, pace) if fact[0] in _ON_THE_LINE]
        facts = "  ".join(map(" ".join, shown))
        self._draw(lambda: self._progress.update(self._task, completed=row["step"], facts=facts, refresh=True))

    def message(self, text: str) -> None:
        """A line, or several, above the progress line."""
        self._draw(lambda: self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True))

    def close(self) -> None:
        """Leave the last state of the line, and give the terminal back."""
        self._draw(self._progress.stop)


_LONGEST_SECONDS = 10**13  # more than any run, and less than `timedelta` can hold
_ON_THE_LINE = ("loss", "tokens/s", "mfu", "eta")
_WIDTHS = {"loss": 7, "norm": 8, "lr": 9, "tokens/s": 8, "mfu": 6, "s/step": 7, "data wait": 7, "mem": 9}


def describe_row(row: Row, total_steps: int, pace: float | None = None) -> str:
    """A row as one line, in columns. `pace`: seconds that each step to come will take; the row's own if not given."""
    step = f"step {row['step']:>{len(str(total_steps))}}/{total_steps}"
    if "event" in row:
        return f"{step}  {row['event']}: {row['detail']}"
    if "validation_loss" in row:
        of = f" ({row['set']})" if "set" in row else ""
        return f"{step}  validation loss{of} {row['validation_loss']:.4f}  bits per byte {row['bits_per_byte']:.4f}"
    facts = (f"{name} {text:>{_WIDTHS.get(name, 0)}}" for name, text in _facts(row, total_steps, pace))
    return "  ".join([step, *facts])


def _facts(row: Row, total_steps: int, pace: float | None) -> list[tuple[str, str]]:
    """(name, text) of each quantity of a metrics row, in the order they are shown; MFU only where it is known."""
    left = timedelta(seconds=min(round((total_steps - row["step"]) * (pace or row["step_seconds"])), _LONGEST_SECONDS))
    facts = [
        ("loss", f"{row['loss']:.4f}"),
        ("norm", f"{row['grad_norm']:.3f}"),
        ("lr", f"{row['lr']:.2e}"),
        ("tokens/s", format_count(round(row["tokens_per_second"]))),
        ("mfu", "" if row["mfu"] is None else f"{row['mfu']:.1%}"),
        ("s/step", f"{row['step_seconds']:.3f}"),
        ("data wait", f"{row['data_wait_seconds']:.3f} s"),
        ("mem", f"{row['memory_peak_gib']:.2f} GiB"),
        ("eta", str(left)),
    ]
    return [(name, text) for name, text in facts if text]
