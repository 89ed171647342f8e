"""The checkpoints of one run: which there are, which is the newest that can be used, which go.

The order is that of the step numbers. A damaged checkpoint is named and passed over; one that does not fit the model
is an error at once, for then an older one would not fit either.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from titanlite.checkpoint import storage
from titanlite.checkpoint.background import Saved, Warn, Writings
from titanlite.checkpoint.examine import BEGINS_WITH, newest_at_first
from titanlite.checkpoint.format import DamagedCheckpointError, Manifest, Scalar, folder_name
from titanlite.checkpoint.load import load_state
from titanlite.checkpoint.ranks import ALONE, Ranks
from titanlite.checkpoint.save import Facts, Staging, portion_of, save_state
from titanlite.errors import CheckpointError, RunFolderLost
from titanlite.files import cause
from titanlite.models.shard import Shard

VALIDATION_LOSS = "validation_loss"
"""The value beside a checkpoint's tensors that tells which are the best ones."""
BACK_TO = "rollback_to"
"""The value that names the step which a rollback goes back to, where that is an earlier one; -1: what the run began
with. A checkpoint that has it stays until there is a newer one, and takes no other's place."""


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay when a newer one is committed; see `recipe.sections.Checkpoint`."""

    last: int = 0
    every: int = 0
    best: int = 0


class CheckpointManager:
    """Saves to and loads from `folder`, and deletes what `keep` does not name.

    Every one of the `ranks` processes of a run has one, over the same folder; what saves and loads is called by all of
    them and ends alike on all. With `background`, a save stops training only while this rank's portion is copied to
    the host's memory; there is one save at a time. `warn` gets, on the first rank, a sentence for whatever went wrong
    without ending the run. Making one touches no file; a process that only reads needs no more than that.
    """

    def __init__(
        self,
        folder: Path,
        warn: Warn,
        ranks: Ranks = ALONE,
        keep: Keep = Keep(),
        background: bool = False,
        max_failures: int = 0,
        require_own: Callable[[], None] = lambda: None,
    ) -> None:
        """`max_failures`: saves that may fail one after the other.

        `require_own`, on the first rank before each save, raises `RunFolderLost` if the run may not write any more.
        """
        self.folder = folder
        self.current: int | None = None
        """Step of the checkpoint that this process last committed or loaded, known to be whole."""
        self._ranks = ranks
        self._keep = keep
        self._warn = warn if ranks.is_first else lambda text: None
        self._passed_over: set[int] = set()
        self._staging = Staging() if background else None
        self._writings = Writings(self._warn, background)
        self._begun: int | None = None
        """Step of the save begun last, unless all ranks know that it failed; of the checkpoint loaded, before any."""
        self._max_failures = max_failures
        self._failed: list[CheckpointError] = []
        """Of the saves since the last that was committed."""
        self._require_own = require_own
        self._validation_losses: dict[int, float] = {}
        self._extra: set[int] = set()
        """Steps of checkpoints that a stop left between two others, as far as this process met them."""
        self._place: int | None = None
        """Descriptor of the folder that was prepared: held open, for the number of a deleted one is given away."""

    def prepare(self) -> None:
        """Make the folder and clear what a killed process left there.

        For the first rank alone, holding the run folder's lock, before any rank looks for checkpoints.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            storage.clear_leftovers(self.folder)
            self._place = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"cannot use {self.folder} for checkpoints: {cause(error, self.folder)}.") from error

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, ascending."""
        return storage.checkpoint_steps(self.folder)

    def latest(self) -> int | None:
        """The newest committed step, whole or damaged; None if there is none."""
        return max(self.steps(), default=None)

    def path(self, step: int) -> Path:
        return self.folder / folder_name(step)

    def begin(self, tensors: Mapping[str, Shard], facts: Facts) -> None:
        """Begin a checkpoint of a state, which may change once this returns; `ended` and `wait` tell how it went.

        In the foreground it has ended by then. One that was begun before must have ended, since its memory is needed.
        """
        began, step = time.monotonic(), facts.step
        self._writings.require_none()
        self._note_extra(step, facts.values)
        extra = frozenset(self._extra)
        portion = portion_of(tensors)
        if self._staging is not None:
            portion = self._staging.copy(portion)

        def write(warn: Warn) -> None:
            self._ranks.first(self._require_same_place)
            self._ranks.first(lambda: self._set_aside_before_saving(step, warn))
            doubt = save_state(self.path(step), portion, facts, self._ranks)
            self._validation_losses.pop(step, None)
            if doubt:
                warn(doubt)
            else:
                self._ranks.first(lambda: self._prune(warn, extra))

        self._begun = step
        self._writings.begin(step, write, began)

    def saves(self, step: int) -> bool:
        """Whether the checkpoint of `step` is there or being written; the same on all ranks after the same step."""
        return step == self._begun

    def ended(self) -> Saved | None:
        """How the save went that was begun last; None if there is none, or it goes on. Told once, here or by `wait`."""
        saved = self._writings.ended()
        if saved is None:
            return None
        if saved.error is None:
            self.current, self._failed = saved.step, []
            self._passed_over.discard(saved.step)
        else:
            self._failed.append(saved.error)
        return saved

    def wait(self) -> Saved | None:
        """As `ended`, once the save has ended. To be called by all ranks after the same step.

        Raises `CheckpointError` if more saves than may have failed one after the other, and `RunFolderLost`.
        """
        self._writings.join()
        saved = self.ended()
        self._begun = self.current
        if self._failed and isinstance(self._failed[-1], RunFolderLost):  # trying again would do harm
            raise self._failed[-1]
        if len(self._failed) > self._max_failures:
            again = f" ({len(self._failed)} saves in a row have failed.)" if self._max_failures else ""
            raise CheckpointError(f"{self._failed[-1]}{again}") from self._failed[-1]
        return saved

    def close(self) -> None:
        """Wait for a save in the background, for a run that ends without asking how it went."""
        self._writings.join()

    def load(self, step: int, tensors: Mapping[str, Shard], prefix: str = "") -> Manifest:
        """Load one checkpoint into `tensors` (see `load_state`). Raises `CheckpointError`."""
        manifest = load_state(self.path(step), tensors, prefix, self._ranks)
        self.current = self._begun = step
        self._note_extra(step, manifest.values)
        return manifest

    def _note_extra(self, step: int, values: Mapping[str, Scalar]) -> None:
        (self._extra.add if BACK_TO in values else self._extra.discard)(step)

    def forget_current(self) -> None:
        """The checkpoint of this step is to be written anew."""
        self.current = self._begun = None

    def begins_with(self, path: Path) -> Path:
        """The newest checkpoint at `path` as the first rank saw it when this run began; the run there may go on.

        Raises as `examine.newest_at_first` does.
        """
        record = self.folder / BEGINS_WITH
        return Path(os.fsdecode(self._ranks.first(lambda: os.fsencode(newest_at_first(path, record)))))

    def load_from(
        self, folder: Path, tensors: Mapping[str, Shard], prefix: str = "", convert: bool = False
    ) -> Manifest:
        """Load another run's checkpoint, which stays as it is. Raises `CheckpointError`."""
        return load_state(folder, tensors, prefix, self._ranks, convert)

    def load_chosen(self, step: int, tensors: Mapping[str, Shard]) -> Manifest:
        """`load`, with an answer for a step that there is none of. Raises `CheckpointError`."""
        steps = self.agreed_steps()
        if step not in steps:
            there = f"there are those of {', '.join(map(str, steps))}" if steps else "there is none"
            raise CheckpointError(f"{self.folder} holds no checkpoint of step {step}; {there}.")
        return self.load(step, tensors)

    def set_aside_after(self, step: int) -> None:
        """Rename later checkpoints, so that none of them is ever the latest again. Raises `CheckpointError`."""
        self._ranks.first(lambda: self._set_aside_after(step, self.steps()))

    def load_latest(
        self,
        tensors: Mapping[str, Shard],
        prefix: str = "",
        newer: Callable[[int], Manifest | None] = lambda step: None,
        last: int | None = None,
    ) -> Manifest | None:
        """Load the newest checkpoint that is whole, of those up to step `last`; None if there has never been one.

        Before one of a step is tried, `newer` may load something else that is of a later one; it is asked with step 0
        once there is none to try.

        Raises `CheckpointError` if there are some and none can be used, if one does not fit, or if there are ranks
        that do not see the folder.
        """
        steps = self.agreed_steps(last)
        damages: list[str] = []
        for step in reversed(steps):
            other = newer(step)
            if other is not None:
                return other
            try:
                manifest = self.load(step, tensors, prefix)
            except DamagedCheckpointError as damage:
                damages.append(str(damage))
                self._passed_over.add(step)
                self._warn(f"{damage} The checkpoint of step {step} is passed over.")
                continue
            if damages:
                again = max(steps) - step
                self._warn(
                    f"going on from step {step}: {again} {'step' if again == 1 else 'steps'} will be trained again."
                )
            return manifest
        other = newer(0)
        if other is not None:
            return other
        if damages and self.agreed_steps(last) != steps:  # a reader beside a run, which has saved and deleted meanwhile
            return self.load_latest(tensors, prefix, newer, last)
        if damages:
            listed = "\n  ".join(damages)
            raise CheckpointError(
                f"no usable checkpoint in {self.folder}; every one is damaged:\n  {listed}\n"
                "Restore one of them from a copy, or start over with --fresh --force."
            )
        return None

    def agreed_steps(self, last: int | None = None) -> list[int]:
        """Steps (up to `last`) with a committed checkpoint, on all ranks those that the first one sees."""
        self._require_shared_folder()
        listed: list[int] = json.loads(self._ranks.first(lambda: json.dumps(self.steps()).encode()))
        return [step for step in listed if last is None or step <= last]

    def _require_shared_folder(self) -> None:
        """Raises `CheckpointError` before any training is lost to a folder that is another one on another machine."""
        if self._ranks.size == 1:
            return
        mark = os.fsdecode(self._ranks.first(self._mark))
        try:
            self._ranks.each(lambda: self._look_for(mark))
        finally:
            if self._ranks.is_first:
                with suppress(OSError):  # the next start clears it
                    os.remove(self.folder / mark)

    def _mark(self) -> bytes:
        try:
            return os.fsencode(storage.leave_mark(self.folder).name)
        except OSError as error:
            raise CheckpointError(f"cannot write to {self.folder}: {cause(error, self.folder)}.") from error

    def _look_for(self, mark: str) -> None:
        if not (self.folder / mark).exists():
            raise CheckpointError(
                f"{self.folder} is not the folder that the first rank writes to. Every machine must see the same one: "
                "set run.output_dir to a folder that they share."
            )

    def _require_same_place(self) -> None:
        """Raises `CheckpointError` or `RunFolderLost` rather than let a run write into a folder that is not, or no
        longer, its own.
        """
        try:
            same = self._place is None or os.path.samestat(os.fstat(self._place), os.stat(self.folder))
        except OSError:
            same = False
        if not same:
            raise CheckpointError(
                f"{self.folder} is no longer the folder that this run began in: it was removed, moved or replaced. "
                "Nothing is written there; move it back, and the next save will find it."
            )
        self._require_own()

    def _set_aside_before_saving(self, step: int, warn: Warn) -> None:
        """Checkpoints that loading passed over: later ones must not be 'latest' again, and none counts as kept."""
        for other in self.steps():
            if other > step or (other < step and other in self._passed_over):
                self._set_aside(other, "was passed over", warn)

    def _set_aside_after(self, step: int, steps: Sequence[int]) -> None:
        for later in steps:
            if later > step:
                self._set_aside(later, f"is later than step {step}", self._warn)

    def _set_aside(self, step: int, why: str, warn: Warn) -> None:
        try:
            aside = storage.set_aside(self.path(step))
        except OSError as error:
            raise CheckpointError(f"cannot rename {self.path(step)}: {cause(error, self.folder)}.") from error
        warn(f"the checkpoint of step {step}, which {why}, is now {aside.name}.")

    def _prune(self, warn: Warn, extra: Set[int]) -> None:
        try:
            steps = self.steps()
        except CheckpointError as error:  # no reason to take the one just committed for a failed one
            warn(str(error))
            return
        kept = self._best(steps)
        old = storage.superseded([step for step in steps if step not in extra], self._keep.last, self._keep.every)
        if self._keep.last:
            old += [step for step in steps[:-1] if step in extra]
        for step in old:
            if step in kept:
                continue
            try:
                storage.remove(self.path(step))
            except OSError as error:
                warn(f"cannot delete the old checkpoint {self.path(step)}: {cause(error, self.folder)}.")

    def _best(self, steps: Sequence[int]) -> list[int]:
        """The `keep.best` steps of the lowest validation loss, and those of which it cannot be read just now."""
        if not self._keep.best:
            return []
        unread = []
        for step in steps:
            if step not in self._validation_losses:
                try:
                    self._validation_losses[step] = _validation_loss(self.path(step))
                except CheckpointError:
                    unread.append(step)
        known = [step for step in steps if math.isfinite(self._validation_losses.get(step, math.inf))]
        return unread + sorted(known, key=lambda step: (self._validation_losses[step], -step))[: self._keep.best]


def _validation_loss(folder: Path) -> float:
    """The one that stands in a checkpoint's manifest; infinite if none does. Raises `CheckpointError`."""
    value = storage.read_manifest(folder).values.get(VALIDATION_LOSS)
    return float(value) if isinstance(value, int | float) else math.inf
