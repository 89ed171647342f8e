"""`metrics.jsonl`: the record of a run's rows, always written.

A disk that fills up never ends the run: rows wait in memory until it takes them again, with a warning.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from titanlite.errors import UsageError
from titanlite.files import Appender, cause, read_file, replace_file
from titanlite.observe.rows import Row
from titanlite.recipe.sections import Recipe


def open_sink(recipe: Recipe, folder: Path, after_step: int, warn: Callable[[str], None]) -> JsonlSink:
    """That of a run's folder."""
    return JsonlSink(folder / "metrics.jsonl", after_step, warn)


class JsonlSink:
    """One JSON object a line, handed to the system at once, so that a kill loses no row.

    JSON has no NaN and no infinity: such a value is written as null, and `nonfinite` in the same row says which it was.
    Where a run goes on after `after_step`, resumed or rolled back, the rows of later steps are dropped (they
    will come again), and a last line that a kill cut in two; events are history and stay.
    """

    def __init__(self, path: Path, after_step: int, warn: Callable[[str], None]) -> None:
        """Raises `UsageError` if the file cannot be read or written."""
        self._path, self._warn = path, warn
        try:
            rewind(path, after_step)
            self._file = Appender(path, warn)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {cause(error, path)}.") from error

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

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()


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
    try:
        row = json.loads(line)
        return "event" in row or row["step"] <= after_step
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
