"""Token files against the hashes in their sidecars: once a run, in a thread beside its training; what was found is
kept in the run's folder. A file that a start has found damaged is read again before the next begins.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from titanlite.corpus.token_file import TokenFile
from titanlite.corpus.units import key_of
from titanlite.errors import DataError
from titanlite.files import replace_file

_LAST_SECONDS = 5.0  # for which the end waits for the file system to answer


class Verification:
    """This rank's part of a run's token files."""

    def __init__(self, files: Sequence[TokenFile], folder: Path, rank: int = 0, ranks: int = 1) -> None:
        """`folder` keeps what was found. Files without a sidecar, of which nothing is known, are left out."""
        self._files = {_mark(file, folder): file for file in files if file.info is not None}
        self._own = list(self._files.items())[rank::ranks]
        self.failure: DataError | None = None  # the first damage that was found
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._verify_all, name="verification", daemon=True)

    def begin(self) -> None:
        """Start the thread. Raises `DataError` if a file is still damaged that an earlier start found so."""
        for mark, file in self._own:
            with suppress(OSError):  # not verified yet
                if mark.read_bytes():
                    self._verify(mark, file, lambda _: False)
            if self.failure is not None:
                raise self.failure
        self._thread.start()

    def end(self) -> list[TokenFile]:
        """Stop; returns the files, of all ranks, that are not verified yet."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(_LAST_SECONDS)
        return [file for mark, file in self._files.items() if not os.path.exists(mark)]

    def _verify_all(self) -> None:
        for mark, file in self._own:
            if self.failure is None and not self._stop.is_set() and not os.path.exists(mark):
                # Half of the time is left to those who read what they train on.
                self._verify(mark, file, self._stop.wait)

    def _verify(self, mark: Path, file: TokenFile, pause: Callable[[float], bool]) -> None:
        failure = None
        try:
            file.verify_hashes(pause)
        except DataError as error:
            failure = error
        if not self._stop.is_set():
            self.failure = failure
            with suppress(OSError):  # it is verified again then
                mark.parent.mkdir(exist_ok=True)
                replace_file(mark, str(failure or "").encode("utf-8", "surrogateescape"))


def _mark(file: TokenFile, folder: Path) -> Path:
    """Of a file with this name, size, time and sidecar: empty if it is whole, or else what is wrong."""
    assert file.info is not None
    both = file.tokens.file, file.pointers.file
    parts = [(str(each.path.resolve()), each.size, each.modified_ns) for each in both]
    return folder / key_of([parts, file.info.bin_xxh3_64, file.info.idx_xxh3_64])
