"""Bad steps are recognised and passed over on the device; the host learns of them when it reads the metrics.

A step is bad if its loss or gradient norm is not finite, or stands out above those of the steps before. What follows
(skip, go back, stop) is the recipe's to say and the trainer's to do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from titanlite.errors import GuardStop
from titanlite.recipe.sections import LONGEST_SPIKE_WINDOW, Resilience

_MOST_UNREAD = 1024
"""Steps whose numbers wait on the device; where reviews are further apart, the host reads them all the same."""
_MAD_TO_DEVIATION = 1.4826
"""Of normally distributed numbers, the standard deviation over the median absolute deviation."""
_LEAST_DEVIATION = 0.01
"""Of the median: where the history is flat, what is noise in any other run must not stand out."""
_NONE = -1.0
"""Fills the history before the first steps; neither a norm nor a loss is negative."""


@dataclass(frozen=True)
class BadStep:
    """A step that was not applied, and why."""

    step: int
    kind: Literal["nonfinite", "loss_spike", "gradient_spike"]
    loss: float
    grad_norm: float
    loss_z: float
    """Standard deviations above the median of the steps before; NaN where these were too few to say."""
    grad_norm_z: float
    action: Literal["stop", "skip", "rollback"]

    def __str__(self) -> str:
        if self.kind == "nonfinite":
            return f"the loss is {self.loss:g} and the gradient norm {self.grad_norm:g}"
        what, value, z = (
            ("loss", self.loss, self.loss_z)
            if self.kind == "loss_spike"
            else ("gradient norm", self.grad_norm, self.grad_norm_z)
        )
        return f"the {what} {value:g} is {z:.1f} deviations above the median of the steps before"

    def values(self) -> dict[str, Any]:
        """What is known of it, for machines; numbers that are not finite are None."""
        numbers = {name: getattr(self, name) for name in ("loss", "grad_norm", "loss_z", "grad_norm_z")}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        return {"kind": self.kind, **finite, "action": self.action}


class RollBack(Exception):
    """No error: the run goes back to a checkpoint from before `bad`, since when nothing was applied."""

    def __init__(self, bad: BadStep) -> None:
        super().__init__(str(bad))
        self.bad = bad


class Guards:
    """Judges each step by its loss and gradient norm, which are the same on every rank: so is the judgement."""

    def __init__(self, section: Resilience, device: torch.device) -> None:
        self.section = section
        self.skipped = 0
        """Steps passed over in this run, as of the last review."""
        self.rollbacks = 0
        """How often the run went back."""
        self._watches = section.on_spike != "off"
        halting = [section.on_nonfinite != "skip", *([section.on_spike != "skip"] if self._watches else [])]
        self._halting = torch.tensor(halting, device=device)
        self._halted = torch.zeros((), dtype=torch.bool, device=device)
        self._history = torch.full((LONGEST_SPIKE_WINDOW, 2), _NONE, dtype=torch.float64, device=device)
        """Loss and gradient norm of the steps taken, the newest last; as long as any recipe's window, so that one may
        change when a run goes on."""
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)
        """`skipped` and `rollbacks`, for the checkpoint."""
        self._unread: list[tuple[int, Tensor, Tensor, Tensor | None]] = []
        """Steps: number, whether it was bad, [loss, gradient norm], their z-scores."""
        self._read: list[BadStep] = []

    def judge(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether the step is taken: a bool scalar on the device, without a host sync.

        Where the recipe does not say `skip`, nothing after the first bad step is taken either: when the host hears of
        it, the weights are still those from before that step.
        """
        numbers = torch.stack((loss, norm)).double()
        nonfinite = ~numbers.isfinite().all()
        z, kinds = None, nonfinite.unsqueeze(0)
        if self._watches:
            z = self._z_scores(numbers)
            spike = (z > self.section.spike_zscore).any() & ~nonfinite  # no comparison with NaN is true
            kinds = torch.stack((nonfinite, spike))
        bad, going = kinds.any(), ~self._halted
        taken, bad = going & ~bad, going & bad
        self._halted |= (kinds & self._halting).any()
        self._unread.append((step, bad, numbers, z))
        if self._watches:
            appended = torch.cat((self._history[1:], numbers.unsqueeze(0)))
            self._history.copy_(torch.where(taken, appended, self._history))
        if len(self._unread) == _MOST_UNREAD:
            self._read += self._from_device()
        return taken

    def _z_scores(self, numbers: Tensor) -> Tensor:
        """Deviations that each of [loss, gradient norm] lies above the window's median; NaN before the window is full.

        Median and median absolute deviation (Iglewicz and Hoaglin 1993): up to half of the window may be anything.
        """
        window = self._history[-self.section.spike_window :]
        median = _median(window)
        deviation = torch.maximum(_MAD_TO_DEVIATION * _median((window - median).abs()), _LEAST_DEVIATION * median)
        return torch.where(window[0] == _NONE, math.nan, (numbers - median) / deviation)

    def review(self) -> list[BadStep]:
        """The bad steps since the last review. Reads the device: call it only on logged steps."""
        found, self._read = self._read + self._from_device(), []
        if found:
            self._count(self.skipped + sum(bad.action == "skip" for bad in found), self.rollbacks)
        return found

    def _from_device(self) -> list[BadStep]:
        """The bad ones among the steps that were not read yet."""
        unread, self._unread = self._unread, []
        flags = torch.stack([bad for _, bad, _, _ in unread]).tolist() if unread else []
        return [
            self._described(step, *numbers.tolist(), *([math.nan] * 2 if z is None else z.tolist()))
            for flag, (step, _, numbers, z) in zip(flags, unread, strict=True)
            if flag
        ]

    def _described(self, step: int, loss: float, norm: float, loss_z: float, norm_z: float) -> BadStep:
        if self.section.on_spike == "off" or not (math.isfinite(loss) and math.isfinite(norm)):
            return BadStep(step, "nonfinite", loss, norm, loss_z, norm_z, self.section.on_nonfinite)
        kind: Literal["loss_spike", "gradient_spike"] = "gradient_spike" if norm_z > loss_z else "loss_spike"
        return BadStep(step, kind, loss, norm, loss_z, norm_z, self.section.on_spike)

    def _count(self, skipped: int, rollbacks: int) -> None:
        self.skipped, self.rollbacks = skipped, rollbacks
        self._counts.copy_(torch.tensor([skipped, rollbacks]))

    def act(self, bad: list[BadStep]) -> None:
        """What the recipe says about the steps of a review. Raises `GuardStop` or `RollBack`, or returns to go on."""
        if not bad:
            return
        last, section = bad[-1], self.section  # after a step that halts, none is listed
        if last.action == "stop":
            raise GuardStop(f"step {last.step}: {last}. The step was not applied. {_ADVICE[last.kind]}")
        if last.action == "rollback":
            if self.rollbacks >= section.max_rollbacks:
                raise GuardStop(
                    f"step {last.step}: {last}. The step was not applied. The run went back {self.rollbacks} times; "
                    f"resilience.max_rollbacks = {section.max_rollbacks}. {_ADVICE[last.kind]}"
                )
            raise RollBack(last)
        if self.skipped > section.max_skips:
            raise GuardStop(
                f"step {last.step}: {last}. With it {self.skipped} steps were passed over, more than "
                f"resilience.max_skips = {section.max_skips} allows. {_ADVICE[last.kind]}"
            )

    def resumed(self) -> None:
        """Call once the state is a checkpoint's."""
        self._count(*self._counts.tolist())
        if self.section.on_spike == "off":
            self._history.fill_(_NONE)  # with gaps it would be no history, should a later start watch again

    def rolled_back(self, skipped: int, rollbacks: int) -> None:
        """Call once the state is that of an earlier step: its history holds again, but counts go on."""
        self._count(skipped, rollbacks)
        self._halted.fill_(False)

    def initialise(self) -> None:
        """Forget all steps, as before the first."""
        self._history.fill_(_NONE)
        self._count(0, 0)

    def state(self) -> dict[str, Tensor]:
        """History and counts for the checkpoint; live, and right after a review."""
        return {"history": self._history, "counts": self._counts}


_ADVICE = {
    "nonfinite": "Lower optimizer.lr or lengthen schedule.warmup_steps; debug.find_nonfinite = true names the module; "
    "resilience.on_nonfinite = 'skip' passes over such steps.",
    "loss_spike": "Look at the samples that metrics.jsonl names; lower optimizer.lr, or raise resilience.spike_zscore.",
    "gradient_spike": "Lower optimizer.lr or optimizer.clip_norm, or raise resilience.spike_zscore.",
}


def _median(window: Tensor) -> Tensor:
    """[steps, n] -> [n]."""
    steps = window.shape[0]
    return window.sort(dim=0).values[(steps - 1) // 2 : steps // 2 + 1].mean(dim=0)
