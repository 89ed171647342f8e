"""Files that survive a crash: what is written is wholly there, or not there at all; folders for one process at a time.

Knows nothing of what is written; checkpoints, run folders, metrics and data files build on it. No torch.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import EDQUOT, EFBIG, EINVAL, ENOSPC, ENOTSUP, ENXIO
from io import BufferedWriter
from pathlib import Path
from typing import Any

from titanlite.errors import TitanliteError, UsageError
from titanlite.text import format_bytes

APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND  # flags of `open_file` for a file that grows
_LEASE_SECONDS = 120  # NFS servers keep a lost machine's locks for a lease; 90 s is the usual one


def open_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """`os.open` of a regular file, or a link to one. Raises `OSError`, also for what to open could wait for ever."""
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    except OSError as error:
        if error.errno != ENXIO:  # a socket, or a pipe that nothing reads
            raise
    raise OSError(EINVAL, "it is not a regular file but a pipe, a socket, a device or a folder", str(path))


def read_file(path: Path) -> bytes:
    """Its content, opened by `open_file`."""
    with open(open_file(path), "rb", buffering=0) as file:
        return file.readall()


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises `OSError`, and `ValueError` for whatever is none."""
    try:
        return json.loads(read_file(path))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None


def delete(path: Path) -> None:
    """Delete a folder, or whatever stands for one (never what a link points to); absent is fine. Raises `OSError`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(descriptor: int, path: Path) -> None:
    """Have the kernel bring an open file, or folder, to stable storage. Raises `OSError` that names `path`."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (EINVAL, ENOTSUP):
            raise
        why = f"fsync: {error.strerror}: the file system cannot bring it to stable storage"
        raise OSError(error.errno, why, str(path)) from error


def sync_path(path: Path) -> None:
    """`sync` of a file, or of a folder's list of names. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor, path)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one step, as `replacing` does."""
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path, writer: str = "") -> Iterator[BufferedWriter]:
    """A file that takes the place of `path` in one step at the end: a reader, or a crash, sees the old or the new one.

    `writer` tells apart processes that may write it at the same time. Raises `OSError`; the old file is then as it was.
    """
    beside = path.with_name(f".{path.name}.{writer}writing")
    try:
        beside.unlink(missing_ok=True)
        with open(beside, "xb") as file:
            yield file
            file.flush()
            sync(file.fileno(), beside)
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


class Appender:
    """A file that only grows. What the disk does not take waits, in order, for the next write."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        """Raises `OSError`."""
        self._path = path
        self._warn = warn
        self._waiting = bytearray()
        self._descriptor = open_file(path, APPEND)

    def reopen(self) -> None:
        """Go on in the file that now has this name. Raises `OSError`."""
        replaced, self._descriptor = self._descriptor, open_file(self._path, APPEND)
        os.close(replaced)

    def write(self, data: bytes) -> bool:
        """Whether nothing waits any more."""
        failed_before = bool(self._waiting)
        self._waiting += data
        try:
            while self._waiting:
                del self._waiting[: os.write(self._descriptor, self._waiting)]
        except OSError as error:
            if not failed_before:
                reason = cause(error, self._path)
                self._warn(f"cannot write {self._path}: {reason}. What it is to hold is kept until it can be.")
        return not self._waiting

    def sync(self) -> None:
        """Have the system bring what it takes to stable storage; of a disk that cannot, `write` has complained."""
        self.write(b"")
        with suppress(OSError):
            os.fsync(self._descriptor)

    def close(self) -> None:
        self.write(b"")
        if self._waiting:
            self._warn(f"{len(self._waiting)} bytes could not be written to {self._path}.")
        os.close(self._descriptor)


def cause(error: OSError, path: Path) -> str:
    """Why the system refused, in its own words; for a full disk with the space that is left where `path` lies."""
    text = error.strerror or str(error)
    if error.errno not in (ENOSPC, EDQUOT, EFBIG):
        return text
    standing = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), Path("/"))
    return f"{text} ({format_bytes(shutil.disk_usage(standing).free)} free)"


@contextmanager
def wrap_os_errors(what: str, path: Path, then: str = "", kind: type[TitanliteError] = UsageError) -> Iterator[None]:
    """Turn an `OSError` in the block into an error that says `what` failed, why where `path` lies, and what `then`."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what}: {cause(error, path)}.{then}") from error


@dataclass(frozen=True)
class Lock:
    """A lock file that this process holds until `close` or its own end."""

    path: Path
    descriptor: int
    is_new: bool  # whether the folder was never used, or its user's lock file removed

    def is_in_place(self) -> bool:
        """Whether the locked file still has this name: without it, the next process makes and locks another."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), os.stat(self.path))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # a file system that does not answer just now has lost nothing
            return True

    def close(self) -> None:
        """Let other processes use the folder."""
        os.close(self.descriptor)


def take_lock(path: Path, what: str, other_way: str, warn: Callable[[str], None], must_wait: bool = False) -> Lock:
    """Take the folder of `path`, a lock file, for this process until it ends, however it ends.

    A POSIX record lock: it works over NFS, and forked data workers, which may outlive a killed trainer, do not inherit
    it. A file server keeps a lost machine's for a while, so a holder elsewhere is waited for; with `must_wait`, any is,
    and a file system without locks is refused. Raises `UsageError` that says `what` is in use, by whom, and the
    `other_way` than to wait; or `OSError`.
    """
    descriptor = open_file(path, os.O_RDWR | os.O_CREAT)
    until = None
    while not _lock_file(descriptor, path, None if must_wait else warn):
        holder = os.pread(descriptor, 4096, 0).decode(errors="replace").strip()
        if until is None:
            elsewhere = holder and not holder.endswith(f" on {platform.node()}")
            until = time.monotonic() + (float("inf") if must_wait else _LEASE_SECONDS if elsewhere else 0)
            if elsewhere or must_wait:
                warn(f"{path.parent} is in use by {holder}; waiting for it to end, or for the lock of a lost machine.")
        if time.monotonic() >= until:
            os.close(descriptor)
            raise UsageError(f"{what} is in use by {holder or 'another process'}. Wait for it to end, or {other_way}.")
        time.sleep(1)
    lock = Lock(path, descriptor, is_new=os.fstat(descriptor).st_size == 0)
    if not lock.is_in_place():  # who held it removed it after it was opened here: another process may lock a new one
        lock.close()
        return take_lock(path, what, other_way, warn, must_wait)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
    return lock


def _lock_file(descriptor: int, path: Path, warn: Callable[[str], None] | None) -> bool:
    """Whether this process holds the lock now, or, as `warn` is told, there are none here; without it, `OSError`."""
    import fcntl  # not on Windows, where the rest of this can be used

    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if warn is None:
            raise
        warn(f"{path.parent} cannot be locked ({error.strerror}); see to it that no second process uses it.")
    return True
