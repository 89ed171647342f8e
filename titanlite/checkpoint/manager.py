"""The checkpoints of one run: which there are, which is the newest that can be used, which go.

The order is that of the step numbers. A damaged checkpoint is named and passed over; one that does not fit the model
is an error at once, for then an older one would not fit either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from titanlite.checkpoint import storage
from titanlite.checkpoint.format import DamagedCheckpointError, Manifest, Scalar, folder_name
from titanlite.checkpoint.load import Target, read_tensors
from titanlite.checkpoint.save import save_state
from titanlite.durable import cause
from titanlite.errors import CheckpointError


class CheckpointManager:
    """Saves to and loads from `folder`, keeping the newest `keep_last` checkpoints (None: all).

    `warn` gets one sentence for whatever went wrong without ending the run. Making one touches no file; a process that
    only reads (generation, export) needs no more than that.
    """

    def __init__(self, folder: Path, keep_last: int | None, warn: Callable[[str], None]) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.current: int | None = None
        """Step of the checkpoint that this process last committed or loaded, known to be whole."""
        self._warn = warn
        self._passed_over: set[int] = set()

    def prepare(self) -> None:
        """Make the folder and clear what a killed process left there; call once, holding the run folder's lock."""
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
        tensors: Mapping[str, torch.Tensor],
        values: Mapping[str, Scalar],
        recipe_text: str,
    ) -> Path:
        """Commit a checkpoint after `step` steps, then delete those that need not be kept; returns its folder.

        Raises `CheckpointError` if it cannot be written; all others are then still there.
        """
        self._set_aside_before_saving(step)
        final = self.path(step)
        save_state(final, step=step, samples=samples, tokens=tokens, tensors=tensors, values=values, recipe=recipe_text)
        self.current = step
        self._passed_over.discard(step)
        self._prune()
        return final

    def load(self, step: int, tensors: Mapping[str, Target], prefix: str = "") -> Manifest:
        """Load one checkpoint into `tensors` (see `read_tensors`). Raises `CheckpointError`."""
        folder = self.path(step)
        manifest = storage.read_manifest(folder)
        read_tensors(folder, manifest, tensors, prefix)
        self.current = step
        return manifest

    def load_latest(self, tensors: Mapping[str, Target], prefix: str = "") -> Manifest | None:
        """Load the newest checkpoint that is whole; None if there has never been one.

        Raises `CheckpointError` if there are some and none can be used, or if one does not fit.
        """
        steps = self.steps()
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
        if self.keep_last is None:
            return
        for step in self.steps()[: -self.keep_last]:
            try:
                storage.remove(self.path(step))
            except OSError as error:
                self._warn(f"cannot delete the old checkpoint {self.path(step)}: {cause(error, self.folder)}.")
