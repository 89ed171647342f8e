"""Files of text as they lie on the disk: plain, or packed by gzip or zstd."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from titanlite.errors import DataError

PACKED = {".gz": "gzip", ".zst": "zstd"}
BLOCK_BYTES = 2**20


@contextmanager
def open_unpacked(path: Path, block_bytes: int = BLOCK_BYTES) -> Iterator[IO[bytes]]:
    """The file's content, unpacked by blocks. What is read within, and cannot be, is a `DataError` with the place."""
    codec = PACKED.get(path.suffix.lower())
    with wrap_os_errors(path), open(path, "rb", buffering=block_bytes if codec else -1) as file:
        if codec is None:
            yield file
            return
        import pyarrow

        # Unlike zstandard's reader, Arrow's does not take a file that was cut short for a whole one.
        yield io.BufferedReader(pyarrow.CompressedInputStream(file, codec), block_bytes)


@contextmanager
def wrap_os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None:  # Arrow's, of packed files
            hint = " by zstd -d --long=31" if "too much memory" in str(error) else ""
            raise DataError(
                f"{path}: damaged or cut short ({error}); fetch or pack it again, or unpack it{hint}."
            ) from error
        raise DataError(f"{path}: cannot be read ({error.strerror}); mend its permissions, or leave it out.") from error
