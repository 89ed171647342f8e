"""Numbers that go wrong: not finite, far from what they were, or not the same on ranks that hold copies."""

from __future__ import annotations

from fault import EQUAL, Fault, Outcome
from sandbox import EVERY, STEPS, Sandbox

_BAD = 2 * EVERY + 2
"""The step that goes wrong, after the second save."""
_SAMPLES = list(range(4 * (_BAD - 1), 4 * _BAD))


def stops(row: int, what: str, how: str, kind: str, words: tuple[str, ...], on: list[int] | None) -> Fault:
    """Nothing of the bad step is applied, and once its cause is gone the run is what it would have been."""

    def run(box: Sandbox) -> Outcome:
        chaos = {"fault": how_named[how], "step": _BAD, **({} if on is None else {"on": on})}
        job = box.start(*words, f"--resilience.{kind}=stop", ranks=2, **chaos).ended(3)
        reached = box.step()
        assert box.steps()[-1] == 2 * EVERY and f"step {_BAD}: " in box.status()["reason"]
        box.train(*words, ranks=2)
        box.require_whole(*words, ranks=2)
        return Outcome(reached - box.resumed(), EQUAL, box.message(job.said, f"step {_BAD}: "))

    return Fault(row, f"{what}: stop", how, run, slow=row == 23)


def goes_on(
    row: int, what: str, how: str, kind: str, action: str, words: tuple[str, ...], on: list[int] | None
) -> Fault:
    """All ranks decide alike: the run is that in which the fault befell another rank, or the only one."""

    def run(box: Sandbox) -> Outcome:
        words_here = (*words, f"--resilience.{kind}={action}")
        curves = []
        for number, ranks in enumerate([on, None if on is None else [1 - on[0]]]):
            chaos = {"fault": how_named[how], "step": _BAD, **({} if ranks is None else {"on": ranks})}
            job = box.train(*words_here, f"--run.name={number}", ranks=2, **chaos)
            curves.append((box.curve(str(number)), box.tensors(STEPS, str(number))))
        assert curves[0] == curves[1]
        (bad,) = [row for row in box.rows("0") if row.get("values", {}).get("action") == action]
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
    assert "rank 1 (" in job.said and "ranks" not in box.message(job.said, "hold other values"), job.said
    reached = box.step()
    assert box.steps()[-1] == 2 * EVERY, "what is corrupt is not saved"
    box.train(*words, ranks=3)
    box.require_whole(*words, ranks=3)
    return Outcome(reached - box.resumed(), EQUAL, box.message(job.said, "hold other values"))


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
]
