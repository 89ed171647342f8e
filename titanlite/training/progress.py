"""Where a run is, and what a checkpoint says of its past beside tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from titanlite.checkpoint.format import Manifest, Scalar
from titanlite.checkpoint.manager import BACK_TO, VALIDATION_LOSS
from titanlite.data.audit import REORDERED

# Values of a checkpoint that a run resumes with, beside those of `manager`:
_GONE_BACK = "rolled_back"
"""Nothing was saved since the run went back to the step of `BACK_TO`, or to this one."""
_SKIPPED_SINCE = "skipped_since"
"""First of the steps skipped in a row, up to this one."""
_BAD_VALIDATION = "nonfinite_validation"
"""The validation loss after this step was not finite."""


@dataclass
class RunProgress:
    """Counts of what is done, and the step in hand."""

    step: int = 0
    """Steps taken so far."""
    samples: int = 0
    """Samples read so far: where in the order the next step begins."""
    tokens: int = 0
    """Tokens trained on so far."""
    under_way: tuple[int, int | None] = (1, None)
    """The step that is being taken and its first sample (None before the first batch): blamed for what fails now."""


@dataclass
class History:
    """Decisions and results that the steps after a checkpoint depend on."""

    back_to: int = 0
    """The step that a rollback goes back to: one that a run without stops would have saved too; -1: the start."""
    gone_back: bool = False
    """Whether the run went back there, and has saved nothing since."""
    skips: tuple[int, int] = (1, 0)
    """First and last of the steps skipped in a row."""
    validated: tuple[int, float] | None = None
    """The last step after which the model was validated, and its loss: on the first set, or one not finite."""
    reordered: list[int] = field(default_factory=list)
    """Steps that were the first in another order of samples than the step before."""

    @staticmethod
    def of(manifest: Manifest | None, reordered: list[int]) -> History:
        """That of the checkpoint with this manifest; of a run that begins without one."""
        if manifest is None:
            return History(back_to=-1, reordered=reordered)
        step, values = manifest.step, manifest.values
        loss = math.nan if values.get(_BAD_VALIDATION) else values.get(VALIDATION_LOSS)
        return History(
            back_to=_step_in(values, BACK_TO, step),
            gone_back=bool(values.get(_GONE_BACK)),
            skips=(_step_in(values, _SKIPPED_SINCE, step + 1), step),
            validated=(step, float(loss)) if isinstance(loss, int | float) else None,
            reordered=reordered,
        )

    def validation_loss(self, step: int) -> float | None:
        """After `step`; None if the model was not validated then."""
        return self.validated[1] if self.validated is not None and self.validated[0] == step else None

    def values(self, step: int, skips: tuple[int, int], rolls_back: bool) -> dict[str, Scalar]:
        """What a checkpoint of `step` says; `skips` are the steps skipped in a row up to now."""
        values: dict[str, Scalar] = {}
        if self.reordered:
            values[REORDERED] = " ".join(map(str, self.reordered))
        if (loss := self.validation_loss(step)) is not None:
            values |= {VALIDATION_LOSS: loss} if math.isfinite(loss) else {_BAD_VALIDATION: True}
        if rolls_back and self.back_to != step:
            values[BACK_TO] = self.back_to
        if self.gone_back:
            values[_GONE_BACK] = True
        first, last = skips
        if first <= last == step:
            values[_SKIPPED_SINCE] = first
        return values


def _step_in(values: Mapping[str, Scalar], key: str, otherwise: int) -> int:
    """The step that the values of a checkpoint, which may come from anybody, have under this key."""
    step = values.get(key)
    return step if isinstance(step, int) else otherwise
