"""Bad steps are recognised and passed over on the device; the host finds them when it reads the metrics.

A step is bad if its loss or gradient norm is not finite, or stands out above those of the steps before. A state is bad
if an update made a weight or a moment non-finite, or if its validation loss is. What follows (skip, go back, stop) is
decided by the recipe and done by the trainer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from titanlite.errors import GuardStop
from titanlite.models.shard import is_finite, may_be_nonfinite
from titanlite.parallel.world import World
from titanlite.recipe.sections import LONGEST_SPIKE_WINDOW, Resilience
from titanlite.text import list_some

_MOST_UNREAD = 1024  # steps whose numbers wait on the device; then the host reads them without a review
_MAD_TO_DEVIATION = 1.4826  # of normally distributed numbers, the standard deviation over the median absolute deviation
_LEAST_DEVIATION = 0.01  # of the median: where the history is flat, what is noise in any other run must not stand out
_NONE = -1.0  # fills the history before the first steps; neither a norm nor a loss is negative


Kind = Literal["nonfinite", "loss_spike", "gradient_spike", "nonfinite_state", "nonfinite_validation"]


@dataclass(frozen=True)
class BadStep:
    """A step that was not applied, or one whose state is bad (`nonfinite_state`, `nonfinite_validation`), and why."""

    step: int
    kind: Kind
    action: Literal["stop", "skip", "rollback"]
    loss: float = math.nan  # the validation loss, for that kind
    grad_norm: float = math.nan
    loss_z: float = math.nan  # standard deviations above the median of the steps before; NaN: too few to say
    grad_norm_z: float = math.nan
    tensors: str = ""  # names of the weights and moments that are not finite

    @property
    def outcome(self) -> str:
        """What became of the step."""
        if self.kind == "nonfinite_validation" and self.action != "rollback":
            return "saved without this loss"
        return "not saved" if self.kind in ("nonfinite_state", "nonfinite_validation") else "not applied"

    def __str__(self) -> str:
        return _KINDS[self.kind][0].format(self)

    def values(self) -> dict[str, Any]:
        """What is known of it, for machines; numbers that are not finite are None."""
        numbers = {name: getattr(self, name) for name in ("loss", "grad_norm", "loss_z", "grad_norm_z")}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        return {"kind": self.kind, **finite, "action": self.action}


_ABOVE = "deviations above the median of the steps before"
_KINDS: dict[Kind, tuple[str, str]] = {
    "nonfinite": (
        "the loss is {0.loss:g} and the gradient norm {0.grad_norm:g}",
        "Lower optimizer.lr or lengthen schedule.warmup_steps; debug.find_nonfinite = true names the module; "
        "resilience.on_nonfinite = 'skip' passes over such steps.",
    ),
    "loss_spike": (
        f"the loss {{0.loss:g}} is {{0.loss_z:.1f}} {_ABOVE}",
        "Look at the samples that metrics.jsonl names; lower optimizer.lr, or raise resilience.spike_zscore.",
    ),
    "gradient_spike": (
        f"the gradient norm {{0.grad_norm:g}} is {{0.grad_norm_z:.1f}} {_ABOVE}",
        "Lower optimizer.lr or optimizer.clip_norm, or raise resilience.spike_zscore.",
    ),
    "nonfinite_state": (
        "an update left values that are not finite in {0.tensors}",
        "The checkpoints from before are there. Lower optimizer.lr, or raise optimizer.eps; "
        "resilience.on_nonfinite = 'rollback' goes back by itself.",
    ),
    "nonfinite_validation": (
        "the validation loss is {0.loss:g}",
        "Look at the validation text and at what precision.compute holds; resilience.on_nonfinite = 'skip' goes on.",
    ),
}
"""What happened, and what to do about it."""


class RollBack(Exception):
    """No error: the run goes back to a checkpoint from before `bad`, since when nothing was applied."""

    def __init__(self, bad: BadStep) -> None:
        super().__init__(str(bad))
        self.bad = bad


class Guards:
    """Judges each step by its loss and gradient norm, which are the same on every rank: so is the judgement."""

    def __init__(self, section: Resilience, device: torch.device) -> None:
        self.section = section
        self.skipped = 0  # steps passed over in this run, as of the last review
        self.rollbacks = 0  # how often the run went back
        self.skips_in_a_row = (1, 0)  # first and last of the steps skipped one after the other; last < first: none
        self.goes_back = "rollback" in (section.on_nonfinite, section.on_spike)
        self._watches_spikes = section.on_spike != "off"
        halting = [section.on_nonfinite != "skip", section.on_spike != "skip"]
        self._halting = torch.tensor(halting, device=device)
        self._halted = torch.zeros((), dtype=torch.bool, device=device)
        self._history = torch.full((LONGEST_SPIKE_WINDOW, 2), _NONE, dtype=torch.float64, device=device)
        """Loss and gradient norm of the steps taken, the newest last; as long as any recipe's window, so that one may
        change when a run goes on."""
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)  # `skipped` and `rollbacks`, for the checkpoint
        self._unread: list[tuple[int, Tensor, Tensor]] = []  # step, whether it was bad, [loss, norm, z-score of each]
        self._read: list[BadStep] = []

    def judge(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether the step is taken: a bool scalar on the device, without a host sync.

        Where the recipe does not say `skip`, nothing after the first bad step is taken either: when the host hears of
        it, the weights are still those from before that step.
        """
        numbers = torch.stack((loss, norm)).double()
        z = self._z_scores(numbers) if self._watches_spikes else torch.full_like(numbers, math.nan)
        nonfinite = ~numbers.isfinite().all()
        spike = (z > self.section.spike_zscore).any() & ~nonfinite  # no comparison with NaN is true
        kinds = torch.stack((nonfinite, spike))
        bad, going = kinds.any(), ~self._halted
        taken, bad = going & ~bad, going & bad
        self._halted |= (kinds & self._halting).any()
        self._unread.append((step, bad, torch.cat((numbers, z))))
        if self._watches_spikes:
            appended = torch.cat((self._history[1:], numbers.unsqueeze(0)))
            self._history.copy_(torch.where(taken, appended, self._history))
        if len(self._unread) == _MOST_UNREAD:
            self._read_device()
        return taken

    def _z_scores(self, numbers: Tensor) -> Tensor:
        """Deviations that each of [loss, gradient norm] lies above the window's median; NaN before the window is full.

        Median and median absolute deviation (Iglewicz and Hoaglin 1993): up to half of the window may be anything.
        """
        window = self._history[-self.section.spike_window :]
        median = _median(window)
        deviation = torch.maximum(_MAD_TO_DEVIATION * _median((window - median).abs()), _LEAST_DEVIATION * median)
        return torch.where(window[0] == _NONE, math.nan, (numbers - median) / deviation)

    def review(self, step: int = 0, nonfinite: str = "") -> list[BadStep]:
        """The bad steps since the last review. Reads the device: call it only on logged steps, and before a save.

        There, `nonfinite` names the tensors of the state after `step` that hold what is not finite.
        """
        self._read_device()
        found, self._read = self._read, []
        skipped = [bad.step for bad in found if bad.action == "skip"]
        for each in skipped:
            first, last = self.skips_in_a_row
            self.skips_in_a_row = (first if each == last + 1 else each, each)
        if skipped:
            self._count(self.skipped + len(skipped), self.rollbacks)
        if nonfinite and len(skipped) == len(found):  # what halts comes before
            action = self.section.on_nonfinite  # to skip is too late: the update is applied
            action = "stop" if action == "skip" else action
            found.append(BadStep(step, "nonfinite_state", action, tensors=nonfinite))
        return found

    def _read_device(self) -> None:
        """Keep the bad ones among the steps that were not read yet."""
        unread, self._unread = self._unread, []
        flags = torch.stack([bad for _, bad, _ in unread]).tolist() if unread else []
        for bad, (step, _, values) in zip(flags, unread, strict=True):
            if bad:
                loss, norm, loss_z, norm_z = values.tolist()
                kind: Kind = "gradient_spike" if norm_z > loss_z else "loss_spike"
                action = self.section.on_spike
                if action == "off" or not (math.isfinite(loss) and math.isfinite(norm)):
                    kind, action = "nonfinite", self.section.on_nonfinite
                self._read.append(BadStep(step, kind, action, loss, norm, loss_z, norm_z))

    def _count(self, skipped: int, rollbacks: int) -> None:
        self.skipped, self.rollbacks = skipped, rollbacks
        self._counts.copy_(torch.tensor([skipped, rollbacks]))

    def act(self, bad: list[BadStep]) -> None:
        """Raise `GuardStop` or `RollBack` as the recipe asks after the bad steps of a review, or return to go on."""
        if not bad:
            return
        last, section = bad[-1], self.section  # after a step that halts, none is listed
        reason = f"step {last.step}: {last}. The {'state' if 'saved' in last.outcome else 'step'} was {last.outcome}."
        if last.action == "rollback":
            if self.rollbacks < section.max_rollbacks:
                raise RollBack(last)
            reason += f" The run went back {self.rollbacks} times; resilience.max_rollbacks = {section.max_rollbacks}."
        elif last.action == "skip":
            if self.skipped <= section.max_skips:
                return
            reason += f" With it {self.skipped} steps were skipped; resilience.max_skips = {section.max_skips}."
        raise GuardStop(f"{reason} {_KINDS[last.kind][1]}")

    def require_good_end(self, step: int, validation_loss: float | None) -> None:
        """A run that took no more steps before its last, or ends with a model that makes no numbers, is not done:
        raises `GuardStop`.
        """
        first, last = self.skips_in_a_row
        reason = ""
        if last == step and (first < last or first == last == 1):
            reason = f"steps {first} to {last}, the last ones, were all skipped"
        elif validation_loss is not None and not math.isfinite(validation_loss):
            reason = f"the validation loss after the last step is {validation_loss:g}"
        if reason:
            raise GuardStop(
                f"{reason}: the run is at its end, but not done. Go on from an earlier checkpoint (--from-step N) with "
                "a lower optimizer.lr, or past other samples (data.skip_steps)."
            )

    def resume(self) -> None:
        """Call once the state is a checkpoint's."""
        self._count(*self._counts.tolist())
        if self.section.on_spike == "off":
            self._history.fill_(_NONE)  # with gaps it would be no history, should a later start watch again

    def roll_back(self, skipped: int, rollbacks: int) -> None:
        """Call once the state is that of an earlier step: its history holds again, but counts go on."""
        self._count(skipped, rollbacks)
        self._halted.fill_(False)

    def reset(self) -> None:
        """Forget all steps, as before the first."""
        self._history.fill_(_NONE)
        self._count(0, 0)

    def state(self) -> dict[str, Tensor]:
        """History and counts for the checkpoint; live, and right after a review."""
        return {"history": self._history, "counts": self._counts}


def nonfinite_names(tensors: Mapping[str, Tensor], world: World) -> str:
    """Names of the tensors that hold inf or NaN on any rank; all ranks call this with theirs. Empty: none does."""
    suspect = may_be_nonfinite(tensors.values()).int().to(world.device)  # of a rank without any: on the host
    if not world.max(suspect):
        return ""
    found = world.run_on_all_ranks(lambda: [name for name, tensor in tensors.items() if not is_finite(tensor)])
    return list_some(list(dict.fromkeys(name for names in found for name in names)))


def _median(window: Tensor) -> Tensor:
    """[steps, n] -> [n]."""
    steps = window.shape[0]
    return window.sort(dim=0).values[(steps - 1) // 2 : steps // 2 + 1].mean(dim=0)
