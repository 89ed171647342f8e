"""What a run keeps of itself: its checkpoints and snapshots, when they are asked for, and what is logged of them.

The trainer says which state after which step; when a save is due on all ranks it learns from `resilience.signals`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from titanlite.checkpoint.format import CheckpointMetadata
from titanlite.checkpoint.manager import CheckpointManager
from titanlite.checkpoint.requests import SAVE_NOW, SaveRequests
from titanlite.checkpoint.save import SaveResult
from titanlite.checkpoint.snapshots import Snapshots
from titanlite.data.read_log import ReadLog
from titanlite.errors import GuardStop, RunFolderLost, StoppedEarly, UsageError
from titanlite.models.shard import Shard
from titanlite.observe.logger import RunLogger
from titanlite.resilience.watchdog import Watchdog

_LONGEST_PAUSE_SECONDS = 30.0
"""Between two attempts to save what a run ends with."""
_SHORT_SECONDS = 1.0
"""Shorter waits are not logged."""


def usable_snapshots(
    snapshots: Snapshots | None, state: Mapping[str, Shard], restarted: bool, say: Callable[[str], None]
) -> Snapshots | None:
    """The snapshots, if the machines can keep any of `state`. A restart resumes without rather than not at all."""
    if snapshots is None:
        return None
    try:
        snapshots.prepare()
        snapshots.require_room(state)
    except UsageError as error:
        if not restarted:
            raise
        say(f"warning: no snapshots are taken: {error}")
        return None
    return snapshots


class Saving:
    """Saves of one run, and their log. What it does, all ranks do after the same step."""

    def __init__(
        self,
        checkpoints: CheckpointManager,
        snapshots: Snapshots | None,
        logger: RunLogger,
        read_log: ReadLog,
        watchdog: Watchdog,
        every_minutes: float,
        is_rank0: bool,
    ) -> None:
        """`is_rank0`: it alone reads the clock and looks for the file that asks for a save."""
        self.checkpoints = checkpoints
        self.snapshots = snapshots
        self._logger = logger
        self._read_log = read_log
        self._watchdog = watchdog
        self._requests = SaveRequests(checkpoints.folder.parent / SAVE_NOW, every_minutes, logger.info, is_rank0)
        self._lost = False
        """Whether a save has found that the run folder may be another process's."""
        self._snapshots_fail: bool | None = None
        """Whether the last one did; None before the first."""

    def due(self) -> bool:
        """Whether the clock or the user asks for a checkpoint, on this rank; or the loss of the run folder does, which
        a rank may know of before others do, and which ends the run where all of them save.
        """
        return self._lost or self._requests.due()

    def covers(self, step: int) -> bool:
        """Whether there is a checkpoint of `step`, or one is being written: another would be none the better."""
        return self.checkpoints.covers(step)

    def begin(self, tensors: Mapping[str, Shard], metadata: CheckpointMetadata) -> None:
        """Begin a checkpoint, once the one before has ended. Raises `CheckpointError` if too many have failed."""
        self._requests.begun()
        if self.covers(metadata.step):
            return
        with self._watchdog.during("saving"):
            self._note(self._wait_logged(self.checkpoints.wait, "checkpoint", metadata.step))
            self._sync()
            self.checkpoints.begin(tensors, metadata)
        self.look()

    def commit(self, tensors: Mapping[str, Shard], metadata: CheckpointMetadata) -> None:
        """Return once there is a checkpoint of this state. Raises `CheckpointError` when that has failed too often."""
        pause = 1.0
        while self.checkpoints.current != metadata.step:
            with self._watchdog.during("saving"):
                self.begin(tensors, metadata)
                self._note(self.checkpoints.wait())
                if self.checkpoints.current != metadata.step:
                    time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def commit_instead(self, tensors: Mapping[str, Shard], metadata: CheckpointMetadata) -> None:
        """As `commit`, in place of the checkpoint that there may be of the same step, and of all snapshots."""
        self.checkpoints.forget_current()
        self.commit(tensors, metadata)
        if self.snapshots is not None:
            self.snapshots.begin_generation()

    def take_snapshot(self, tensors: Mapping[str, Shard], metadata: CheckpointMetadata) -> None:
        """Begin a snapshot, once the one before has ended."""
        assert self.snapshots is not None, "the recipe asks for none"
        with self._watchdog.during("saving"):
            self._note_snapshot(self._wait_logged(self.snapshots.saves.wait, "snapshot", metadata.step))
            self._sync()
            self.snapshots.begin(tensors, metadata)

    def look(self) -> None:
        """Log what has ended."""
        self._note(self.checkpoints.result())
        if self.snapshots is not None:
            self._note_snapshot(self.snapshots.saves.result())

    def settle(self) -> None:
        """Return once nothing is being written. Raises `CheckpointError` if too many saves have failed."""
        self._note(self.checkpoints.wait())
        if self.snapshots is not None:
            self._note_snapshot(self.snapshots.saves.wait())

    @contextmanager
    def finished(self, alone: bool) -> Iterator[None]:
        """Let a save in the background end before an error ends the run, unless it may wait for ranks that are gone.

        What ends all ranks alike is a guard; any other error may be this rank's alone, if it is not `alone`.
        """
        try:
            yield
        except StoppedEarly:
            self._free_memory()
            raise
        except Exception as error:
            if alone or type(error) is GuardStop:
                self.checkpoints.close()
                self._note(self.checkpoints.result())
            raise
        self._free_memory()

    def describe_loss(self, step: int) -> str:
        """What would be lost if the process ended now, after `step`; empty for nothing."""
        current = self.checkpoints.current
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
            self._logger.event(step, "waited", text)
        return saved

    def _sync(self) -> None:
        """No row of a step that is kept, nor what it read, may be lost with the machine's power."""
        self._logger.sync()
        self._read_log.sync()

    def _free_memory(self) -> None:
        """The run has ended with its state on a disk."""
        if self.snapshots is not None:
            self.snapshots.close()

    def _note(self, saved: SaveResult | None) -> None:
        """Log how a save ended, if one has."""
        if saved is None:
            return
        if saved.error is not None:
            self._lost = self._lost or isinstance(saved.error, RunFolderLost)
            self._logger.event(saved.step, "save_failed", str(saved.error))
            self._requests.failed()
            return
        self._logger.event(saved.step, "checkpoint", f"{self.checkpoints.path(saved.step)}; {_describe_time(saved)}")
        self._requests.saved()

    def _note_snapshot(self, saved: SaveResult | None) -> None:
        """Log a snapshot that ended otherwise than the one before; there may be one every few seconds."""
        if saved is None or self._snapshots_fail is (saved.error is not None):
            return
        self._snapshots_fail = saved.error is not None
        self._lost = self._lost or isinstance(saved.error, RunFolderLost)
        text = f"kept in memory; {_describe_time(saved)}; from now on only a change of this is logged"
        self._logger.event(saved.step, "snapshot_failed" if saved.error else "snapshot", str(saved.error or text))


def _describe_time(saved: SaveResult) -> str:
    return f"training stood still for {saved.blocked_seconds:.3f} s of {saved.seconds:.3f} s"
