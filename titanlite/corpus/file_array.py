"""Numbers in a file, read as they are asked for, so that they take no memory however many they are.

They are read by `pread`. Of a mapped file that is cut while it is read, the system sends SIGBUS, which ends the process
with nothing saved, and no check of the size before each look can exclude it; a short `pread` is an ordinary error.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from titanlite.errors import DataError
from titanlite.files import open_file

Number = TypeVar("Number", bound=np.integer[Any])

RESTORE = "prepare it again, or copy it again from where it is whole."
GAP = 64
"""Numbers between two wanted ones, up to which these are read together rather than apart."""


class OpenFile:
    """A file that stays open, and the same one whatever its name comes to mean, for as long as this object lives."""

    def __init__(self, path: Path) -> None:
        """Raises `OSError`, also for what is no regular file."""
        self.path = path
        self._descriptor = open_file(path)
        status = os.fstat(self._descriptor)
        self.size, self.modified_ns = status.st_size, status.st_mtime_ns

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on. Raises `DataError` naming file and byte if they are not there."""
        try:
            data = os.pread(self._descriptor, size, offset)
            while len(data) < size:  # the system gives at most 2 GiB at a time, and nothing past the end
                more = os.pread(self._descriptor, size - len(data), offset + len(data))
                if not more:
                    raise DataError(
                        f"{self.path}: cut short while it is in use: it ends at byte "
                        f"{os.fstat(self._descriptor).st_size:,}, and had {self.size:,} bytes when it was opened; "
                        f"{RESTORE}"
                    )
                data += more
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be read from byte {offset:,} on ({error.strerror}); mend the disk, or its "
                "connection."
            ) from error
        return data

    def hash(self, pause: Callable[[float], bool]) -> str:
        """xxh3_64 of all of it; see `TokenFile.verify_hashes`. Raises `DataError` if it cannot be read."""
        digest, block_bytes = xxhash.xxh3_64(), 2**22
        for offset in range(0, self.size, block_bytes):
            begun = time.monotonic()
            digest.update(self.read(offset, min(block_bytes, self.size - offset)))
            if pause(time.monotonic() - begun):
                break
        return digest.hexdigest()


@dataclass(frozen=True)
class FileArray(Generic[Number]):
    """`count` numbers of a file from byte `offset` on: `array[7]`, `array[10:20]`, `array[[3, 4, 9]]`, each read anew.

    Its methods raise `DataError`, naming the file, for what cannot be read.
    """

    file: OpenFile
    offset: int
    dtype: np.dtype[Number]
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            start, stop, _ = key.indices(self.count)
            return self._read(start, stop)
        if isinstance(key, np.ndarray):
            return self._gather(key)
        start = range(self.count)[key]
        return self._read(start, start + 1)[0]

    def _read(self, start: int, stop: int) -> npt.NDArray[Number]:
        size = self.dtype.itemsize
        return np.frombuffer(self.file.read(self.offset + start * size, max(0, stop - start) * size), self.dtype)

    def _gather(self, places: npt.NDArray[np.int64]) -> npt.NDArray[Number]:
        """Those at `places`, none negative; neighbours are read together."""
        parts = [places]
        if len(places) and int(places.max()) - int(places.min()) >= 4 * len(places):
            parts = np.split(places, np.flatnonzero(np.abs(np.diff(places)) > GAP) + 1)
        firsts = [int(part.min()) if len(part) else 0 for part in parts]
        return np.concatenate(
            [self._read(at, int(part.max(initial=0)) + 1)[part - at] for part, at in zip(parts, firsts, strict=True)]
        )
