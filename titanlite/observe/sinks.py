"""Where rows go on disk: `metrics.jsonl`, always, and TensorBoard event files.

A sink has `write(row)` and `close()`; the console is one too. A disk that fills up while training never ends the run:
rows wait in memory until it takes them again, and the user is told.
"""

from __future__ import annotations

import json
import math
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from titanlite.errors import UsageError
from titanlite.files import Appender, cause, read_file, replace_file
from titanlite.observe.rows import Row

Warn = Callable[[str], None]


class Sink(Protocol):
    """Takes rows in the order of their steps."""

    def write(self, row: Row) -> None: ...

    def rewind(self, after_step: int) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """`metrics.jsonl`: one JSON object a line, handed to the system at once, so that a kill loses no row.

    JSON has no NaN and no infinity: such a value is written as null, and `nonfinite` in the same row says which it was.
    Where a run goes on after `after_step`, resumed or rolled back, the rows of later steps are dropped (they
    will come again), and a last line that a kill cut in two; events are history and stay.
    """

    def __init__(self, path: Path, after_step: int, warn: Warn) -> None:
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


class TensorBoardSink:
    """Event files that `tensorboard --logdir` shows: scalars of metric and validation rows, by step.

    Uses tensorboard's message types, imported with the first row (40 ms), and frames the records itself: its writer
    costs 0.3 s at start-up, and seconds where TensorFlow is installed. Event rows are not drawn.
    """

    def __init__(self, folder: Path, after_step: int, warn: Warn) -> None:
        """Raises `UsageError` if the folder cannot be written."""
        path = folder / f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = Appender(path, warn)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {cause(error, path)}.") from error
        self._begun = False
        self.rewind(after_step)

    def rewind(self, after_step: int) -> None:
        self._first_step: int | None = after_step + 1

    def write(self, row: Row) -> None:
        if "event" in row:
            return
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        if not self._begun:
            self._begun = True
            self._put(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if self._first_step is not None:
            # A start mark makes TensorBoard forget what was drawn for the steps that come again.
            mark = SessionLog(status=SessionLog.START)
            self._put(Event(wall_time=time.time(), step=self._first_step, session_log=mark))
            self._first_step = None
        values = [
            Summary.Value(tag=_tag(key, row.get("set")), simple_value=float(value))
            for key, value in row.items()
            if key not in ("step", "set") and value is not None
        ]
        self._put(Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values)))

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()

    def _put(self, event: Any) -> None:
        self._file.write(frame_record(event.SerializeToString()))


def _tag(key: str, validation_set: str | None) -> str:
    if key in ("loss", "grad_norm", "lr"):
        return f"train/{key}"
    if key in ("validation_loss", "bits_per_byte"):
        return "/".join(filter(None, ("validation", validation_set, key.removeprefix("validation_"))))
    return f"progress/{key}" if key in ("samples", "tokens") else f"speed/{key}"


def frame_record(data: bytes) -> bytes:
    """One TFRecord: length, checksum of the length, data, checksum of the data, little-endian."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", _masked_crc(length)) + data + struct.pack("<I", _masked_crc(data))


def _crc_table() -> tuple[int, ...]:
    """Byte table of CRC-32C (Castagnoli, reflected polynomial)."""
    table = []
    for entry in range(256):
        for _ in range(8):
            entry = (entry >> 1) ^ (0x82F63B78 if entry & 1 else 0)
        table.append(entry)
    return tuple(table)


_CRC_TABLE = _crc_table()


def _masked_crc(data: bytes) -> int:
    """CRC-32C, rotated and offset as TFRecord wants it (a checksum of data that holds checksums would be weak)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
