"""Rows of metrics, and `metrics.jsonl`: the record of a run's rows, always written. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from titanlite.files import Appender, cause, read_file, replace_file, wrap_os_errors
from titanlite.recipe.sections import Recipe

Row = dict[str, Any]  # begins with its step; of a metrics row, see `metrics.py`, of an event, `logger.py`


def validation_row(step: int, validation_loss: float, bits_per_byte: float, set_name: str | None = None) -> Row:
    """Row of a validation after `step` steps: mean loss in nats a token, bits a byte; of several sets, by name."""
    row = {"step": step, "validation_loss": validation_loss, "bits_per_byte": bits_per_byte}
    return row if set_name is None else {**row, "set": set_name}


def open_sink(recipe: Recipe, folder: Path, after_step: int, warn: Callable[[str], None]) -> JsonlSink:
    return JsonlSink(folder / "metrics.jsonl", after_step, warn)


class JsonlSink:
    """One JSON object a line, handed to the system at once, so that a kill loses no row.

    JSON has no NaN and no infinity: such a value is null, and `nonfinite` in the same row says which it was. Where a
    run goes on after `after_step`, rows of later steps are dropped, and half a last line; events stay, as history.
    """

    def __init__(self, path: Path, after_step: int, warn: Callable[[str], None]) -> None:
        """Raises `UsageError` if the file cannot be read or written."""
        self._path, self._warn = path, warn
        with wrap_os_errors(f"cannot write {path}", path):
            rewind(path, after_step)
            self._file = Appender(path, warn)
        self.sync, self.close = self._file.sync, self._file.close

    def write(self, row: Row) -> None:
        odd = {key: str(value) for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
        if odd:
            row = {**row, **dict.fromkeys(odd), "nonfinite": odd}
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")

    def rewind(self, after_step: int) -> None:
        try:
            if self._file.write(b""):  # while rows wait, the file may end within one
                rewind(self._path, after_step)
                self._file.reopen()
        except OSError as error:
            self._warn(f"cannot rewrite {self._path}: {cause(error, self._path)}. It keeps the rows of steps given up.")


def rewind(path: Path, after_step: int) -> None:
    """Drop the rows of steps past `after_step`, and what is no row, by one atomic rewrite. Raises `OSError`."""
    try:
        data = read_file(path)
    except FileNotFoundError:
        return
    lines = data.splitlines(keepends=True)
    kept = b"".join(line for line in lines if line.endswith(b"\n") and _stays(line, after_step))
    if kept != data:
        replace_file(path, kept)


def _stays(line: bytes, after_step: int) -> bool:
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        row = json.loads(line)
        return "event" in row or row["step"] <= after_step
    return False
