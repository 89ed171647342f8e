"""Disks that are full for a while or for good, and folders that cannot be written, vanish or become something else."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

from support.chaos.fault import EQUAL, Fault, Outcome
from support.chaos.sandbox import EVERY, STEPS, Sandbox

_WHILE: dict[str, Any] = {"first": 2 * EVERY - 1, "last": 2 * EVERY + 2}
"""From before this step until before that one: the save between meets it."""


def passing(row: int, what: str, how: str, said: str, ranks: int = 1, slow: bool = False, **chaos: Any) -> Fault:
    """The save fails, with a reason; training goes on, the next save succeeds, and no row is lost."""

    def run(box: Sandbox) -> Outcome:
        if chaos["fault"] == "disk_filled":
            with _small_disk(box):
                return broken(box)
        return broken(box)

    def broken(box: Sandbox) -> Outcome:
        box.train("--checkpoint.keep_last=0", ranks=ranks, **_WHILE, **chaos)
        assert box.steps() == [EVERY, 3 * EVERY, STEPS], "the one that failed is not there, and all others are"
        (failed,) = box.events("save_failed")
        assert failed["step"] == 2 * EVERY and f"step-{2 * EVERY:08d}" in failed["detail"], failed
        box.command("checkpoint", "verify", "runs/run", "--deep")
        box.require_whole(ranks=ranks)
        return Outcome(0, EQUAL, box.message(failed["detail"], said))

    return Fault(row, what, how, run, slow)


class _small_disk:  # noqa: N801 - reads as a context manager
    """A disk of one MiB for `runs`; needs root."""

    def __init__(self, box: Sandbox) -> None:
        self._path = box.folder / "runs"

    def __enter__(self) -> None:
        self._path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(self._path)], check=True)

    def __exit__(self, *raised: object) -> None:
        subprocess.run(["umount", "--lazy", str(self._path)], check=True)


def full_for_good(box: Sandbox) -> Outcome:
    """The run ends when `checkpoint.max_failures` saves have failed in a row; then there is space again."""
    job = box.start(
        "--checkpoint.max_failures=1", fault="files_limited", first=EVERY + 1, last=10**6, limit=4096
    ).ended(4)
    reached = box.step()
    box.require_resume_from_only(EVERY)
    return Outcome(reached - EVERY, EQUAL, box.message(job.said, "error: "))


def gone(row_what: str, how: str, act: Callable[[Sandbox], None], said: str, slow: bool = False) -> Fault:
    """Something happens to the run folder between two saves: none succeeds any more, and nothing is written there."""

    def run(box: Sandbox) -> Outcome:
        job = box.paused("--checkpoint.max_failures=0")
        box.until(lambda: box.steps() == [EVERY])
        act(box)
        left = _tree(box)
        box.go()
        job.ended(4)
        assert _tree(box) == left, "nothing is written there"
        assert box.run_folder().exists() == (act in (_replace_by_file, _replace_by_other)), "and nothing is made"
        return Outcome(None, "what was committed is where its owner has put it", box.message(job.said, said))

    return Fault(14, row_what, how, run, slow)


def _tree(box: Sandbox) -> dict[str, bytes]:
    """All files of the folder that has the run's name now, but for the record of what ended the run."""
    files = [path for path in box.run_folder().rglob("*") if path.is_file() and path.parent.name != "crashes"]
    return {str(path): path.read_bytes() for path in files}


def _remove(box: Sandbox) -> None:
    shutil.rmtree(box.run_folder())


def _move_away(box: Sandbox) -> None:
    box.run_folder().rename(box.folder / "runs/moved")


def _replace_by_file(box: Sandbox) -> None:
    _move_away(box)
    box.run_folder().write_text("mine")


def _replace_by_other(box: Sandbox) -> None:
    """Another run's folder takes its place."""
    _move_away(box)
    shutil.copytree(box.folder / "runs/moved", box.run_folder())


FAULTS = [
    passing(13, "disk full for a while", "RLIMIT_FSIZE", "File too large", fault="files_limited", limit=4096),
    passing(
        13, "disk full for a while, on one rank of two", "RLIMIT_FSIZE", "File too large", ranks=2,
        slow=True, fault="files_limited", limit=4096, on=[1],
    ),
    *(
        [passing(13, "disk full for a while (tmpfs)", "a tmpfs of 1 MiB, filled", "No space left", fault="disk_filled")]
        if os.geteuid() == 0
        else []
    ),
    Fault(13, "disk full for good", "RLIMIT_FSIZE", full_for_good),
    passing(
        14, "checkpoint folder read-only for a while", "chmod 555, root's right to pass over it given up",
        "Permission denied", fault="mode_taken", path="runs/run/checkpoints",
    ),
    gone("run folder removed", "rm -r", _remove, "error: "),
    gone("run folder moved away", "mv", _move_away, "error: ", slow=True),
    gone("run folder replaced by a file", "mv, touch", _replace_by_file, "error: "),
    gone("run folder replaced by another run's", "mv, cp -r", _replace_by_other, "error: "),
]  # fmt: skip
