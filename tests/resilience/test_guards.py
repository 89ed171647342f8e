"""What the guards call a bad step, against numpy; and runs that meet one: skipped, stopped, gone back from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runs import curve, rows, status, steps, tensors
from support.tiny import train

from titanlite.checkpoint.format import MANIFEST, encode
from titanlite.checkpoint.storage import read_manifest
from titanlite.data.loader import train_loader
from titanlite.errors import GuardStop
from titanlite.models.shard import may_be_nonfinite
from titanlite.parallel.model import Evaluation, ParallelModel
from titanlite.parallel.world import World
from titanlite.recipe.sections import Resilience
from titanlite.resilience import guards as judging
from titanlite.resilience.guards import Guards, RollBack, nonfinite_names
from titanlite.training import feed, trainer
from titanlite.training.train_state import TrainState

CPU = torch.device("cpu")
NAN, INF = math.nan, math.inf
Numbers = list[tuple[float, float]]


def judged(guards: Guards, numbers: Numbers, first: int = 1) -> list[bool]:
    """Which of the steps with these losses and gradient norms are taken."""
    return [
        bool(guards.judge(step, torch.tensor(loss), torch.tensor(norm)))
        for step, (loss, norm) in enumerate(numbers, start=first)
    ]


def history(steps: int, seed: int = 0) -> Numbers:
    """Steps of a run that goes well."""
    random = np.random.default_rng(seed)
    return list(zip((2 + 0.1 * random.random(steps)).tolist(), (1 + 0.5 * random.random(steps)).tolist(), strict=True))


@settings(deadline=None)
@given(
    window=st.integers(8, 30),
    extra=st.integers(0, 20),
    rises=st.tuples(st.floats(1, 1e3), st.floats(1, 1e3)),
    seed=st.integers(0, 99),
)
def test_a_spikes_scores_are_those_of_median_and_mad(
    window: int, extra: int, rises: tuple[float, float], seed: int
) -> None:
    guards = Guards(Resilience(on_spike="skip", spike_window=window, spike_zscore=60.0), CPU)
    before = [(float(np.float32(loss)), float(np.float32(norm))) for loss, norm in history(window + extra, seed)]
    last = (float(np.float32(2 * rises[0])), float(np.float32(rises[1])))
    taken = judged(guards, [*before, last])
    compared = np.array(before[-window:])
    median = np.median(compared, axis=0)
    deviation = np.maximum(1.4826 * np.median(np.abs(compared - median), axis=0), 0.01 * median)
    z = (np.array(last) - median) / deviation
    assert taken == [True] * (window + extra) + [bool((z <= 60).all())]
    if not taken[-1]:
        (bad,) = guards.review()
        assert (bad.step, bad.loss, bad.grad_norm) == (window + extra + 1, *last)
        assert (bad.loss_z, bad.grad_norm_z) == pytest.approx(tuple(z), rel=1e-9)
        assert bad.kind == ("gradient_spike" if z[1] > z[0] else "loss_spike")


def test_what_is_not_a_spike() -> None:
    section = Resilience(on_spike="skip", spike_window=8)
    assert all(judged(Guards(section, CPU), [*history(7), (1e6, 1e6)])), "too few steps to compare it to"
    assert all(judged(Guards(section, CPU), [*history(8), (1e-3, 1e-3)])), "downwards"
    flat = [(2.0, 1.0)] * 8
    taken = judged(Guards(section, CPU), [*flat, (2.19, 1.09), (2.21, 1.0)])
    assert taken[-2:] == [True, False], "ten times the least deviation, 1 %, are 10 %"
    off = Guards(Resilience(), CPU)
    before = {name: tensor.clone() for name, tensor in off.state().items()}
    assert all(judged(off, [*history(200), (1e9, 1e9)]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in off.state().items()), "off: nothing is kept"


def test_bad_steps_are_not_what_later_ones_are_compared_to() -> None:
    guards = Guards(Resilience(on_spike="skip", on_nonfinite="skip", spike_window=8, max_skips=99), CPU)
    bad = [(50.0, 1.0), (NAN, 1.0), (2.0, 50.0), (2.0, INF), (INF, NAN)] * 3
    taken = judged(guards, [*history(8), *bad, *history(3), (50.0, 1.0)])
    assert taken == [True] * 8 + [False] * 15 + [True] * 3 + [False]
    kinds = [step.kind for step in guards.review()]
    assert kinds == ["loss_spike", "nonfinite", "gradient_spike", "nonfinite", "nonfinite"] * 3 + ["loss_spike"]
    assert guards.review() == []


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip", "rollback"])
@pytest.mark.parametrize("on_spike", ["off", "stop", "skip", "rollback"])
@pytest.mark.parametrize("bad", [(NAN, 1.0), (2.0, INF), (40.0, 1.0), (2.0, 40.0)])
def test_each_kind_has_its_own_policy(on_nonfinite: Any, on_spike: Any, bad: tuple[float, float]) -> None:
    guards = Guards(Resilience(on_nonfinite=on_nonfinite, on_spike=on_spike, spike_window=8), CPU)
    finite = all(map(math.isfinite, bad))
    policy = on_spike if finite else on_nonfinite
    taken = judged(guards, [*history(9), bad, *history(3)])[-4:]
    assert taken == {"off": [1, 1, 1, 1], "skip": [0, 1, 1, 1]}.get(policy, [0, 0, 0, 0])
    seen = guards.review()
    assert [(step.step, step.action, step.kind == "nonfinite") for step in seen] == [(10, policy, not finite)] * (
        policy != "off"
    )
    if policy in ("off", "skip"):
        guards.act(seen)
        return
    with pytest.raises(GuardStop if policy == "stop" else RollBack):
        guards.act(seen)


def test_steps_after_the_one_that_halts_are_neither_counted_nor_listed() -> None:
    guards = Guards(Resilience(on_nonfinite="rollback", max_rollbacks=1), CPU)
    judged(guards, [(NAN, NAN)] * 5)
    with pytest.raises(RollBack):
        guards.act(guards.review())
    guards.roll_back(0, 1)
    assert judged(guards, [(1.0, 1.0), (NAN, 1.0), (1.0, 1.0)]) == [True, False, False]
    seen = guards.review()
    assert [bad.step for bad in seen] == [2] and (guards.rollbacks, guards.skipped) == (1, 0)
    with pytest.raises(GuardStop, match="max_rollbacks = 1"):
        guards.act(seen)


def test_the_budget_of_skips_holds_over_restarts() -> None:
    section = Resilience(on_nonfinite="skip", max_skips=3)
    guards = Guards(section, CPU)
    judged(guards, [(NAN, 1.0)] * 3)
    guards.act(guards.review())
    again = Guards(section, CPU)
    for name, tensor in again.state().items():
        tensor.copy_(guards.state()[name])
    again.resume()
    again.act(again.review())
    judged(again, [(NAN, 1.0)])
    with pytest.raises(GuardStop, match="max_skips = 3"):
        again.act(again.review())


def test_bad_steps_wait_for_a_review_however_late_it_is() -> None:
    guards = Guards(Resilience(on_nonfinite="rollback", on_spike="skip", spike_window=8, max_skips=3), CPU)
    judged(guards, [*history(8), (90.0, 1.0), (NAN, 1.0), *history(2500)])
    assert [bad.step for bad in guards.review()] == [9, 10]


# Runs.

BAD_STEP, BATCH = 26, 8
BAD = (BAD_STEP - 1) * BATCH
"""First sample of the step that a run without detours would read them in."""


TINY = {
    "training": {"steps": 32, "global_batch": 8}, "optimizer": {"lr": 1e-2}, "schedule": {"name": "constant"},
    "checkpoint": {"every_steps": 10}, "resilience": {"spike_window": 12}, "metrics": {"log_every": 4},
}  # fmt: skip


@pytest.fixture
def scramble(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], bool]], None]:
    """Give the batches that begin with certain samples labels that no text has."""
    compute = ParallelModel.forward_backward

    def where(spoiled: Callable[[int], bool]) -> None:
        def scrambled(self: ParallelModel, batch: Any, valid: torch.Tensor) -> torch.Tensor:
            if spoiled(batch.samples[0]):
                batch = dataclasses.replace(batch, labels=(batch.labels * 7 + 91) % 256)
            return compute(self, batch, valid)

        monkeypatch.setattr(ParallelModel, "forward_backward", scrambled)

    return where


@pytest.fixture
def unsound(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[ParallelModel, Any], bool]], None]:
    """Give the batches for which this holds a loss that is not a number; weights are sound."""
    compute = ParallelModel.forward_backward

    def where(bad: Callable[[ParallelModel, Any], bool]) -> None:
        def computed(self: ParallelModel, batch: Any, valid: torch.Tensor) -> torch.Tensor:
            return compute(self, batch, valid) * (NAN if bad(self, batch) else 1)

        monkeypatch.setattr(ParallelModel, "forward_backward", computed)

    return where


@pytest.fixture
def ruin(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the update of a step, once, leave a value that is not finite in a weight or a moment."""
    take_step, left = trainer.take_step, [True]

    def at(step: int, name: str = "norm.weight", value: float = NAN, times: int = 1) -> None:
        left[:] = [True] * times

        def ruined(self: TrainState, number: int, *rest: Any) -> Any:
            result = take_step(self, number, *rest)
            if number == step and left:
                left.pop()
                ({**self.weights, **self.optimizer.state()}[name]).detach().view(-1)[0] = value
            return result

        monkeypatch.setattr(trainer, "take_step", ruined)

    return at


def reason(run: str) -> str:
    return str(status(run)["reason"])


def manifest_of(run: str, step: int) -> Any:
    return read_manifest(Path("runs", run, "checkpoints", f"step-{step:08d}"))


def test_a_spoiled_batch_is_told_and_skipped(folder: Path, scramble: Callable[..., None]) -> None:
    scramble(lambda first: first == BAD)
    assert train("--resilience.on_spike=skip") == 0
    (bad,) = rows("tiny", "gradient_spike")
    values = bad["values"]
    assert bad["step"] == BAD_STEP and values["samples"] == [BAD, BAD + BATCH - 1] and values["action"] == "skip"
    assert values["grad_norm_z"] > 10 and values["loss"] > 6 and "1 of at most 10" in bad["detail"]
    assert len(curve("tiny")) == 9 and max(row["loss"] for row in rows("tiny")[-2:]) < 2


def test_a_spoiled_batch_stops_the_run(folder: Path, scramble: Callable[..., None]) -> None:
    scramble(lambda first: first == BAD)
    assert train("--resilience.on_spike=stop") == 3
    assert f"step {BAD_STEP}: the gradient norm" in reason("tiny") and "not applied" in reason("tiny")
    assert len(rows("tiny", "gradient_spike")) == 1
    assert [row["step"] for row in rows("tiny", "checkpoint")] == [10, 20]


def test_a_resumed_run_judges_as_one_that_never_stopped(folder: Path, scramble: Callable[..., None]) -> None:
    """The history is in the checkpoint: the spike comes 6 steps after the resume, and is compared to 12."""
    scramble(lambda first: first == BAD)
    keys = ("--resilience.on_spike=skip", "--metrics.log_every=1")
    assert train(*keys, "--run.name=whole") == 0
    for stop in (7, 20, 26):
        assert train(*keys, "--run.name=parts", f"--run.stop_after_step={stop}") == 75
    assert train(*keys, "--run.name=parts") == 0
    assert curve("parts") == curve("whole")
    assert rows("parts", "gradient_spike") == rows("whole", "gradient_spike") != []


def at_another_place(folder: str, step: int, samples: int) -> None:
    """Have a checkpoint say that so many samples were read."""
    manifest = replace(manifest_of(folder, step), samples=samples)
    Path("runs", folder, "checkpoints", f"step-{step:08d}", MANIFEST).write_bytes(encode(manifest))


def test_going_back_is_going_on_from_the_checkpoint_with_other_samples(
    folder: Path, scramble: Callable[..., None]
) -> None:
    """Bad at step 26, heard of at the next logged one, 28: back to 20, and on with what step 29 would have read."""
    scramble(lambda first: first == BAD)
    assert train("--resilience.on_spike=rollback", "--run.name=back") == 0
    assert train("--run.name=other", "--run.stop_after_step=20") == 75
    at_another_place("other", 20, 28 * BATCH)
    assert train("--run.name=other") == 0
    assert curve("back") == curve("other")
    assert [row["step"] for row in rows("back")] == [1, 4, 8, 12, 16, 20, 24, 28, 32]
    assert rows("back")[-1]["samples"] == (32 + 8) * BATCH and rows("back")[-1]["tokens"] == 32 * BATCH * 16
    (event,) = rows("back", "rollback")
    assert event["values"] == {"to_step": 20, "samples": [20 * BATCH, 28 * BATCH - 1]}
    assert "From step 28 back to 20" in Path("runs/back/logs/console.log").read_text()
    assert manifest_of("back", 30).samples == (30 + 8) * BATCH


def test_without_a_checkpoint_the_run_goes_back_to_its_beginning(
    folder: Path, scramble: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    scramble(lambda first: first == BAD)
    keys = ("--checkpoint.every_steps=0", "--optimizer.name=muon", "--training.steps=29")
    assert train(*keys, "--resilience.on_spike=rollback", "--run.name=back") == 0
    shifted = 28 * BATCH
    monkeypatch.setattr(
        feed,
        "train_loader",
        lambda split, plan, firsts, **options: train_loader(
            split, plan, [first + shifted for first in firsts], **options
        ),
    )
    assert train(*keys, "--run.name=other") == 0
    assert curve("back") == curve("other")


@pytest.mark.slow
def test_a_restart_neither_forgets_that_the_run_went_back_nor_reads_what_it_passed_over(
    folder: Path, scramble: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies right after it went back, at step 22, before any other save."""
    scramble(lambda first: first == BAD)
    keys = ("--resilience.on_spike=rollback", "--data.workers=1")
    assert train(*keys, "--run.name=whole") == 0
    with monkeypatch.context() as patch:
        take_step = trainer.take_step

        def dies(self: TrainState, number: int, *rest: Any) -> Any:
            if self.guards.rollbacks and number == 23:
                raise KeyboardInterrupt
            return take_step(self, number, *rest)

        patch.setattr(trainer, "take_step", dies)
        assert train(*keys, "--run.name=parts") not in (0, 75)
    assert train(*keys, "--run.name=parts") == 0
    assert curve("parts") == curve("whole")
    assert len(rows("parts", "rollback")) == 1


def test_a_run_that_always_goes_wrong_ends(folder: Path, unsound: Callable[..., None]) -> None:
    """Issue 14, item 12: what is bad right after going back may be so by the checkpoint, so the next one is older."""
    unsound(lambda self, batch: batch.samples[0] >= BAD)
    keys = ("--resilience.on_nonfinite=rollback", "--metrics.log_every=1")
    assert train(*keys) == 3
    assert "went back 3 times" in reason("tiny")
    back = [(row["step"], row["values"]["to_step"]) for row in rows("tiny", "rollback")]
    assert back == [(26, 20), (21, 10), (11, 10)], "there is none older than that of step 10"
    assert manifest_of("tiny", 10).samples == 28 * BATCH
    assert train(*keys) == 3, "the budget is spent"
    assert len(rows("tiny", "rollback")) == 3
    steps = [row["step"] for row in rows("tiny")]
    assert steps == sorted(set(steps)), "one curve"


def test_a_damaged_checkpoint_is_passed_over_on_the_way_back(folder: Path, scramble: Callable[..., None]) -> None:
    def spoil(first: int) -> bool:
        if first == BAD:
            Path("runs/tiny/checkpoints/step-00000020/manifest.json").write_text("{}")
        return first == BAD

    scramble(spoil)
    assert train("--resilience.on_spike=rollback", "--checkpoint.mode=sync") == 0
    (event,) = rows("tiny", "rollback")
    assert event["values"]["to_step"] == 10 and event["values"]["samples"] == [10 * BATCH, 28 * BATCH - 1]
    assert rows("tiny")[-1]["step"] == 32


def test_a_bad_last_step_is_not_the_end(folder: Path, poison: Callable[[int], None]) -> None:
    """The step is judged when the run wants to save its end: it goes back from there."""
    poison(31)
    assert train("--resilience.on_nonfinite=rollback", "--training.steps=31") == 0
    (event,) = rows("tiny", "rollback")
    assert event["values"]["to_step"] == 30
    assert manifest_of("tiny", 31).samples == 32 * BATCH


# Issue 14, item 12: an update leaves values that are not finite.


def damaged(run: str) -> list[str]:
    """Tensors of the newest checkpoint that hold what is not finite, as another library reads them."""
    return [name for name, values in tensors(run, steps(run)[-1]).items() if not torch.isfinite(values).all()]


RUINED = [
    ("norm.weight", NAN, ()),
    ("embed.weight", INF, ()),  # a row of a byte that the text does not have: no loss ever shows it
    ("norm.weight/square", NAN, ()),
    ("layers.0.attention.wq.weight/momentum", -INF, ("--optimizer.name=muon",)),
]


@pytest.mark.parametrize(("name", "value", "keys"), RUINED)
@pytest.mark.parametrize("action", ["stop", "skip", "rollback"])
def test_what_an_update_ruined_is_not_saved(
    folder: Path, ruin: Callable[..., None], action: str, name: str, value: float, keys: tuple[str, ...]
) -> None:
    keys = (*keys, "--checkpoint.keep_last=1", f"--resilience.on_nonfinite={action}")
    ruin(20, name, value)
    assert train(*keys) == (0 if action == "rollback" else 3)
    room = "optimizer" if "/" in name else "model"
    (bad,) = rows("tiny", "nonfinite_state")
    assert bad["step"] == 20 and f"{room}.{name}" in bad["detail"]
    assert [row["values"]["to_step"] for row in rows("tiny", "rollback")] == ([10] if action == "rollback" else [])
    assert steps("tiny") == ([32] if action == "rollback" else [10]) and damaged("tiny") == []
    if action != "rollback":
        assert f"{room}.{name}" in reason("tiny")
        assert train(*keys) == 0, "once the cause is gone"
        assert train(*keys, "--run.name=whole") == 0
        assert curve("tiny") == curve("whole")


@pytest.mark.parametrize(
    ("step", "key", "kept"),
    [
        (15, "--run.stop_after_step=15", [10]),  # at a stop
        (32, "--validation.every_steps=32", [20, 30]),  # at the end
        (12, "--checkpoint.mode=sync", [10]),
        (14, "--resilience.snapshot_every=2", [10]),  # before a snapshot in memory
    ],
)
def test_every_save_looks_at_what_it_saves(
    folder: Path, ruin: Callable[..., None], tmp_path: Path, step: int, key: str, kept: list[int]
) -> None:
    ruin(step, "embed.weight")
    assert train(key, f"--resilience.snapshot_dir={tmp_path}", "--metrics.log_every=100") == 3
    (bad,) = rows("tiny", "nonfinite_state")
    assert bad["step"] == (20 if "sync" in key else step) and steps("tiny") == kept


@pytest.mark.parametrize("name", ["norm.weight", "norm.weight/square"])
def test_a_ruined_checkpoint_of_an_older_titanlite_is_passed_over_on_the_way_back(
    folder: Path, ruin: Callable[..., None], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ruin(20, name)
    monkeypatch.setattr(judging, "may_be_nonfinite", lambda tensors: torch.zeros((), dtype=torch.bool))
    assert train("--resilience.on_nonfinite=rollback") == 0
    assert [(row["step"], row["values"]["to_step"]) for row in rows("tiny", "rollback")] == [(24, 10)]
    assert damaged("tiny") == []


@pytest.mark.parametrize(("name", "back"), [("norm.weight", [20, 20, 20]), ("embed.weight", [20, 10, 20])])
def test_an_update_that_ruins_the_weights_each_time_ends_the_run(
    folder: Path, ruin: Callable[..., None], name: str, back: list[int]
) -> None:
    """Seen by the loss of the step after, or before the save of step 30."""
    ruin(28, name, times=9)
    assert train("--resilience.on_nonfinite=rollback") == 3
    assert [row["values"]["to_step"] for row in rows("tiny", "rollback")] == back
    assert steps("tiny") == [10, 20] and damaged("tiny") == []


def test_large_values_are_no_false_alarm() -> None:
    large = {"a": torch.full((9,), 1e30), "b": torch.zeros(0), "c": torch.ones(3, dtype=torch.float64)}
    assert may_be_nonfinite(large.values()), "their squares overflow"
    world, guards = World(0, 1, CPU), Guards(Resilience(), CPU)
    assert nonfinite_names(large, world) == "" and guards.review(7) == []
    large["c"][1] = INF
    (bad,) = guards.review(7, nonfinite_names(large, world))
    assert (bad.step, bad.kind, bad.tensors, bad.action) == (7, "nonfinite_state", "c", "stop")
    sound = [torch.ones(3), torch.ones(2, dtype=torch.float64), torch.zeros(0), torch.ones(2, dtype=torch.int64)]
    assert not may_be_nonfinite(sound) and not may_be_nonfinite(sound[2:])


@pytest.mark.parametrize(("first", "code"), [(31, 3), (32, 0)])
def test_a_run_that_only_skips_to_its_end_is_not_done(
    folder: Path, unsound: Callable[..., None], first: int, code: int
) -> None:
    """However it gets there, and when it is started again."""
    unsound(lambda self, batch: batch.samples[0] >= (first - 1) * BATCH)
    keys = ("--resilience.on_nonfinite=skip", "--metrics.log_every=100")
    assert [train(*keys), train(*keys)] == [code, code]
    assert train(*keys, "--run.name=parts", "--run.stop_after_step=31") == 75
    assert train(*keys, "--run.name=parts") == code
    for run in ("tiny", "parts"):
        ended = status(run)
        assert (ended["state"], ended["step"]) == ("failed" if code else "done", 32)
        assert steps(run)[-1] == 32 and ("steps 31 to 32" in ended["reason"]) == (code == 3)


# Issue 14, item 11: a validation loss that is not finite.

VALIDATED = ("--validation.every_steps=10", "--validation.sequences=4", "--metrics.tensorboard=true")


@pytest.fixture
def unsound_validation(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """The n-th validation from now on has a loss that is not a number; weights are sound."""
    evaluate = ParallelModel.evaluate

    def at(number: int) -> None:
        count = iter(range(1, 10**6))

        def evaluated(self: ParallelModel, batches: Any) -> Evaluation:
            result = evaluate(self, batches)
            return Evaluation(NAN, INF) if next(count) == number else result

        monkeypatch.setattr(ParallelModel, "evaluate", evaluated)

    return at


@pytest.mark.parametrize("action", ["stop", "skip", "rollback"])
def test_a_validation_loss_that_is_not_finite_is_not_saved(
    folder: Path, unsound_validation: Callable[[int], None], action: str
) -> None:
    keys = (*VALIDATED, "--checkpoint.keep_last=0", f"--resilience.on_nonfinite={action}")
    unsound_validation(2)
    assert train(*keys) == (3 if action == "stop" else 0)
    (bad,) = rows("tiny", "nonfinite_validation")
    assert bad["step"] == 20 and bad["values"]["action"] == action and bad["values"]["loss"] is None
    assert [row["values"]["to_step"] for row in rows("tiny", "rollback")] == ([10] if action == "rollback" else [])
    if action == "stop":
        assert steps("tiny") == [10, 20] and "the validation loss is nan" in reason("tiny")
    if action == "skip":
        assert steps("tiny") == [10, 20, 30, 32]
    if action == "rollback":
        assert manifest_of("tiny", 30).samples == 40 * BATCH
        return
    assert "validation_loss" not in manifest_of("tiny", 20).values and damaged("tiny") == []
    assert train(*keys) == 0
    assert train(*keys, "--run.name=whole") == 0
    assert curve("tiny") == curve("whole")


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_run_whose_last_validation_is_not_finite_is_not_done(
    folder: Path, unsound_validation: Callable[[int], None], action: str
) -> None:
    keys = ("--validation.every_steps=32", f"--resilience.on_nonfinite={action}")
    unsound_validation(1)
    assert [train(*keys), train(*keys)] == [3, 3]
    assert steps("tiny")[-1] == 32 and "the validation loss" in reason("tiny")


# Issue 14, item 19: a stop between two checkpoints does not move the point that a rollback goes back to.


@pytest.mark.parametrize("stops", [(23,), (5, 21, 25)])
@pytest.mark.parametrize(("every", "point"), [(10, 20), (30, 0)])
def test_a_rollback_goes_where_it_would_have_without_the_stops(
    folder: Path, scramble: Callable[..., None], stops: tuple[int, ...], every: int, point: int
) -> None:
    scramble(lambda first: first == BAD)
    keys = ("--resilience.on_spike=rollback", f"--checkpoint.every_steps={every}", "--checkpoint.keep_last=1")
    keys = (*keys, "--metrics.log_every=1")
    assert train(*keys, "--run.name=whole") == 0
    for stop in stops:
        assert train(*keys, "--run.name=parts", f"--run.stop_after_step={stop}") == 75
    assert train(*keys, "--run.name=parts") == 0
    for run in ("whole", "parts"):
        assert [row["values"]["to_step"] for row in rows(run, "rollback")] == [point]
        assert steps(run) == [32], "the point is kept no longer than it is needed"
    assert curve("parts") == curve("whole") and rows("parts", "gradient_spike") == rows("whole", "gradient_spike")


def test_a_run_that_began_with_anothers_state_goes_back_to_it_after_a_stop(
    folder: Path, scramble: Callable[..., None]
) -> None:
    scramble(lambda first: first == BAD)
    assert train("--resilience.on_spike=skip", "--run.name=base", "--run.stop_after_step=20") == 75
    keys = ("--checkpoint.resume_from=runs/base/20", "--checkpoint.every_steps=30", "--resilience.on_spike=rollback")
    assert train(*keys, "--run.name=whole") == 0
    assert train(*keys, "--run.name=parts", "--run.stop_after_step=23") == 75
    assert train(*keys, "--run.name=parts") == 0
    for run in ("whole", "parts"):
        assert [row["values"]["to_step"] for row in rows(run, "rollback")] == [20]
    assert curve("parts") == curve("whole")


def test_a_stop_right_after_going_back_does_not_hide_that_the_run_did(
    folder: Path, unsound: Callable[..., None]
) -> None:
    """The first step after going back is bad again, in the next start of the run."""
    unsound(lambda self, batch: 25 * BATCH <= batch.samples[0] < 27 * BATCH)
    keys = ("--resilience.on_nonfinite=rollback", "--metrics.log_every=1")
    assert train(*keys, "--run.name=whole") == 0
    assert train(*keys, "--run.name=parts", "--run.stop_after_step=25") == 75
    assert train(*keys, "--run.name=parts") == 0
    for run in ("whole", "parts"):
        assert [row["values"]["to_step"] for row in rows(run, "rollback")] == [20, 10]
    assert curve("parts") == curve("whole")
