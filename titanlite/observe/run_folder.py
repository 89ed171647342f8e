"""The folder of a run: who may use it, what is in it, how the run stands.

A folder belongs to one run and, while it trains, to one process. Nothing in it is overwritten or deleted unless the
user said `--fresh --force`, and then only what a run writes. What a checkpoint is, `checkpoint/` knows.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
from collections.abc import Callable
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from titanlite.durable import cause, replace_file
from titanlite.errors import UsageError
from titanlite.recipe.load import load_recipe, recipe_differences
from titanlite.recipe.sections import Recipe
from titanlite.recipe.units import format_bytes

OWNED = ("metrics.jsonl", "tensorboard", "checkpoints", "logs", "status.json", "recipe.toml")
"""What a run writes, besides `.lock`. The recipe is written first and deleted last: what has none is no run."""

MAY_CHANGE = (
    "run.name", "run.output_dir", "run.stop_after_*", "metrics.*", "checkpoint.*", "validation.*", "resilience.*",
    "data.workers", "data.prefetch", "training.microbatch", "parallel.*", "recompute.*", "compile.*",
    "debug.trace_shapes", "debug.find_nonfinite",
)  # fmt: skip
"""Recipe keys that leave the training's numbers alone, but for rounding, so that a resumed run may change them."""

Mode = Literal["auto", "resume", "fresh"]
State = Literal["running", "done", "stopped", "failed"]
Differences = dict[str, tuple[Any, Any]]


class RunFolder:
    """An opened run folder, locked for this process. Made by `open_run_folder`."""

    def __init__(self, path: Path, lock: int, resumed: bool, changes: Differences, warn: Callable[[str], None]) -> None:
        self.path = path
        self.resumed = resumed
        """Whether the folder held this run already."""
        self.changes = changes
        """Recipe keys that this start of the run changed: (before, now)."""
        self.recipe = path / "recipe.toml"
        self.status = path / "status.json"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self._lock = lock
        self._warn = warn

    def write_status(self, state: State, step: int, exit_code: int | None = None, reason: str = "") -> None:
        """Say in `status.json` how the run stands; `exit_code` is None while it runs. A full disk only warns."""
        try:
            replace_file(self.status, _status(state, step, exit_code, reason))
        except OSError as error:
            self._warn(f"cannot write {self.status}: {cause(error, self.path)}.")

    def require_space(self, needed_bytes: int, purpose: str) -> None:
        """Raise `UsageError` if the file system has less room than `purpose` will need."""
        free = shutil.disk_usage(self.path).free
        if free < needed_bytes:
            raise UsageError(
                f"{self.path} has {format_bytes(free)} free, and {purpose} needs {format_bytes(needed_bytes)}. "
                "Free some space, or set run.output_dir to a larger disk."
            )

    def close(self) -> None:
        """Let other processes use the folder."""
        os.close(self._lock)


def open_run_folder(
    path: Path, recipe: Recipe, recipe_text: str, mode: Mode, force: bool, warn: Callable[[str], None]
) -> RunFolder:
    """Create, resume or replace the run in `path`, as `mode` says, and lock it.

    `auto` resumes if there is a run and starts one if not; `resume` needs one; `fresh` refuses one, or deletes it if
    `force`. Raises `UsageError` for whatever stands in the way, before anything is changed.
    """
    try:
        _refuse_foreign(path)
        if mode == "resume" and not has_run(path):
            raise UsageError(f"there is no run to resume in {path}; leave --resume away to start one.")
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path / ".lock", warn)
    except OSError as error:
        raise UsageError(f"cannot use {path} as the run folder: {cause(error, path)}.") from error
    try:
        return _open_locked(path, recipe, recipe_text, mode, force, warn, lock)
    except OSError as error:
        os.close(lock)
        raise UsageError(f"cannot write the run folder {path}: {cause(error, path)}.") from error
    except BaseException:
        os.close(lock)
        raise


def has_run(path: Path) -> bool:
    """Whether a run, or what is left of one, lies in `path`."""
    return any((path / name).exists() for name in OWNED)


def forbidden_differences(old: Recipe, new: Recipe) -> Differences:
    """Differences with which a run cannot go on from its checkpoint as the same run."""
    return {
        key: values
        for key, values in recipe_differences(old, new).items()
        if not any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE)
    }


def _open_locked(
    path: Path, recipe: Recipe, text: str, mode: Mode, force: bool, warn: Callable[[str], None], lock: int
) -> RunFolder:
    resumed, changes = has_run(path), {}
    if resumed and mode == "fresh":
        if not force:
            raise UsageError(
                f"{path} holds a run already, and --fresh would delete it. Give the new run another run.name, "
                "or add --force to delete the old one with its checkpoints."
            )
        for name in OWNED:
            _delete(path / name)
        resumed = False
    if resumed:
        changes = _allowed_changes(path, recipe)
    if changes or not resumed:
        replace_file(path / "recipe.toml", text.encode())
    for name in ("checkpoints", "logs"):
        (path / name).mkdir(exist_ok=True)
    if not resumed:
        replace_file(path / "status.json", _status("running", 0, None, ""))
    return RunFolder(path, lock, resumed, changes, warn)


def _allowed_changes(path: Path, recipe: Recipe) -> Differences:
    """What the recipe changes in the run of `path`. Raises `UsageError` with the difference if it may not."""
    ways_out = "Give the new run another run.name, or delete the old one with --fresh --force."
    stored = path / "recipe.toml"
    if not stored.is_file():
        raise UsageError(f"{path} holds what a run wrote, but no recipe.toml to resume by. {ways_out}")
    old = load_recipe(stored).recipe
    forbidden = forbidden_differences(old, recipe) if _has_begun(path) else {}
    if forbidden:
        lines = "\n".join(f"  {key}: {before!r} there, {now!r} here" for key, (before, now) in forbidden.items())
        raise UsageError(
            f"{path} holds a run of another recipe:\n{lines}\nTo go on with that run, start {stored}. {ways_out}"
        )
    return recipe_differences(old, recipe)


def _has_begun(path: Path) -> bool:
    """Whether a step was ever taken; a run that was refused before its first may change altogether."""
    metrics = path / "metrics.jsonl"
    return (metrics.is_file() and metrics.stat().st_size > 0) or any((path / "checkpoints").glob("[!.]*"))


def _refuse_foreign(path: Path) -> None:
    """Raise `UsageError` if `path` is no folder, or one with files that no run wrote and no run."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, so it cannot be the run folder; change run.name or run.output_dir.")
    try:
        listed = os.listdir(path) if path.exists() else []
    except OSError as error:
        raise UsageError(f"cannot read the run folder {path}: {cause(error, path)}.") from error
    names = sorted(name for name in listed if not name.startswith("."))
    if names and not has_run(path):
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise UsageError(f"{path} is no run folder: it holds {shown}. Change run.name or run.output_dir.")


def _lock(path: Path, warn: Callable[[str], None]) -> int:
    """Take the folder for this process until it ends, however it ends; returns the descriptor that holds it.

    A POSIX record lock: it works over NFS, and forked data workers do not inherit it, so one that outlives a killed
    trainer does not keep the next one out. Raises `UsageError` naming the holder, or `OSError`.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.read(descriptor, 4096).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise UsageError(
            f"the run folder {path.parent} is in use by {holder}. "
            "Wait for it to end, or give this run another run.name."
        ) from None
    except OSError as error:
        warn(f"{path.parent} cannot be locked ({error.strerror}); see to it that no second process uses it.")
        return descriptor
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
    return descriptor


def _status(state: State, step: int, exit_code: int | None, reason: str) -> bytes:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    fields = {"state": state, "exit_code": exit_code, "step": step, "reason": reason, "time": now}
    return json.dumps(fields, indent=1).encode() + b"\n"


def _delete(path: Path) -> None:
    """Delete a file or folder of the run; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
