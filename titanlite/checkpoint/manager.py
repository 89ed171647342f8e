"""The checkpoints of one run: which there are, which is the newest that can be used, which go.

The order is that of the step numbers. A damaged checkpoint is named and passed over; one that does not fit the model
is an error at once, for then an older one would not fit either.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from functools import partial
from pathlib import Path

from titanlite.checkpoint import storage
from titanlite.checkpoint.format import CheckpointMetadata, Manifest, Scalar, folder_name
from titanlite.checkpoint.load import load_state
from titanlite.checkpoint.save import BackgroundSaver, LocalSavePlan, SaveResult, Warn, save_state
from titanlite.errors import CheckpointError, DamagedCheckpointError, RunFolderLost
from titanlite.files import read_json, replace_file
from titanlite.models.shard import Shard
from titanlite.parallel.ranks import ALONE, Ranks
from titanlite.recipe.sections import Checkpoint
from titanlite.text import pluralize

VALIDATION_LOSS = "validation_loss"  # the value beside a checkpoint's tensors that tells which are the best ones
BACK_TO = "rollback_to"
"""The value that names the step which a rollback goes back to, where that is an earlier one; -1: what the run began
with. A checkpoint that has it stays until there is a newer one, and takes no other's place."""
_KEEP_ALL = Checkpoint(mode="sync", keep_last=0, max_failures=0)
Load = Callable[[], Manifest]


class CheckpointManager:
    """Saves to and loads from `folder`, one save at a time, as the recipe's `section` says.

    Every one of the `ranks` processes of a run has one, over the same folder; what saves and loads is called by all of
    them and ends alike on all. `warn` gets, on rank 0, a sentence for whatever went wrong without ending the run;
    `require_own`, called there before each save, raises `RunFolderLost` if the run may not write any more. Making one
    touches no file.
    """

    def __init__(
        self,
        folder: Path,
        warn: Warn,
        ranks: Ranks = ALONE,
        section: Checkpoint = _KEEP_ALL,
        require_own: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self.current: int | None = None  # step of the checkpoint last committed or loaded here, known to be whole
        self.ranks = ranks
        self._section = section
        self._warn = warn if ranks.is_first else lambda text: None
        self._passed_over: set[int] = set()
        self._saver = BackgroundSaver(self._warn, background=section.mode == "async")
        self._begun: int | None = None  # the step of a save from its beginning until `wait`; then as `current`
        self._failed: list[Exception] = []  # of the saves since the last that was committed
        self._require_own = require_own
        self._validation_losses: dict[int, float] = {}
        self._extra: set[int] = set()  # steps of checkpoints with `BACK_TO`, as far as this process met them
        self._opened: int | None = None
        """Descriptor of the folder that was prepared: held open, for the number of a deleted one is given away."""

    def prepare(self) -> None:
        """Make the folder and clear what a killed process left there. For rank 0 alone, which holds the run's lock,
        before any rank looks for checkpoints.
        """
        with storage.wrap_os_errors(f"cannot use {self.folder} for checkpoints", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            storage.clear_leftovers(self.folder)
            self._opened = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, ascending."""
        return storage.checkpoint_steps(self.folder)

    def path(self, step: int) -> Path:
        return self.folder / folder_name(step)

    # --- saving

    def begin(self, tensors: Mapping[str, Shard], metadata: CheckpointMetadata) -> None:
        """Begin a checkpoint of a state, which may change once this returns; `result` and `wait` tell how it ended."""
        step = metadata.step
        self._note_extra(step, metadata.values)
        extra = frozenset(self._extra)

        def write(plan: LocalSavePlan, warn: Warn) -> None:
            self.ranks.run_on_rank0(lambda: self._make_ready(step, warn))
            doubt = save_state(self.path(step), plan, metadata, self.ranks)
            self._validation_losses.pop(step, None)
            if doubt:
                warn(doubt)
            else:
                self.ranks.run_on_rank0(lambda: self._prune(warn, extra))

        self._saver.begin(step, tensors, write)
        self._begun = step

    def covers(self, step: int) -> bool:
        """Whether the checkpoint of `step` is there or being written; the same on all ranks after the same step."""
        return step == self._begun

    def result(self, wait: bool = False) -> SaveResult | None:
        """How the save ended that was begun last; see `BackgroundSaver.result`."""
        saved = self._saver.result(wait)
        if saved and saved.error:
            self._failed.append(saved.error)
        elif saved:
            self.current, self._failed = saved.step, []
            self._passed_over.discard(saved.step)
        return saved

    def wait(self) -> SaveResult | None:
        """`result`, once the save has ended. To be called by all ranks after the same step. Raises `RunFolderLost`, and
        `CheckpointError` if more saves than may have failed one after the other.
        """
        saved = self.result(wait=True)
        self._begun = self.current
        if self._failed and isinstance(self._failed[-1], RunFolderLost):  # trying again would do harm
            raise self._failed[-1]
        if len(self._failed) > self._section.max_failures:
            again = f" ({len(self._failed)} saves in a row have failed.)" if len(self._failed) > 1 else ""
            raise CheckpointError(f"{self._failed[-1]}{again}") from self._failed[-1]
        return saved

    def forget_current(self) -> None:
        """The checkpoint of this step is to be written anew."""
        self.current = self._begun = None

    # --- loading

    def load(self, step: int, tensors: Mapping[str, Shard], prefix: str = "") -> Manifest:
        """Load one checkpoint into `tensors` (see `load_state`). Raises `CheckpointError`."""
        manifest = load_state(self.path(step), tensors, prefix, self.ranks)
        self.current = self._begun = step
        self._note_extra(step, manifest.values)
        return manifest

    def load_chosen(self, step: int, tensors: Mapping[str, Shard]) -> Manifest:
        """`load`, with an answer for a step that there is none of. Raises `CheckpointError`."""
        steps = self.agree_on_steps()
        if step not in steps:
            there = f"there are those of {', '.join(map(str, steps))}" if steps else "there is none"
            raise CheckpointError(f"{self.folder} holds no checkpoint of step {step}; {there}.")
        return self.load(step, tensors)

    def load_latest(
        self,
        tensors: Mapping[str, Shard],
        prefix: str = "",
        last: int | None = None,
        snapshots: Sequence[tuple[int, Load]] = (),
    ) -> Manifest | None:
        """Load the newest checkpoint that is whole, of those up to step `last`, or the snapshot (a step, and what loads
        it) that is later; None if there has never been one.

        Raises `CheckpointError` if there are checkpoints and none can be used, if one does not fit, or if there are
        ranks that do not see the folder.
        """
        steps = self.agree_on_steps(last)
        found: list[tuple[int, str, Load]] = [
            *((step, "checkpoint", partial(self.load, step, tensors, prefix)) for step in steps),
            *((step, "snapshot", load) for step, load in snapshots),
        ]
        damages: list[str] = []
        for step, what, load in sorted(found, key=lambda each: each[0], reverse=True):  # of one step, checkpoints first
            try:
                manifest = load()
            except DamagedCheckpointError as damage:
                self._warn(f"{damage} The {what} of step {step} is passed over.")
                if what == "checkpoint":
                    damages.append(str(damage))
                    self._passed_over.add(step)
                continue
            if what == "snapshot":
                self._warn(f"going on from the snapshot of step {step} in memory.")
            elif damages:
                self._warn(f"going on from step {step}: {pluralize(steps[-1] - step, 'step')} will be trained again.")
            return manifest
        if not damages:
            return None
        if self.agree_on_steps(last) != steps:  # a reader beside a run, which has saved and deleted meanwhile
            return self.load_latest(tensors, prefix, last, snapshots)
        raise CheckpointError(
            "\n  ".join([f"no usable checkpoint in {self.folder}; every one is damaged:", *damages])
            + "\nRestore one of them from a copy, or start over with --fresh --force."
        )

    def begins_with(self, path: Path) -> Path:
        """`storage.newest_at(path)` as rank 0 saw it when this run began, by a record in the folder: the run there may
        have saved since. Asked anew for another path, and for a checkpoint that is gone.
        """
        record = self.folder / storage.BEGINS_WITH

        def find() -> str:
            with suppress(OSError, ValueError, KeyError, TypeError):
                known = read_json(record)
                if known["path"] == str(path) and Path(known["checkpoint"]).is_dir():
                    return str(known["checkpoint"])
            newest = str(storage.newest_at(path))
            with storage.wrap_os_errors(f"cannot write {record}", record):
                replace_file(record, json.dumps({"path": str(path), "checkpoint": newest}).encode())
            return newest

        return Path(self.ranks.run_on_rank0(find))

    def agree_on_steps(self, last: int | None = None) -> list[int]:
        """Steps (up to `last`) with a committed checkpoint, on all ranks those that rank 0 sees.

        Raises `CheckpointError` before any training is lost to a folder that is another one on another machine.
        """
        ranks, folder = self.ranks, self.folder

        def require_all(seen: list[bool]) -> None:
            if not all(seen):
                raise CheckpointError(
                    f"what rank {seen.index(False)} finds at {folder} is not the folder that the first rank writes to. "
                    "Every machine must see the same one: set run.output_dir to a folder that they share."
                )

        if ranks.size > 1:
            wrapped = storage.wrap_os_errors(f"cannot write to {folder}", folder)
            mark: str = ranks.run_on_rank0(wrapped(lambda: storage.leave_mark(folder)))
            try:
                ranks.run_on_all_ranks((folder / mark).exists, require_all)
            finally:
                if ranks.is_first:
                    with suppress(OSError):  # the next start clears it
                        os.remove(folder / mark)
        return [step for step in self.ranks.run_on_rank0(self.steps) if last is None or step <= last]

    def set_aside_after(self, step: int) -> None:
        """Rename later checkpoints, so that none of them is ever the latest again. Raises `CheckpointError`."""
        why = f"is later than step {step}"
        self.ranks.run_on_rank0(lambda: self._set_aside([s for s in self.steps() if s > step], why, self._warn))

    # --- on rank 0

    def _note_extra(self, step: int, values: Mapping[str, Scalar]) -> None:
        (self._extra.add if BACK_TO in values else self._extra.discard)(step)

    def _make_ready(self, step: int, warn: Warn) -> None:
        """Before a save of `step`: the folder must be the run's own, and checkpoints that loading passed over go
        aside, since later ones must not be 'latest' again, and none counts as kept.
        """
        try:
            same = self._opened is None or os.path.samestat(os.fstat(self._opened), os.stat(self.folder))
        except OSError:
            same = False
        if not same:
            raise CheckpointError(
                f"{self.folder} is no longer the folder that this run began in: it was removed, moved or replaced. "
                "Nothing is written there; move it back, and the next save will find it."
            )
        self._require_own()
        aside = [other for other in self.steps() if other > step or (other < step and other in self._passed_over)]
        self._set_aside(aside, "was passed over", warn)

    def _set_aside(self, steps: Sequence[int], why: str, warn: Warn) -> None:
        """Rename checkpoints out of the order of steps, losing nothing. Raises `CheckpointError`."""
        for step in steps:
            paths = (self.folder / f"set-aside-{number}-{folder_name(step)}" for number in itertools.count(1))
            with storage.wrap_os_errors(f"cannot rename {self.path(step)}", self.folder):
                aside = next(path for path in paths if not path.exists())
                os.rename(self.path(step), aside)
            warn(f"the checkpoint of step {step}, which {why}, is now {aside.name}.")

    def _prune(self, warn: Warn, extra: Set[int]) -> None:
        try:
            steps = self.steps()
        except CheckpointError as error:  # no reason to take the one just committed for a failed one
            warn(str(error))
            return
        kept = self._best(steps)
        usual, last = [step for step in steps if step not in extra], self._section.keep_last
        old = storage.select_superseded(usual, last, self._section.keep_every)
        old += [step for step in steps[:-1] if step in extra and last]
        for step in old:
            if step not in kept:
                storage.remove_or_warn(self.path(step), warn)

    def _best(self, steps: Sequence[int]) -> list[int]:
        """The `keep_best` steps of the lowest validation loss, and those of which it cannot be read just now."""
        if not self._section.keep_best:
            return []
        losses, unread = self._validation_losses, []
        for step in steps:
            if step not in losses:
                try:
                    value = storage.read_manifest(self.path(step)).values.get(VALIDATION_LOSS)
                    losses[step] = float(value) if isinstance(value, int | float) else math.inf
                except CheckpointError:
                    unread.append(step)
        known = [step for step in steps if math.isfinite(losses.get(step, math.inf))]
        return unread + sorted(known, key=lambda step: (losses[step], -step))[: self._section.keep_best]
