"""The checkpoints of one run: which there are, which is the newest that can be used, which go.

The order is that of the step numbers. A damaged checkpoint is named and passed over; one that does not fit the model
is an error at once, for then an older one would not fit either.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from titanlite.checkpoint import storage
from titanlite.checkpoint.format import DamagedCheckpointError, Manifest, Scalar, folder_name
from titanlite.checkpoint.load import load_state
from titanlite.checkpoint.ranks import Ranks
from titanlite.checkpoint.save import save_state
from titanlite.durable import cause
from titanlite.errors import CheckpointError
from titanlite.models.shard import Shard


class CheckpointManager:
    """Saves to and loads from `folder`, keeping the newest `keep_last` checkpoints (None: all) and, of the older ones,
    those of every `keep_every`-th step (0: none).

    Every one of the `ranks` processes of a run has one, over the same folder; `save`, `load` and `load_latest` are
    called by all of them and end alike on all. `warn` gets, on the first, one sentence for whatever went wrong without
    ending the run. Making one touches no file; a process that only reads (generation, export) needs no more than that.
    """

    def __init__(
        self,
        folder: Path,
        keep_last: int | None,
        warn: Callable[[str], None],
        rank: int = 0,
        ranks: int = 1,
        keep_every: int = 0,
    ) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.current: int | None = None
        """Step of the checkpoint that this process last committed or loaded, known to be whole."""
        self._ranks = Ranks(rank, ranks)
        self._warn = warn if self._ranks.is_first else lambda text: None
        self._passed_over: set[int] = set()

    def prepare(self) -> None:
        """Make the folder and clear what a killed process left there.

        For the first rank alone, holding the run folder's lock, before any rank looks for checkpoints.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            storage.clear_leftovers(self.folder)
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

    def save(
        self,
        *,
        step: int,
        samples: int,
        tokens: int,
        tensors: Mapping[str, Shard],
        values: Mapping[str, Scalar],
        recipe_text: str,
    ) -> Path:
        """Commit a checkpoint after `step` steps, then delete those that need not be kept; returns its folder.

        Raises `CheckpointError` if it cannot be written; all others are then still there.
        """
        self._ranks.first(lambda: self._set_aside_before_saving(step))
        final = self.path(step)
        save_state(
            final, step=step, samples=samples, tokens=tokens, tensors=tensors, values=values, recipe=recipe_text,
            ranks=self._ranks,
        )  # fmt: skip
        self.current = step
        self._passed_over.discard(step)
        self._ranks.first(self._prune)
        return final

    def load(self, step: int, tensors: Mapping[str, Shard], prefix: str = "") -> Manifest:
        """Load one checkpoint into `tensors` (see `load_state`). Raises `CheckpointError`."""
        manifest = load_state(self.path(step), tensors, prefix, self._ranks)
        self.current = step
        return manifest

    def load_latest(self, tensors: Mapping[str, Shard], prefix: str = "") -> Manifest | None:
        """Load the newest checkpoint that is whole; None if there has never been one.

        Raises `CheckpointError` if there are some and none can be used, if one does not fit, or if there are ranks
        that do not see the folder.
        """
        self._require_shared_folder()
        steps = json.loads(self._ranks.first(lambda: json.dumps(self.steps()).encode()))
        damages: list[str] = []
        for step in reversed(steps):
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
        if damages:
            listed = "\n  ".join(damages)
            raise CheckpointError(
                f"no usable checkpoint in {self.folder}; every one is damaged:\n  {listed}\n"
                "Restore one of them from a copy, or start over with --fresh --force."
            )
        return None

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

    def _set_aside_before_saving(self, step: int) -> None:
        """Checkpoints that loading passed over: later ones must not be 'latest' again, and none counts as kept."""
        for other in self.steps():
            if other <= step and (other == step or other not in self._passed_over):
                continue
            try:
                aside = storage.set_aside(self.path(other))
            except OSError as error:
                raise CheckpointError(f"cannot rename {self.path(other)}: {cause(error, self.folder)}.") from error
            self._warn(f"the checkpoint of step {other}, which was passed over, is now {aside.name}.")

    def _prune(self) -> None:
        for step in storage.superseded(self.steps(), self.keep_last or 0, self.keep_every):
            try:
                storage.remove(self.path(step))
            except OSError as error:
                self._warn(f"cannot delete the old checkpoint {self.path(step)}: {cause(error, self.folder)}.")
