"""What a run keeps of itself: its checkpoints and snapshots, when they are asked for, and what is logged of them.

The trainer says which state after which step; when a save is due on all ranks it learns from `resilience.signals`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from titanlite.checkpoint.format import CheckpointMetadata
from titanlite.checkpoint.save import SaveResult
from titanlite.checkpoint.snapshots import Snapshots
from titanlite.errors import GuardStop, RunFolderLost, StoppedEarly, UsageError
from titanlite.files import cause
from titanlite.models.shard import Shard
from titanlite.training.setup import Run

SAVE_NOW = "save-now"  # the file in the run folder that asks for a checkpoint; deleted once it is committed
_RETRY_SECONDS = 30.0  # from a save that failed to the next: a full disk may have been cleared by then
_LONGEST_PAUSE_SECONDS = 30.0  # between two attempts to save what a run ends with
_SHORT_SECONDS = 1.0  # shorter waits are not logged


def usable_snapshots(run: Run, state: Mapping[str, Shard]) -> Snapshots | None:
    """The run's, if the machines can keep any of `state`. A restart resumes without rather than not at all."""
    if run.snapshots is None:
        return None
    try:
        run.snapshots.prepare()
        run.snapshots.require_room(state)
    except UsageError as error:
        if not run.start.restarted:
            raise
        run.logger.info(f"warning: no snapshots are taken: {error}")
        return None
    return run.snapshots


class SaveRequests:
    """Asks once for each save that is due by the clock or by `file`, which asks for one by being there, and not again
    before it is known how it ended. With `every_minutes` 0, the clock asks for none.
    """

    def __init__(self, file: Path, every_minutes: float, warn: Callable[[str], None]) -> None:
        self._file: Path | None = file
        self._limit_seconds = 60 * every_minutes or math.inf
        self._warn = warn
        self._saved_at = time.monotonic()
        self._retry_at = math.inf
        self._asked = self._asked_by_file = self._saves_for_file = False

    def due(self) -> bool:
        """Whether to ask for a checkpoint now."""
        if self._asked:
            return False
        now = time.monotonic()
        if self._file is not None:
            self._asked_by_file = os.path.exists(self._file)
        if math.isfinite(self._retry_at):  # whatever asked for the save that failed still does
            self._asked = now >= self._retry_at
        else:
            self._asked = self._asked_by_file or now - self._saved_at >= self._limit_seconds
        return self._asked

    def begun(self) -> None:
        """A save of the state of now was begun, for whatever reason: the clock begins anew."""
        self._saves_for_file = self._asked_by_file
        self._saved_at = time.monotonic()

    def failed(self) -> None:
        """A save came to nothing: ask for another one in a while."""
        self._asked = self._saves_for_file = False
        self._retry_at = time.monotonic() + _RETRY_SECONDS

    def saved(self) -> None:
        """The save that was begun last is committed: the file that had asked for it before goes."""
        if self._saves_for_file and self._file is not None:
            try:
                self._file.unlink(missing_ok=True)
            except OSError as error:
                self._warn(f"cannot delete {self._file}: {cause(error, self._file)}. It is not looked for any more.")
                self._file = None
        self._asked = self._asked_by_file = self._asked_by_file and not self._saves_for_file
        self._saves_for_file = False
        self._retry_at = math.inf


class Saving:
    """Saves of one run, and their log. What it does, all ranks do after the same step.

    At the end of its context a save in the background ends too, if no rank that is gone may be waited for.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        file, every = run.path / SAVE_NOW, run.recipe.checkpoint.every_minutes
        self._requests = SaveRequests(file, every, run.logger.info)
        self._lost = False  # whether a save has found that the run folder may be another process's
        self._snapshots_fail: bool | None = None  # whether the last one did; None before the first

    def __enter__(self) -> Saving:
        return self

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> None:
        run = self._run
        if error is None or isinstance(error, StoppedEarly):
            if run.snapshots is not None:
                run.snapshots.close()  # the state is on a disk
        elif type(error) is GuardStop or (run.world.size == 1 and isinstance(error, Exception)):
            # What ends all ranks alike is a guard; any other error may be this rank's alone.
            self._note(run.checkpoints.result(wait=True))

    def due(self) -> bool:
        """Whether the clock or the user asks for a checkpoint, on the first rank; or the loss of the run folder does,
        which a rank may know of before others do, and which ends the run where all of them save.
        """
        return self._lost or (self._run.world.is_first and self._requests.due())

    def begin(self, tensors: Mapping[str, Shard], metadata: CheckpointMetadata) -> None:
        """Begin a checkpoint, once the one before has ended. Raises `CheckpointError` if too many have failed."""
        self._requests.begun()
        if self._run.checkpoints.covers(metadata.step):
            return
        with self._run.watchdog.during("saving"):
            self._note(self._wait_logged(self._run.checkpoints.wait, "checkpoint", metadata.step))
            self._sync()
            self._run.checkpoints.begin(tensors, metadata)
        self.look()

    def commit(self, tensors: Mapping[str, Shard], metadata: CheckpointMetadata) -> None:
        """Return once there is a checkpoint of this state. Raises `CheckpointError` when that has failed too often."""
        checkpoints, pause = self._run.checkpoints, 1.0
        while checkpoints.current != metadata.step:
            with self._run.watchdog.during("saving"):
                self.begin(tensors, metadata)
                self._note(checkpoints.wait())
                if checkpoints.current != metadata.step:
                    time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def commit_instead(self, tensors: Mapping[str, Shard], metadata: CheckpointMetadata) -> None:
        """As `commit`, in place of the checkpoint that there may be of the same step, and of all snapshots."""
        self._run.checkpoints.forget_current()
        self.commit(tensors, metadata)
        if self._run.snapshots is not None:
            self._run.snapshots.begin_generation()

    def take_snapshot(self, tensors: Mapping[str, Shard], metadata: CheckpointMetadata) -> None:
        """Begin a snapshot, once the one before has ended."""
        snapshots = self._run.snapshots
        assert snapshots is not None, "the recipe asks for none"
        with self._run.watchdog.during("saving"):
            saved = self._wait_logged(lambda: snapshots.saves.result(wait=True), "snapshot", metadata.step)
            self._note_snapshot(saved)
            self._sync()
            snapshots.begin(tensors, metadata)

    def look(self, wait: bool = False) -> None:
        """Log what has ended; `wait` until nothing is being written. Raises `CheckpointError` then, if too many saves
        have failed.
        """
        checkpoints, snapshots = self._run.checkpoints, self._run.snapshots
        self._note(checkpoints.wait() if wait else checkpoints.result())
        if snapshots is not None:
            self._note_snapshot(snapshots.saves.result(wait))

    def describe_loss(self) -> str:
        """What would be lost if the process ended now; empty for nothing."""
        current, step = self._run.checkpoints.current, self._run.progress.step
        if current == step:
            return ""
        kept = f"up to step {current}" if current is not None else "nothing of this start"
        return f"{kept} is saved; what came after, up to step {step}, is lost and will be trained again"

    def _wait_logged(self, wait: Callable[[], SaveResult | None], what: str, step: int) -> SaveResult | None:
        """What `wait()` returns; if training stands still for that, a row says so."""
        before = time.monotonic()
        saved = wait()
        seconds = time.monotonic() - before
        if seconds > _SHORT_SECONDS:
            text = f"training stood still for {seconds:.1f} s until the {what} before was complete"
            self._run.logger.event(step, "waited", text)
        return saved

    def _sync(self) -> None:
        """No row of a step that is kept, nor what it read, may be lost with the machine's power."""
        self._run.logger.sync()
        self._run.read_log.sync()

    def _note(self, saved: SaveResult | None) -> None:
        """Log how a save ended, if one has."""
        if saved is None:
            return
        if saved.error is not None:
            self._lost = self._lost or isinstance(saved.error, RunFolderLost)
            self._run.logger.event(saved.step, "save_failed", str(saved.error))
            self._requests.failed()
            return
        path = self._run.checkpoints.path(saved.step)
        self._run.logger.event(saved.step, "checkpoint", f"{path}; {_describe_time(saved)}")
        self._requests.saved()

    def _note_snapshot(self, saved: SaveResult | None) -> None:
        """Log a snapshot that ended otherwise than the one before; there may be one every few seconds."""
        if saved is None or self._snapshots_fail is (saved.error is not None):
            return
        self._snapshots_fail = saved.error is not None
        self._lost = self._lost or isinstance(saved.error, RunFolderLost)
        text = f"kept in memory; {_describe_time(saved)}; from now on only a change of this is logged"
        self._run.logger.event(saved.step, "snapshot_failed" if saved.error else "snapshot", str(saved.error or text))


def _describe_time(saved: SaveResult) -> str:
    return f"training stood still for {saved.blocked_seconds:.3f} s of {saved.seconds:.3f} s"
