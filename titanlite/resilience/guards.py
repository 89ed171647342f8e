"""Bad steps are recognised and passed over on the device; the host learns of them when it reads the metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from titanlite.errors import GuardStop
from titanlite.recipe.sections import Resilience


class Guards:
    """Judges each step by its loss and gradient norm, with a count of the steps not taken."""

    def __init__(self, section: Resilience, device: torch.device) -> None:
        self.section = section
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._first_bad = torch.zeros((), dtype=torch.int64, device=device)
        self._reported = 0

    def judge(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether the step is taken: a bool scalar on the device, without a host sync.

        Under `stop`, nothing after the first bad step is taken either: when the host hears of it, the weights are
        still those from before that step.
        """
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        self._skipped += ~finite
        self._first_bad = torch.where((self._first_bad == 0) & ~finite, step, self._first_bad)
        return finite & (self._first_bad == 0) if self.section.on_nonfinite == "stop" else finite

    def review(self, step: int) -> str | None:
        """What happened since the last review, for the log, or None. Reads the device: call it only on logged steps.

        Raises `GuardStop` when the recipe says that this ends the run.
        """
        skipped = int(self._skipped)
        if skipped == self._reported:
            return None
        new, self._reported = skipped - self._reported, skipped
        if self.section.on_nonfinite == "stop":
            raise GuardStop(
                f"step {int(self._first_bad)}: the loss or the gradient norm is not finite. The step was not applied. "
                "Lower optimizer.lr or lengthen schedule.warmup_steps; debug.find_nonfinite = true names the module; "
                "resilience.on_nonfinite = 'skip' passes over such steps."
            )
        if skipped > self.section.max_skips:
            raise GuardStop(
                f"step {step}: {skipped} steps were not finite, more than resilience.max_skips = "
                f"{self.section.max_skips}; the first was step {int(self._first_bad)}."
            )
        return f"{new} step(s) with a non-finite loss or gradient were passed over; {skipped} in all"

    def resumed(self) -> None:
        """Call once the state is a checkpoint's: what it counted was reported, and ends no run that may go on.

        Under `stop` the run may have skipped steps before, when its recipe still said `skip`.
        """
        self._reported = int(self._skipped)
        if self.section.on_nonfinite == "stop":
            self._first_bad.zero_()

    def state(self) -> dict[str, Tensor]:
        """Live counters for the checkpoint."""
        return {"skipped": self._skipped, "first_bad": self._first_bad}
