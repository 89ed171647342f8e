"""Files that survive a crash: what is written is wholly there, or not there at all.

Knows nothing of what is written; checkpoints, run folders and metrics build on it. No torch.
"""

from __future__ import annotations

import os
import shutil
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path

from titanlite.recipe.units import format_bytes


def sync_path(path: Path) -> None:
    """Have the kernel bring a file, or a folder's list of names, to stable storage. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one step: a reader, and a crash, see the old bytes or the new ones, nothing between.

    Raises `OSError`; the old file is then as it was.
    """
    beside = path.with_name(f".{path.name}.writing")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def cause(error: OSError, path: Path) -> str:
    """Why the system refused, in its own words; for a full disk with the space that is left where `path` lies."""
    text = error.strerror or str(error)
    if error.errno not in (ENOSPC, EDQUOT, EFBIG):
        return text
    standing = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), Path("/"))
    return f"{text} ({format_bytes(shutil.disk_usage(standing).free)} free)"
