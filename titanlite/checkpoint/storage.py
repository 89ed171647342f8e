"""Checkpoint folders on a disk: committed by one rename, read with suspicion, removed without a trace of halves.

A folder named `step-…` is whole or was damaged later; what is being written, replaced or deleted has a hidden name
beside it, which the next start clears. Knows nothing of tensors.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from io import FileIO
from pathlib import Path

import xxhash

from titanlite import files
from titanlite.checkpoint.format import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    DamagedCheckpointError,
    FileEntry,
    Manifest,
    decode,
    step_of,
)
from titanlite.errors import CheckpointError
from titanlite.files import cause, open_file, sync_path


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint folder, ascending by number; times on disk mean nothing. Empty without a folder."""
    with wrap_os_errors(f"cannot list the checkpoints in {folder}", folder), suppress(FileNotFoundError):
        found = ((step_of(entry.name), entry) for entry in os.scandir(folder))
        return sorted(step for step, entry in found if step is not None and entry.is_dir())
    return []


def select_superseded(steps: Sequence[int], keep_last: int, keep_every: int = 0) -> list[int]:
    """Of ascending `steps`, those that need not be kept: not the `keep_last` newest (0: all), nor multiples of
    `keep_every` (0: none).
    """
    older = steps[:-keep_last] if keep_last else []
    return [step for step in older if not (keep_every and step % keep_every == 0)]


def pending(final: Path) -> Path:
    """The hidden folder that `final` is written in."""
    return _hidden(final, "writing")


def begin(final: Path) -> None:
    """Make the empty `pending(final)`. Raises `OSError`."""
    _delete(pending(final))
    pending(final).mkdir(parents=True)


def commit(final: Path, manifest: bytes) -> str:
    """Make what is pending, its files synced, and this manifest the checkpoint `final`, in place of the one there is.

    Raises `OSError` if `final` is not what was pending; `abandon` then brings back what it was. Once it is, no error
    undoes that: what is returned, if not empty, says why a loss of power might, and that older ones must stay.
    """
    replaced = _hidden(final, "replaced")
    (pending(final) / MANIFEST).write_bytes(manifest)
    sync_path(pending(final) / MANIFEST)
    sync_path(pending(final))
    if os.path.lexists(final):
        _delete(replaced)
        os.rename(final, replaced)
    try:
        os.rename(pending(final), final)
    except OSError:  # a file server may have done it, and its answer be lost
        if pending(final).exists() or not final.exists():
            raise
    try:
        sync_path(final.parent)
    except OSError as error:
        return (
            f"the checkpoint {final} is whole, but the disk does not say that it will be found after a loss of power: "
            f"{cause(error, final)}. Older ones stay until a later save."
        )
    with suppress(OSError):  # the next start does it
        _delete(replaced)
    return ""


def abandon(final: Path) -> None:
    """Remove what is pending; `final` is as it was before."""
    replaced = _hidden(final, "replaced")
    shutil.rmtree(pending(final), ignore_errors=True)
    if replaced.exists() and not final.exists():
        with suppress(OSError):  # the next start does it
            os.rename(replaced, final)


wrap_os_errors = partial(files.wrap_os_errors, kind=CheckpointError)


def leave_mark(folder: Path) -> str:
    """Make a file of a name that was never there, for other processes to look for; its name. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f".mark-{os.urandom(8).hex()}"
    mark.touch()
    return mark.name


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed writer left in `folder`. Only for the one process that writes there. Raises `OSError`."""
    for path in sorted(folder.iterdir()):
        if re.fullmatch(r"\.mark-[0-9a-f]+", path.name):
            path.unlink()
        elif match := re.fullmatch(r"\.(step-[0-9]+)\.(writing|replaced|deleting)", path.name):
            final = folder / match[1]
            if match[2] == "replaced" and not final.exists():
                os.rename(path, final)  # killed between the two renames of a commit: the old one is still the one
            else:
                _delete(path)


def remove(final: Path) -> None:
    """Delete a checkpoint: hidden first, so that no reader meets a half-deleted one. Raises `OSError`."""
    hidden = _hidden(final, "deleting")
    _delete(hidden)
    os.rename(final, hidden)
    _delete(hidden)


def set_aside(final: Path) -> Path:
    """Rename a checkpoint out of the order of steps, losing nothing; returns its new path. Raises `CheckpointError`."""
    names = (final.with_name(f"set-aside-{number}-{final.name}") for number in range(1, 10**6))
    with wrap_os_errors(f"cannot rename {final}", final.parent):
        aside = next(path for path in names if not path.exists())
        os.rename(final, aside)
    return aside


def remove_or_warn(final: Path, warn: Callable[[str], None]) -> None:
    """`remove` what is old, which must not fail what is new."""
    try:
        remove(final)
    except OSError as error:
        warn(f"cannot delete the old {final}: {cause(error, final)}.")


def read_manifest(folder: Path) -> Manifest:
    """The validated manifest of a checkpoint folder. Raises `DamagedCheckpointError` or `NewerFormatError`."""
    return decode_manifest(folder, manifest_text(folder))


def manifest_text(folder: Path) -> str:
    """The manifest's text as it lies on the disk. Raises `DamagedCheckpointError`."""
    path = folder / MANIFEST
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_MANIFEST_BYTES:
            raise DamagedCheckpointError(f"{path} is too large to be a manifest ({size} bytes).")
        return (file.read(size) or b"").decode(errors="replace")  # what is no text does not have the checksum either


def decode_manifest(folder: Path, text: str) -> Manifest:
    """The manifest of a folder from its text. Raises `DamagedCheckpointError` or `NewerFormatError`."""
    path = folder / MANIFEST
    manifest = decode(text, str(path))
    step = step_of(folder.name)
    if step is not None and step != manifest.step:
        raise DamagedCheckpointError(f"{path} is of step {manifest.step}, not of the step its folder is named after.")
    return manifest


@contextmanager
def open_regular(path: Path, expected: FileEntry | None = None) -> Iterator[FileIO]:
    """A regular file for reading, of the expected size if one is; links, pipes and devices are refused.

    Raises `DamagedCheckpointError`, also for an `OSError` in the block.
    """
    try:
        descriptor = open_file(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        why = "is a link, which no checkpoint holds" if path.is_symlink() else f"cannot be opened: {error.strerror}"
        missing = isinstance(error, FileNotFoundError)
        raise DamagedCheckpointError(f"{path} {'is missing' if missing else why}.") from error
    with open(descriptor, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if expected is not None and size != expected.bytes:
            raise DamagedCheckpointError(f"{path} is damaged: it has {size} bytes, not {expected.bytes}.")
        try:
            yield file
        except OSError as error:
            raise DamagedCheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def verify_file(path: Path, expected: FileEntry) -> None:
    """Compare size and content with the manifest's. Raises `DamagedCheckpointError` naming the file."""
    with open_regular(path, expected) as file:
        require_hash(path, _hash(file), expected)


def require_hash(path: Path, found: str, expected: FileEntry) -> None:
    """Raises `DamagedCheckpointError` unless a file has the hash that the manifest says."""
    if found != expected.xxh3_128:
        raise DamagedCheckpointError(f"{path} is damaged: its content does not match its hash in {MANIFEST}.")


def describe_file(path: Path) -> FileEntry:
    """Size and hash of a file that was just written, for the manifest. Raises `OSError`."""
    with open(path, "rb", buffering=0) as file:
        return FileEntry(os.fstat(file.fileno()).st_size, _hash(file))


def _hash(file: FileIO) -> str:
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(2**22))
    while count := file.readinto(block):
        digest.update(block[:count])
    return digest.hexdigest()


def _delete(path: Path) -> None:
    """Delete a folder, or whatever stands for one (never what a link points to); absent is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _hidden(final: Path, purpose: str) -> Path:
    return final.with_name(f".{final.name}.{purpose}")
