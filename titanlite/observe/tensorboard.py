"""TensorBoard event files: scalars of metric and validation rows, by step, for `tensorboard --logdir`."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from titanlite.files import Appender, wrap_os_errors
from titanlite.observe.jsonl import Row
from titanlite.recipe.sections import Recipe


def open_sink(recipe: Recipe, folder: Path, after_step: int, warn: Callable[[str], None]) -> TensorBoardSink:
    return TensorBoardSink(folder / "tensorboard", after_step, warn)


class TensorBoardSink:
    """Uses tensorboard's messages and checksums, imported with the first row, and frames the records itself: its writer
    costs seconds where TensorFlow is installed, and ends a run whose disk is full. Event rows are not drawn.
    """

    def __init__(self, folder: Path, after_step: int, warn: Callable[[str], None]) -> None:
        """Raises `UsageError` if the folder cannot be written."""
        path = folder / f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{os.getpid()}"
        with wrap_os_errors(f"cannot write {path}", path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = Appender(path, warn)
        self.sync, self.close = self._file.sync, self._file.close
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

    def _put(self, event: Any) -> None:
        self._file.write(frame_record(event.SerializeToString()))


def _tag(key: str, validation_set: str | None) -> str:
    if key in ("loss", "grad_norm", "lr"):
        return f"train/{key}"
    if key in ("validation_loss", "bits_per_byte"):
        return "/".join(filter(None, ("validation", validation_set, key.removeprefix("validation_"))))
    if key.startswith("model/"):
        return key
    return f"progress/{key}" if key in ("samples", "tokens") else f"speed/{key}"


def frame_record(data: bytes) -> bytes:
    """One TFRecord: length, checksum of the length, data, checksum of the data, little-endian."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c  # type: ignore[import-untyped]

    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
