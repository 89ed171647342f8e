"""The loop of a run: takes it from step to step, and validates, saves, stops and goes back where the recipe says so.

The step itself is `training/step.py`; docs/step.md tells which 12 files one enters, and why. Nothing calls back into
the trainer; each package is handed values and returns values.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NoReturn

import torch
from torch import Tensor

from titanlite.checkpoint.format import CheckpointMetadata
from titanlite.checkpoint.save import environment
from titanlite.data.read_log import WENT_BACK
from titanlite.errors import StoppedEarly
from titanlite.observe.inspection import trace_shapes
from titanlite.observe.metrics import Metrics, peak_flops
from titanlite.optim.schedules import lr_factor
from titanlite.parallel.model import Reports
from titanlite.resilience.corruption import compare_replicas
from titanlite.resilience.guards import BadStep, RollBack, nonfinite_names
from titanlite.resilience.signals import StopRequests
from titanlite.training.feed import Feed
from titanlite.training.restore import restore
from titanlite.training.saving import Saving, usable_snapshots
from titanlite.training.setup import Run, rank_plan
from titanlite.training.step import take_step
from titanlite.training.train_state import TrainState
from titanlite.training.validation import validate

_LOOK_EVERY_SECONDS = 1.0  # for what saves have come to, and who asks for one: it may take a shared file system a while
_COLLECT_EVERY = 100  # steps between garbage collections: left to itself, Python pauses ranks at different moments
_ANOTHER_UNREADABLE = "another rank cannot read its data"


class Trainer:
    """One run on one rank. `train` takes it from the latest checkpoint (or the beginning) to the end."""

    def __init__(self, run: Run) -> None:
        """Build model, optimizer and guards on the device, with the values of the checkpoint that `run.start` means, if
        there is one. `run.progress` is kept up to date.
        """
        recipe, world = run.recipe, run.world
        self.state = TrainState(recipe, world)
        self.run = run
        run.snapshots = usable_snapshots(run, self.state.shards_by_name())
        self.saving = Saving(run)
        restore(self.state, run, run.start)
        self._plan, _ = rank_plan(recipe, world)
        self._feed: Feed
        card = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
        flops = self.state.spec.flops_per_token(self.state.config, recipe.training.sequence_length)
        self.metrics = Metrics(world.size, world.device, flops, peak_flops(card))

    def train(self) -> None:
        """Train to the last step. Raises `StoppedEarly` after saving, `GuardStop`, or `CheckpointError`."""
        run, started = self.run, time.monotonic()
        self.metrics.start(run.progress.step, run.progress.tokens)
        run.read_log.begin(run.progress.step)
        grace = run.recipe.resilience.grace_seconds
        requests = StopRequests(run.world, grace, self.saving.describe_loss)
        with requests, _collecting_garbage_seldom(), self.saving:
            while True:
                try:
                    self._take_steps(requests, started)
                    return
                except RollBack as back:
                    bad = back.bad
                self._roll_back(bad)

    def _take_steps(self, requests: StopRequests, started: float) -> None:
        """From the step and the sample that the run is at to the end; the host only queues work, where nothing is
        logged, validated or saved. Raises what `train` does, or `RollBack`.
        """
        run, progress, recipe, look_at, first = self.run, self.run.progress, self.run.recipe, 0.0, ExitStack()
        self._stop_if(None)
        feed = self._feed = Feed(run, self._plan)
        first.enter_context(run.watchdog.during("starting"))  # a first step compiles
        if recipe.debug.trace_shapes:
            first.enter_context(trace_shapes(self.state.model.module, run.logger.info))
        for batch in feed.batches():
            number, wants_save = progress.step + 1, False
            factor = lr_factor(number, recipe.schedule, run.total_steps)
            loss, norm, reports = take_step(self.state, number, batch, factor)
            progress.step, progress.samples = number, batch.first + batch.sequences
            progress.tokens += batch.sequences * recipe.training.sequence_length
            first.close()
            if number in (1, run.total_steps) or number % recipe.metrics.log_every == 0:
                self._log(loss, norm, reports, recipe.optimizer.lr * factor)
            if number % _COLLECT_EVERY == 0:
                gc.collect(1)
            self._do_what_is_due()
            if (now := time.monotonic()) >= look_at:
                look_at = now + _LOOK_EVERY_SECONDS
                self.saving.look()
                wants_save = self.saving.due()
            limit = self._time_limit(started) or ("data cannot be read" if feed.failure is not None else None)
            stop = limit or (requests.received.name if requests.received is not None else None)
            if run.world.size > 1:
                stop, wants_save = requests.agree(limit, wants_save)
            self._stop_if(stop, feed.failure)
            if wants_save:
                with self.metrics.paused():
                    self._save()
        self._save(at_end=True)  # a signal waits for this one too
        failure = feed.failure
        if not run.world.all_equal(int(failure is None)) or failure is not None:
            self._stop(_ANOTHER_UNREADABLE, failure)
        self.state.guards.require_good_end(progress.step, progress.validation_loss)

    def _log(self, loss: Tensor, norm: Tensor, reports: Reports, lr: float) -> None:
        """Write the row of the step that was just taken, and what is to be said of the steps since the row before."""
        run, progress, feed = self.run, self.run.progress, self._feed
        step, waited, feed.waited_seconds = progress.step, feed.waited_seconds, 0.0
        row = self.metrics.record(step, loss, norm, reports, lr, progress.samples, progress.tokens, waited)
        run.read_log.flush()  # whoever sees the row can have the step's samples shown
        run.logger.write(row)
        self._review()
        for sentence in run.watchdog.stragglers():
            run.logger.event(step, "straggler", sentence)

    def _do_what_is_due(self) -> None:
        """Compare, validate and save after as many steps as the recipe says."""
        recipe, step, last = self.run.recipe, self.run.progress.step, self.run.progress.step == self.run.total_steps

        def due(every: int) -> bool:
            return every > 0 and step % every == 0

        compares = due(recipe.resilience.check_replicas_every)
        validates = due(recipe.validation.every_steps) or (last and recipe.validation.every_steps > 0)
        saves = due(recipe.checkpoint.every_steps) and not last
        keeps = due(recipe.resilience.snapshot_every) and not last and self.run.snapshots is not None
        if not (compares or validates or saves or keeps):
            return
        with self.metrics.paused():
            if compares:
                compare_replicas(step, self.state.shards_by_name(), self.run.world)
            if validates:
                self._validate(last)
            if saves:
                self._save()
            if keeps:
                self._examine()
                self.saving.take_snapshot(self.state.shards_by_name(), self._metadata())

    def _validate(self, last: bool) -> None:
        step, guards = self.run.progress.step, self.state.guards
        with self.run.watchdog.during("validating"):
            loss, failure = validate(self.run, self._plan, self.state.model, last)
            if loss is None:
                self._stop(_ANOTHER_UNREADABLE, failure)
            self.run.progress.validated = step, loss
            if not math.isfinite(loss):
                self._examine()  # raises if the weights are to blame
                bad = BadStep(step, "nonfinite_validation", guards.section.on_nonfinite, loss)
                self._write_down(bad)
                if bad.action == "stop":
                    self._save(at_end=True)
                guards.act([bad])

    # ---- saving and stopping

    def _save(self, at_end: bool = False) -> None:
        """Begin a checkpoint of this step; `at_end`, return once it is committed. A run whose numbers went bad stops
        here instead.
        """
        self._examine()
        progress, every = self.run.progress, self.run.recipe.checkpoint.every_steps
        if not at_end or progress.step == self.run.total_steps or not every or progress.step % every == 0:
            progress.back_to, progress.gone_back = progress.step, False
        save = self.saving.commit if at_end else self.saving.begin
        save(self.state.shards_by_name(), self._metadata())

    def _metadata(self) -> CheckpointMetadata:
        """What a checkpoint of this step says beside the tensors."""
        run, guards, data, progress = self.run, self.state.guards, self.run.data, self.run.progress
        values = {
            **data.train.past(progress.samples),
            **data.validation_texts,
            "tokenizer": data.tokenizer.fingerprint,
            **progress.values(guards.skips_in_a_row, guards.goes_back),
        }
        place = progress.step, progress.samples, progress.tokens
        return CheckpointMetadata(*place, run.recipe_text, values, environment(run.world.device))

    def _stop_if(self, reason: str | None, failure: Exception | None = None) -> None:
        """`_stop` if there is a reason to, or this is the step to stop after, and the run has more steps to go."""
        step, limit = self.run.progress.step, self.run.recipe.run.stop_after_step
        if limit is not None and step >= limit:
            reason = f"run.stop_after_step = {limit}"
        if reason and step < self.run.total_steps:
            self._stop(reason, failure)

    def _stop(self, reason: str, failure: Exception | None) -> NoReturn:
        """Save, and raise `StoppedEarly`, or, for the `failure` of this rank to read its data, its error."""
        self._save(at_end=True)
        step = self.run.progress.step
        if failure is not None:
            raise self._feed.explain(failure, f" The state after step {step} is saved.") from failure
        raise StoppedEarly(f"stopped after step {step} of {self.run.total_steps} ({reason}); state saved")

    def _time_limit(self, started: float) -> str | None:
        limit = self.run.recipe.run.stop_after_minutes
        over = limit is not None and time.monotonic() - started >= 60 * limit
        return f"run.stop_after_minutes = {limit:g}" if over else None

    # ---- judging the state and the last steps

    def _examine(self) -> None:
        """Raise as the recipe says if what is to be saved is not good."""
        world, step, shards = self.run.world, self.run.progress.step, self.state.shards_by_name()
        if self.run.checkpoints.covers(step):
            self._review()
            return
        learned = {name: shard.tensor for name, shard in shards.items() if not name.startswith("guards.")}
        self._review(nonfinite_names(learned, world))
        if self.run.recipe.resilience.check_replicas_every:
            compare_replicas(step, shards, world)

    def _review(self, nonfinite: str = "") -> None:
        """Write down what went bad since the last review; `nonfinite`: what of the state is not finite.

        Raises `GuardStop` or `RollBack` as the recipe says.
        """
        found = self.state.guards.review(self.run.progress.step, nonfinite)
        for bad in found:
            self._write_down(bad)
        self.state.guards.act(found)

    def _write_down(self, bad: BadStep) -> None:
        first, end = self._feed.samples_of(bad.step)
        skipped = bad.action == "skip" and bad.outcome == "not applied"
        of = f" ({self.state.guards.skipped} of at most {self.run.recipe.resilience.max_skips})" * skipped
        said = f"{bad}; {bad.outcome}: {bad.action}{of}; samples {first} to {end - 1}"
        self.run.logger.event(bad.step, bad.kind, said, {**bad.values(), "samples": [first, end - 1]})

    def _roll_back(self, bad: BadStep) -> None:
        """Go back to the newest checkpoint, or to the beginning, and on from there with samples not yet read.

        Not to one that a stop between two checkpoints left: a run without that stop has none. One further back where
        what comes first after going back is bad again, for the cause may be in what the run went back to.

        The state gone back to is saved at once with the place in the data: a run that is killed before its next save
        must not meet the same samples again, nor forget that it went back.
        """
        run, progress, guards = self.run, self.run.progress, self.state.guards
        left, read, counts = progress.step, progress.samples, (guards.skipped, guards.rollbacks + 1)
        again = progress.gone_back and (bad.step == progress.back_to + 1 or bad.outcome != "not applied")
        with run.watchdog.during("going back"):
            self.saving.look(wait=True)
            last, steps = progress.back_to - again, run.checkpoints.agree_on_steps()
            if last >= 0:  # if there is none further back, to that again
                last = max([last, *steps[:1]])
            restore(self.state, run, run.start.still(""), last)
        progress.back_to, progress.gone_back = progress.step, True
        guards.roll_back(*counts)
        first, progress.samples = progress.samples, read
        del self._feed  # its workers end
        run.read_log.begin(progress.step)
        run.read_log.write(WENT_BACK, progress.step, first, read - first)
        run.logger.rewind(progress.step)
        said = (
            f"step {bad.step}: {bad}. From step {left} back to {progress.step}, past samples {first} to {read - 1} "
            f"({guards.rollbacks} of at most {run.recipe.resilience.max_rollbacks})"
        )
        run.logger.event(left, "rollback", said, {"to_step": progress.step, "samples": [first, read - 1]})
        # What it was loaded from says that less was read.
        self.saving.commit_instead(self.state.shards_by_name(), self._metadata())
        self.metrics.start(progress.step, progress.tokens)


@contextmanager
def _collecting_garbage_seldom() -> Iterator[None]:
    """Python's garbage collector only where the loop calls it; what was built before the loop is left out of it."""
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()
