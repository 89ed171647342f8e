"""Where a run is, and what a checkpoint says of its past beside tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from titanlite.checkpoint.format import Manifest, Scalar
from titanlite.checkpoint.manager import BACK_TO, VALIDATION_LOSS
from titanlite.data.read_log import REORDERED

# Values of a checkpoint that a run resumes with, beside those of `manager`:
_GONE_BACK = "rolled_back"  # nothing was saved since the run went back to the step of `BACK_TO`, or to this one
_SKIPPED_SINCE = "skipped_since"  # first of the steps skipped in a row, up to this one
_BAD_VALIDATION = "nonfinite_validation"  # the validation loss after this step was not finite


@dataclass
class Progress:
    """What is done, the step in hand, and the decisions and results that later steps depend on."""

    step: int = 0  # steps taken so far
    samples: int = 0  # samples read so far: where in the order the next step begins
    tokens: int = 0  # tokens trained on so far
    under_way: tuple[int, int | None] = (1, None)
    """The step that is being taken and its first sample (None before the first batch): blamed for what fails now."""
    back_to: int = -1
    """The step that a rollback goes back to: one that a run without stops would have saved too; -1: the start."""
    gone_back: bool = False  # whether the run went back there, and has saved nothing since
    validated: tuple[int, float] | None = None  # last step with a validation; its loss on the first set, or not finite
    reordered: list[int] = field(default_factory=list)  # steps that were the first in another order of samples

    def resume(self, manifest: Manifest | None, reordered: list[int]) -> tuple[int, int]:
        """Be where the checkpoint with this manifest was written, or at the start without one; returns the first and
        the last of the steps skipped in a row up to there.
        """
        self.reordered = reordered
        if manifest is None:
            self.step = self.samples = self.tokens = 0
            self.back_to, self.gone_back, self.validated = -1, False, None
            return 1, 0
        self.step, self.samples, self.tokens = manifest.step, manifest.samples, manifest.tokens
        values = manifest.values  # which may come from anybody
        back_to, since = values.get(BACK_TO), values.get(_SKIPPED_SINCE)
        self.back_to = back_to if isinstance(back_to, int) else self.step
        self.gone_back = bool(values.get(_GONE_BACK))
        loss = math.nan if values.get(_BAD_VALIDATION) else values.get(VALIDATION_LOSS)
        self.validated = (self.step, float(loss)) if isinstance(loss, int | float) else None
        return since if isinstance(since, int) else self.step + 1, self.step

    @property
    def validation_loss(self) -> float | None:
        """After this step; None if the model was not validated then."""
        return self.validated[1] if self.validated is not None and self.validated[0] == self.step else None

    def values(self, skips: tuple[int, int], rolls_back: bool) -> dict[str, Scalar]:
        """What a checkpoint of this step says; `skips` are the steps skipped in a row up to now."""
        values: dict[str, Scalar] = {}
        if self.reordered:
            values[REORDERED] = " ".join(map(str, self.reordered))
        if (loss := self.validation_loss) is not None:
            values |= {VALIDATION_LOSS: loss} if math.isfinite(loss) else {_BAD_VALIDATION: True}
        if rolls_back and self.back_to != self.step:
            values[BACK_TO] = self.back_to
        if self.gone_back:
            values[_GONE_BACK] = True
        first, last = skips
        if first <= last == self.step:
            values[_SKIPPED_SINCE] = first
        return values
