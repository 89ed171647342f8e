"""Numbers that go wrong: not finite, far from what they were, or not the same on ranks that hold copies."""

from __future__ import annotations

import numpy as np

from support.chaos.fault import EQUAL, Fault, Outcome
from support.chaos.sandbox import EVERY, STEPS, Sandbox
from titanlite.checkpoint.storage import read_manifest

_BAD = 2 * EVERY + 2  # the step that goes wrong, after the second save
_SAMPLES = list(range(4 * (_BAD - 1), 4 * _BAD))


def stops(row: int, what: str, how: str, kind: str, words: tuple[str, ...], on: list[int] | None) -> Fault:
    """Nothing of the bad step is applied, and once its cause is gone the run is what it would have been."""

    def run(box: Sandbox) -> Outcome:
        chaos = {"fault": how_named[how], "step": _BAD, "on": on}
        job = box.start(*words, f"--resilience.{kind}=stop", ranks=2, **chaos).ended(3)
        assert box.steps()[-1] == 2 * EVERY and f"step {_BAD}: " in box.status()["reason"]
        return Outcome(box.resume_whole(*words, ranks=2), EQUAL, box.message(job.said, f"step {_BAD}: "))

    return Fault(row, f"{what}: stop", how, run, slow=row == 23)


def goes_on(
    row: int, what: str, how: str, kind: str, action: str, words: tuple[str, ...], on: list[int] | None
) -> Fault:
    """All ranks decide alike: the run is that in which the fault befell another rank, or the only one."""

    def run(box: Sandbox) -> Outcome:
        words_here = (*words, f"--resilience.{kind}={action}")
        curves = []
        for number, ranks in enumerate([on, None if on is None else [1 - on[0]]]):
            chaos = {"fault": how_named[how], "step": _BAD, "on": ranks}
            job = box.train(*words_here, f"--run.name={number}", ranks=2, **chaos)
            curves.append((box.curve(str(number)), box.tensors(STEPS, str(number))))
        assert curves[0] == curves[1]
        bad_steps = [row for each in ("nonfinite", "loss_spike", "gradient_spike") for row in box.events(each, "0")]
        (bad,) = [row for row in bad_steps if row["values"]["action"] == action]
        assert bad["step"] == _BAD and bad["values"]["samples"] == [_SAMPLES[0], _SAMPLES[-1]], bad
        back = box.events("rollback", "0")
        assert [row["values"]["to_step"] for row in back] == ([2 * EVERY] if action == "rollback" else [])
        lost = _BAD - 2 * EVERY if back else 0
        same = "the same, whichever rank it befalls" if on is not None else "the same again"
        return Outcome(lost, same, box.message(job.said, f"step *{_BAD}/{STEPS}.*not applied|rollback"))

    return Fault(row, f"{what}: {action}", how, run, slow=True)


def replica_differs(box: Sandbox) -> Outcome:
    words = ("--parallel.zero_stage=0", "--resilience.check_replicas_every=2")
    job = box.start(*words, ranks=3, fault="bit_flipped", step=_BAD, on=[1]).ended(3)
    assert "rank 1 (" in job.said and "ranks 1" not in job.said, job.said
    assert box.steps()[-1] == 2 * EVERY, "what is corrupt is not saved"
    return Outcome(box.resume_whole(*words, ranks=3), EQUAL, box.message(job.said, r"rank 1 \("))


def not_saved(action: str) -> Fault:
    """What an update ruined on one rank is saved by none, and the last sound checkpoint stays (issue 14, item 12)."""
    words = ("--checkpoint.keep_last=1", f"--resilience.on_nonfinite={action}")
    seen = f"step *{3 * EVERY}/.*nonfinite_state"

    def run(box: Sandbox) -> Outcome:
        job = box.start(*words, ranks=2, fault="update_ruins", step=_BAD, on=[0]).ended(
            0 if action == "rollback" else 3
        )
        if action == "rollback":
            assert [row["values"]["to_step"] for row in box.events("rollback")] == [2 * EVERY]
            assert box.steps() == [STEPS] and not any(map(_damaged, box.tensors(STEPS).values()))
            return Outcome(EVERY, "not compared: other samples", box.message(job.said, f"{seen}|rollback: "))
        assert box.steps() == [2 * EVERY]
        return Outcome(box.resume_whole(*words, ranks=2), EQUAL, box.message(job.said, "error: step"))

    how = "a weight that no loss shows is made infinite on one rank of two, between two saves"
    return Fault(33, f"update that ruins a weight: {action}", how, run, slow=action != "stop")


def _damaged(data: bytes) -> bool:
    return len(data) % 4 == 0 and not np.isfinite(np.frombuffer(data, np.float32)).all()


def only_skips(box: Sandbox) -> Outcome:
    """Its state is saved, but it is not done; nor is it when it is started again (issue 14, item 12)."""
    words = ("--resilience.on_nonfinite=skip",)
    box.start(*words, fault="losses_are_nan", first=STEPS - 2).ended(3)
    job = box.start(*words).ended(3)
    assert box.status()["state"] == "failed" and box.steps()[-1] == STEPS
    return Outcome(0, "not compared", box.message(job.said, "error: steps"))


def validation_is_nan(box: Sandbox) -> Outcome:
    """The state is saved without the loss, and the run ends; the next start goes on from there (issue 14, item 11)."""
    words = (f"--validation.every_steps={EVERY}", "--validation.sequences=4")
    job = box.start(*words, fault="validation_is_nan", number=2).ended(3)
    assert box.steps()[-1] == 2 * EVERY
    assert "validation_loss" not in read_manifest(box.checkpoint(2 * EVERY)).values
    box.train(*words)
    box.require_whole(*words)
    return Outcome(2 * EVERY - box.resumed(), EQUAL, box.message(job.said, "error: step"))


def stopped_before_rollback(box: Sandbox) -> Outcome:
    """The run goes back to where one without the stop does (issue 14, item 19)."""
    words = ("--resilience.on_nonfinite=rollback", "--checkpoint.keep_last=1")
    fault = {"fault": "gradient_is_nan", "step": _BAD}
    box.train(*words, "--run.name=other", **fault)
    box.start(*words, f"--run.stop_after_step={_BAD - 1}").ended(75)
    job = box.train(*words, **fault)
    assert box.curve() == box.curve("other") and box.tensors(STEPS) == box.tensors(STEPS, "other")
    return Outcome(_BAD - 2 * EVERY, EQUAL, box.message(job.said, "rollback: "))


how_named = {
    "a gradient of one rank is not a number": "gradient_is_nan",
    "its labels are all the same token": "labels_spoiled",
}
_NAN, _LABELS = how_named
_SPIKE = ("--resilience.spike_window=8", "--resilience.spike_zscore=6")

FAULTS = [
    stops(22, "gradient that is not finite", _NAN, "on_nonfinite", (), [1]),
    *(goes_on(22, "gradient that is not finite", _NAN, "on_nonfinite", act, (), [1]) for act in ("skip", "rollback")),
    stops(23, "spoiled batch", _LABELS, "on_spike", _SPIKE, None),
    *(goes_on(23, "spoiled batch", _LABELS, "on_spike", act, _SPIKE, None) for act in ("skip", "rollback")),
    Fault(24, "bit flipped in a weight of one copy of three", "of rank 1, after its step", replica_differs, slow=True),
    *(not_saved(action) for action in ("stop", "skip", "rollback")),
    Fault(33, "run that only skips to its end", "the losses of its last steps are not numbers", only_skips, slow=True),
    Fault(34, "validation loss that is not finite", "at a step that is saved", validation_is_nan),
    Fault(
        35, "rollback after a stop between two saves", "run.stop_after_step; then a gradient is not a number",
        stopped_before_rollback, slow=True,
    ),
]  # fmt: skip
