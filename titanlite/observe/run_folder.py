"""The folder of a run: who may use it, what is in it, the status of the run.

A folder belongs to one run and, while it trains, to one process. Nothing in it is overwritten or deleted unless the
user said `--fresh --force`, and then only what a run writes. Checkpoints are `checkpoint/`'s.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from titanlite.errors import RunFolderLost, UsageError
from titanlite.files import Lock, cause, delete, read_file, read_json, replace_file, take_lock, wrap_os_errors
from titanlite.plan.launch import MAX_STARTS
from titanlite.recipe.load import load_recipe, recipe_differences
from titanlite.recipe.sections import Recipe
from titanlite.text import format_bytes, list_some

OWNED = ("metrics.jsonl", "tensorboard", "checkpoints", "logs", "tokenizer", "status.json", "recipe.toml")
"""What a run writes, besides `.lock`. The recipe is written first: what has none is no run."""

# Recipe keys that leave the numbers of the steps before alone, but for rounding, so that a resumed run may change them.
# Of sources and stages that holds for what is still to come: the past is compared in training/restore.py.
MAY_CHANGE = (
    "run.name", "run.output_dir", "run.stop_after_*", "metrics.*", "checkpoint.*", "validation.*", "resilience.*",
    "data.workers", "data.prefetch", "data.skip_steps", "data.sources", "data.stages", "data.validation",
    "training.microbatch", "parallel.*", "recompute.*", "compile.*", "kernels.*", "plugins.*",
    "debug.trace_shapes", "debug.find_nonfinite",
)  # fmt: skip
_LONGEST = 3900  # bytes of a run folder's path: what is written below it must be within the system's limit of 4,095 too

Mode = Literal["auto", "resume", "fresh"]
State = Literal["running", "done", "stopped", "failed"]


@dataclass(frozen=True)
class Start:
    """What the command line asks for of the run that the folder may hold."""

    mode: Mode = "auto"  # resumes the run that is there or starts one; `resume` needs one, `fresh` refuses one
    force: bool = False  # with `fresh`: delete the one there is
    may_change: tuple[str, ...] = ()  # recipe keys, or patterns, that may change though numbers depend on them
    step: int | None = None  # go on from the checkpoint of this step; None: from the latest
    restarted: bool = False  # it is known that this is not the job's first start
    job: tuple[str, ...] = ()  # names of the launcher's job, if any: each of its starts shares one with that before

    @property
    def once(self) -> str:
        """The option of what is to be done once, by the first start of a job that can; or empty."""
        if self.mode == "fresh":
            return "--fresh"
        return "" if self.step is None else f"--from-step {self.step}"

    def still(self, pending: str) -> Start:
        """What is done while `pending`, such an option, is not done, and perhaps begun (it was allowed then); or after
        it, by an empty one.
        """
        option, _, step = pending.partition(" ")
        if option == "--fresh":
            return replace(self, mode="fresh", force=True, step=None)
        if option == "--from-step" and re.fullmatch("[0-9]{1,18}", step):
            return replace(self, mode="resume", force=False, step=int(step))
        return replace(self, mode="auto", force=False, step=None)


GO_ON = Start()


@dataclass
class RunFolder:
    """An opened run folder, locked for this process. Made by `open_run_folder`."""

    path: Path
    recipe_text: str
    start: Start  # what this start of the run does
    warn: Callable[[str], None]
    lock: Lock
    resumed: bool  # the folder held this run already
    changes: dict[str, tuple[Any, Any]]  # recipe keys that this start of the run changed: (before, now)
    found: dict[str, Any]  # what `status.json` said when the folder was opened; empty for a new run

    def __post_init__(self) -> None:
        self.recipe, self.status = self.path / "recipe.toml", self.path / "status.json"
        self.checkpoints, self.logs = self.path / "checkpoints", self.path / "logs"
        before = self.found.get("attempt", 1 if self.found else 0)  # the first starts were not counted
        self.attempt = (before if isinstance(before, int) and 0 <= before < MAX_STARTS else 1) + 1  # from 1
        self._pending = self.start.once if self.resumed else ""

    def write_status(self, state: State, step: int, exit_code: int | None = None, reason: str = "") -> bool:
        """Whether `status.json` says how the run stands; a full disk only warns. `exit_code`: None while it runs."""
        if not self.lock.is_in_place():
            self.warn(f"{self.path} is no longer the folder that this run began in; its status stays as it is.")
            return False
        try:
            end = {"step": step, "exit_code": exit_code, "reason": reason}
            replace_file(self.status, _status(self.start, self._pending, self.attempt, state, **end))
        except OSError as error:
            self.warn(f"cannot write {self.status}: {cause(error, self.path)}.")
            return False
        return True

    def require_own(self) -> None:
        """Raise `RunFolderLost` if the lock file was removed or replaced: another process may have come in since."""
        if self.path.exists() and not self.lock.is_in_place():
            raise RunFolderLost(
                f"{self.lock.path} was removed or replaced, so another process may use this folder by now: nothing "
                "more is written there. Once none does, start the run again; it goes on from its last checkpoint."
            )

    def settle(self, step: int) -> None:
        """Write down that the run goes on after `step`, by the recipe of this start, and that what was asked for once
        is done: no restart does it again. Raises `UsageError` where one would, for this cannot be written.
        """
        if self.changes:  # not before: a start may be refused by what its checkpoint says
            with wrap_os_errors(f"cannot write {self.recipe}", self.path):
                replace_file(self.recipe, self.recipe_text.encode())
        pending, self._pending = self._pending, ""
        if not self.write_status("running", step) and pending:
            raise UsageError(f"{self.status} cannot be written, so a restart would not know that {pending} is done.")

    def require_space(self, needed_bytes: int, purpose: str) -> None:
        """Raise `UsageError` if the file system has less room than `purpose` will need."""
        free = shutil.disk_usage(self.path).free
        if free < needed_bytes:
            raise UsageError(
                f"{self.path} has {format_bytes(free)} free, and {purpose} needs {format_bytes(needed_bytes)}. "
                "Free some space, or set run.output_dir to a larger disk."
            )

    def keep(self, name: str, files: Mapping[str, Path]) -> None:
        """Make `files`, which may be there already, all that the run's folder `name` holds. Raises `UsageError`."""
        folder = self.path / name
        with wrap_os_errors(f"cannot write {folder}", self.path):
            if not files:
                delete(folder)
                return
            folder.mkdir(exist_ok=True)
            for file, source in files.items():
                replace_file(folder / file, source.read_bytes())
            for path in folder.iterdir():
                if path.name not in files:
                    delete(path)

    def last_end(self) -> str:
        """How the start before this one ended, for the reader; empty for a new run."""
        if not self.found:
            return ""
        if self.found.get("state") != "running":
            return ": ".join(str(self.found[key]) for key in ("state", "reason") if self.found.get(key))
        who = f"process {self.found.get('pid', '?')} on {self.found.get('host', '?')}"
        if self.lock.is_new:
            return f"{who}, whose lock file is gone; if that process still trains, it ends at its next save"
        return f"{who} ended without a status: it was killed, or its machine was lost"

    def close(self) -> None:
        """Let other processes use the folder."""
        self.lock.close()


def open_run_folder(
    path: Path, recipe: Recipe, recipe_text: str, start: Start, warn: Callable[[str], None]
) -> RunFolder:
    """Create, resume or replace the run in `path`, as `start` says, and lock it. Raises `UsageError` before changes."""
    try:
        _refuse_foreign(path)
        if start.mode == "resume" and not has_run(path):
            raise UsageError(f"there is no run to resume in {path}; to start one, drop --resume or --from-step.")
        path.mkdir(parents=True, exist_ok=True)
        lock = take_lock(path / ".lock", f"the run folder {path}", "give this run another run.name", warn)
        try:
            return _open_locked(path, recipe, recipe_text, start, warn, lock)
        except BaseException:
            lock.close()
            raise
    except OSError as error:
        what = f"cannot use the run folder {path}: {error.filename or path}"
        raise UsageError(f"{what}: {cause(error, path)}.") from error


def has_run(path: Path) -> bool:
    """Whether a run, or what is left of one, lies in `path`."""
    return any((path / name).exists() for name in OWNED)


def require_same_run(old: Recipe, new: Recipe, may_change: Sequence[str], what: str, ways_out: str) -> None:
    """Raise `UsageError` with the difference if `new` cannot go on from a checkpoint of `old` as the same run, but for
    keys that match `may_change`. The message begins with `what`, "… holds a run", and ends with the `ways_out`.
    """
    patterns, different = (*MAY_CHANGE, *may_change), recipe_differences(old, new)
    if forbidden := [key for key in different if not any(fnmatchcase(key, pattern) for pattern in patterns)]:
        lines = "\n".join("  {}: {!r} there, {!r} here".format(key, *different[key]) for key in forbidden)
        named = " ".join(f"--allow-change {key}" for key in forbidden)
        raise UsageError(f"{what} of another recipe:\n{lines}\n{ways_out} If you mean the change: {named}")


def _open_locked(
    path: Path, recipe: Recipe, text: str, start: Start, warn: Callable[[str], None], lock: Lock
) -> RunFolder:
    found, resumed = _read_status(path / "status.json"), has_run(path)
    start = _still_to_do(start, found)
    if resumed and start.mode == "fresh":
        if not start.force:
            raise UsageError(
                f"{path} holds a run already, and --fresh would delete it. Give the new run another run.name, "
                "or add --force to delete the old one with its checkpoints."
            )
        # Until its recipe and status are replaced, the status of the old run has that it is to be deleted.
        replace_file(path / "status.json", _status(start, start.once))
        for name in OWNED:
            if name not in ("status.json", "recipe.toml"):
                delete(path / name)
        resumed, found = False, {}
    changes = _allowed_changes(path, recipe, start.may_change) if resumed else {}
    if resumed and lock.is_new and (path / "metrics.jsonl").exists():  # whoever lost the lock goes on in the old file
        replace_file(path / "metrics.jsonl", read_file(path / "metrics.jsonl"))
    if not resumed:
        replace_file(path / "recipe.toml", text.encode())
        replace_file(path / "status.json", _status(start))
    for name in ("checkpoints", "logs"):
        (path / name).mkdir(exist_ok=True)
    return RunFolder(path, text, start, warn, lock, resumed, changes, found)


def _still_to_do(start: Start, found: dict[str, Any]) -> Start:
    """What this start is to do: what it was asked for, or, if an earlier start of its job has been here, what is left
    of that. A restart that cannot tell does nothing that was not begun, for it might undo what its job has trained.
    """
    names, pending = found.get("job"), str(found.get("pending", ""))
    if set(start.job) & set(map(str, names if isinstance(names, list) else [names])):
        return replace(start.still(pending), restarted=True)
    if not start.restarted or (start.job and names is not None):
        return start
    return start.still(pending if pending == start.once else "")


def _allowed_changes(path: Path, recipe: Recipe, may_change: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """What the recipe changes in the run of `path`. Raises `UsageError` if it may not."""
    ways_out = "Give the new run another run.name, or delete the old one with --fresh --force."
    stored = path / "recipe.toml"
    if not stored.is_file():
        raise UsageError(f"{path} holds what a run wrote, but no recipe.toml to resume by. {ways_out}")
    old = load_recipe(stored, stored=True).recipe
    if os.path.realpath(old.checkpoint.warm_start or stored) == os.path.realpath(path):
        raise UsageError(
            f"{path} holds imported weights and no run: start {stored}, whose run begins with them in a folder of its "
            "own, or give this run another run.name."
        )
    # A run that was refused before its first step may change altogether.
    metrics = path / "metrics.jsonl"
    if (metrics.is_file() and metrics.stat().st_size > 0) or any((path / "checkpoints").glob("[!.]*")):
        ways_out = f"To go on with that run, start {stored}. {ways_out}"
        require_same_run(old, recipe, may_change, f"{path} holds a run", ways_out)
    return recipe_differences(old, recipe)


def _refuse_foreign(path: Path) -> None:
    """Raise `UsageError` if `path` is no folder, one with files that no run wrote and no run, or too long a name."""
    if len(os.fsencode(path)) > _LONGEST:
        raise UsageError(
            f"the run folder's path has {len(os.fsencode(path))} bytes; with those of its files, which may not pass "
            f"4,095, no more than {_LONGEST} fit. Give a shorter run.name or run.output_dir."
        )
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, so it cannot be the run folder; change run.name or run.output_dir.")
    names = sorted(name for name in (os.listdir(path) if path.exists() else ()) if not name.startswith("."))
    if names and not has_run(path):
        raise UsageError(f"{path} is no run folder: it holds {list_some(names, 3)}. Change run.name or run.output_dir.")


def _status(start: Start, pending: str = "", attempt: int = 1, state: State = "running", **end: Any) -> bytes:
    """`end` may have `step`, `exit_code` and `reason`."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    process = {"attempt": attempt, "job": start.job, "pending": pending, "pid": os.getpid(), "host": platform.node()}
    fields = {"state": state, "exit_code": None, "step": 0, "reason": "", "time": now, **process, **end}
    return json.dumps(fields, indent=1).encode() + b"\n"


def _read_status(path: Path) -> dict[str, Any]:
    """What `status.json` says; empty if there is none, or if it is damaged. Raises `OSError` if it cannot be read."""
    with suppress(FileNotFoundError, ValueError):
        if isinstance(fields := read_json(path), dict):
            return fields
    return {}
