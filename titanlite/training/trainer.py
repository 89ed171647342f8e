"""The loop of a run: takes it from step to step, and validates, saves, stops and goes back where the recipe says so.

A step is read here, then in `training/feed.py`, `training/train_state.py`, `parallel/model.py`, `models/llama.py` and
`models/layers.py`. Nothing calls back into the trainer; each package is handed values and returns values.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from titanlite.checkpoint.format import CheckpointMetadata
from titanlite.checkpoint.manager import CheckpointManager
from titanlite.checkpoint.save import environment
from titanlite.checkpoint.snapshots import Snapshots
from titanlite.corpus.verification import Verification
from titanlite.data.loader import UNREADABLE
from titanlite.data.read_log import NO_LOG, WENT_BACK, ReadLog
from titanlite.data.splits import DataSplits
from titanlite.errors import StoppedEarly
from titanlite.models.shard import may_be_nonfinite
from titanlite.observe.inspection import trace_shapes
from titanlite.observe.logger import RunLogger
from titanlite.observe.metrics import Metrics, peak_flops
from titanlite.observe.run_folder import GO_ON, Start
from titanlite.optim.schedules import lr_factor
from titanlite.parallel.batch import Batch
from titanlite.parallel.world import World
from titanlite.plan.layout import batch_plan, require_layout, total_steps
from titanlite.recipe.sections import Recipe
from titanlite.resilience.corruption import compare_replicas
from titanlite.resilience.guards import BadStep, RollBack, nonfinite_names
from titanlite.resilience.signals import StopRequests
from titanlite.resilience.watchdog import OFF, Watchdog
from titanlite.training.feed import Feed
from titanlite.training.progress import History, RunProgress
from titanlite.training.restore import reordered_steps, restore
from titanlite.training.saving import Saving, usable_snapshots
from titanlite.training.train_state import TrainState
from titanlite.training.validation import Validation

_COLLECT_EVERY = 100
"""Steps between garbage collections: left to itself, Python would pause the ranks at different moments."""


class Trainer:
    """One run on one rank. `run` trains from the latest checkpoint (or the beginning) to the end."""

    def __init__(
        self,
        recipe: Recipe,
        recipe_text: str,
        world: World,
        data: DataSplits,
        checkpoints: CheckpointManager,
        logger: RunLogger,
        start: Start = GO_ON,
        watchdog: Watchdog = OFF,
        snapshots: Snapshots | None = None,
        read_log: ReadLog = NO_LOG,
        verification: Verification | None = None,
        progress: RunProgress | None = None,
    ) -> None:
        """Build model, optimizer and guards on the device, with the values of the checkpoint that `start` means, if
        there is one. `progress` is kept up to date.
        """
        self.recipe = recipe
        self.recipe_text = recipe_text
        self.world = world
        self.logger = logger
        self.watchdog = watchdog
        self.progress = progress or RunProgress()
        self.state = TrainState(recipe, world)
        self._start = start
        snapshots = usable_snapshots(snapshots, self.state.shards_by_name(), start.restarted, logger.info)
        every = recipe.checkpoint.every_minutes
        self.saving = Saving(checkpoints, snapshots, logger, read_log, watchdog, every, world.is_first)
        self._restore(data, start)
        layout = require_layout(recipe.parallel, world.size)
        plan = batch_plan(recipe, layout, layout.coordinates(world.rank).data)
        self.feed = Feed(recipe, world, data, plan, self.progress, logger, read_log, verification)
        self.validation = Validation(data.validation, recipe.validation.sequences, plan, self.state.model, logger)
        card = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
        self.metrics = Metrics(
            total_steps=total_steps(recipe.training),
            log_every=recipe.metrics.log_every,
            devices=world.size,
            device=world.device,
            flops_per_token=self.state.spec.flops_per_token(self.state.config, recipe.training.sequence_length),
            peak_flops=peak_flops(card),
        )

    def _restore(self, data: DataSplits, start: Start, last: int | None = None) -> None:
        """Begin, or resume from a checkpoint (up to step `last`, if given) or a snapshot, as `start` says."""
        snapshots = self.saving.snapshots if last is None else None
        manifest = restore(
            self.state, self.state.shards_by_name(), self.recipe, self.world, self.saving.checkpoints, snapshots,
            data, start, self.logger.info, last,
        )  # fmt: skip
        self.history = History.of(manifest, reordered_steps(manifest, data, self.logger.info))
        self.progress.step = manifest.step if manifest is not None else 0
        self.progress.samples = manifest.samples if manifest is not None else 0
        self.progress.tokens = manifest.tokens if manifest is not None else 0
        self.state.guards.skips_in_a_row = self.history.skips

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return total_steps(self.recipe.training)

    @property
    def validation_loss(self) -> float | None:
        """On the first set after the step that the run is at; None if the model was not validated then."""
        return self.history.validation_loss(self.progress.step)

    def run(self) -> None:
        """Train to the last step. Raises `StoppedEarly` after saving, `GuardStop`, or `CheckpointError`."""
        started = time.monotonic()
        self.watchdog.beat(self.progress.step, "starting")
        self.metrics.start(tokens=self.progress.tokens)
        grace = self.recipe.resilience.grace_seconds
        stop_requests = StopRequests(
            self.world.size, self.world.is_first, grace, lambda: self.saving.describe_loss(self.progress.step)
        )
        with stop_requests, _collecting_garbage_seldom(), self.saving.finished(self.world.size == 1):
            while True:
                try:
                    self._stop_if(self._step_limit())
                    self._train(stop_requests, started)
                    return
                except RollBack as back:
                    self._roll_back(back.bad)

    def _train(self, stop_requests: StopRequests, started: float) -> None:
        """From the step and the sample that the run is at to the end. Raises what `run` does, or `RollBack`."""
        for batch, wait_seconds in self._batches():
            self._train_step(batch, wait_seconds)
            self._after_step()
            unreadable = "data cannot be read" if self._data_failure is not None else None
            agreement = stop_requests.agree(self._time_limit(started) or unreadable, self.saving.due())
            self._stop_if(self._step_limit() or agreement.stop)
            if agreement.save:
                with self.metrics.paused():
                    self._save()
            self.saving.look()
        self._save_at_end()  # a signal waits for this one too
        alike = self.world.all_equal(int(self._data_failure is None))
        self._raise_unreadable()
        step = self.progress.step
        if not alike:
            raise StoppedEarly(f"all {step} steps are taken and saved, but another rank cannot read its data")
        self.state.guards.require_good_end(step, self.validation_loss)

    def _batches(self) -> Iterator[tuple[Batch, float]]:
        """The remaining steps' batches, each with the seconds it was waited for."""
        with ExitStack() as first_step:
            if self.recipe.debug.trace_shapes:
                first_step.enter_context(trace_shapes(self.state.model.module, self.logger.info))
            try:
                for batch in self.feed.batches():
                    yield batch
                    first_step.close()
            except UNREADABLE as error:
                raise self.feed.explain(error, self._saved_alone()) from error

    def _train_step(self, batch: Batch, wait_seconds: float) -> None:
        """One optimizer step; the host only queues work, unless this step is logged."""
        progress = self.progress
        progress.step += 1
        progress.samples = self.feed.record(progress.step, batch.samples)
        progress.tokens += self.feed.plan.global_batch * self.recipe.training.sequence_length
        factor = lr_factor(progress.step, self.recipe.schedule, self.total_steps)
        loss, norm = self.state.step(progress.step, batch, factor)
        row = self.metrics.record(
            step=progress.step,
            loss=loss,
            grad_norm=norm,
            lr=self.recipe.optimizer.lr * factor,
            samples=progress.samples,
            tokens=progress.tokens,
            data_wait_seconds=wait_seconds,
        )
        if row is not None:
            self.feed.read_log.flush()  # whoever sees the row can have the step's samples shown
            self.logger.write(row)
            self._review()
            for sentence in self.watchdog.stragglers():
                self.logger.event(progress.step, "straggler", sentence)
        self.watchdog.beat(progress.step)

    def _after_step(self) -> None:
        step, last = self.progress.step, self.progress.step == self.total_steps
        if step % _COLLECT_EVERY == 0:
            gc.collect(1)
        every = self.recipe.resilience.check_replicas_every
        if every and step % every == 0:
            with self.metrics.paused():
                self._compare_replicas()
        every = self.recipe.validation.every_steps
        if every and (last or step % every == 0):
            with self.metrics.paused(), self.watchdog.during("validating"):
                self._validate(last)
        every = self.recipe.checkpoint.every_steps
        if every and step % every == 0 and not last:
            with self.metrics.paused():
                self._save()
        every = self.recipe.resilience.snapshot_every
        if self.saving.snapshots is not None and step % every == 0 and not last:
            with self.metrics.paused():
                self._examine()
                self.saving.take_snapshot(self.state.shards_by_name(), self._metadata())

    def _validate(self, last: bool) -> None:
        step = self.progress.step
        loss = self.validation.loss_after(step, last)
        if loss is None:
            return
        self.history.validated = step, loss
        if not math.isfinite(loss):
            self._examine()  # raises if the weights are to blame
            bad = BadStep(step, "nonfinite_validation", self.state.guards.section.on_nonfinite, loss)
            self._write_down(bad)
            if bad.action == "stop":
                self._save_at_end()
            self.state.guards.act([bad])

    # ---- saving and stopping

    def _save(self) -> None:
        """Begin a checkpoint of this step; a run whose numbers went bad stops here instead."""
        self._examine()
        self.history.back_to, self.history.gone_back = self.progress.step, False
        self.saving.begin(self.state.shards_by_name(), self._metadata())

    def _save_at_end(self) -> None:
        """Return once this step is committed."""
        self._examine()
        if self.progress.step == self.total_steps or not self.recipe.checkpoint.every_steps:
            self.history.back_to, self.history.gone_back = self.progress.step, False
        self.saving.commit(self.state.shards_by_name(), self._metadata())

    def _saved_alone(self) -> str:
        """Save before an error, if there are no other ranks to agree with."""
        if self.world.size > 1 or self.progress.step == 0:
            return ""
        self._save_at_end()
        return f" The state after step {self.progress.step} is saved."

    def _metadata(self) -> CheckpointMetadata:
        """What a checkpoint of this step says beside the tensors."""
        data, guards, progress = self.feed.data, self.state.guards, self.progress
        values = {
            **data.train.past(progress.samples),
            **data.validation_texts,
            "tokenizer": data.tokenizer.fingerprint,
            **self.history.values(progress.step, guards.skips_in_a_row, guards.goes_back),
        }
        place = progress.step, progress.samples, progress.tokens
        return CheckpointMetadata(*place, self.recipe_text, values, environment(self.world.device))

    def _stop_if(self, reason: str | None) -> None:
        """Save and raise `StoppedEarly` if there is a reason to and the run has more steps to go."""
        step, total = self.progress.step, self.total_steps
        if reason and step < total:
            self._save_at_end()
            self._raise_unreadable()
            raise StoppedEarly(f"stopped after step {step} of {total} ({reason}); state saved")

    def _step_limit(self) -> str | None:
        limit = self.recipe.run.stop_after_step
        return f"run.stop_after_step = {limit}" if limit is not None and self.progress.step >= limit else None

    def _time_limit(self, started: float) -> str | None:
        limit = self.recipe.run.stop_after_minutes
        over = limit is not None and time.monotonic() - started >= 60 * limit
        return f"run.stop_after_minutes = {limit:g}" if over else None

    @property
    def _data_failure(self) -> Exception | None:
        """Why this rank cannot go on with its data."""
        return self.feed.failure or self.validation.failure

    def _raise_unreadable(self) -> None:
        """Raise why this rank cannot go on with its data, if there is a reason. The state is saved."""
        if (failure := self._data_failure) is not None:
            raise self.feed.explain(failure, f" The state after step {self.progress.step} is saved.") from failure

    # ---- judging the state and the last steps

    def _examine(self) -> None:
        """Raise as the recipe says if what is to be saved is not good."""
        if self.saving.covers(self.progress.step):
            self._review()
            return
        suspect = may_be_nonfinite(self._learned().values()).to(self.world.device)  # of a rank without any: on the host
        self._review(self.world.reduce(suspect.int(), "max").bool())
        if self.recipe.resilience.check_replicas_every:
            self._compare_replicas()

    def _review(self, suspect: Tensor | None = None) -> None:
        """Write down what went bad since the last review; `suspect`: whether the state may hold inf or NaN.

        Raises `GuardStop` or `RollBack` as the recipe says.
        """
        find_names = lambda: nonfinite_names(self._learned(), self.world.size)  # noqa: E731
        found = self.state.guards.review(self.progress.step, suspect, find_names)
        for bad in found:
            self._write_down(bad)
        self.state.guards.act(found)

    def _write_down(self, bad: BadStep) -> None:
        first, last = self.feed.samples_of(bad.step)
        skipped = bad.action == "skip" and bad.outcome == "not applied"
        of = f" ({self.state.guards.skipped} of at most {self.recipe.resilience.max_skips})" * skipped
        said = f"{bad}; {bad.outcome}: {bad.action}{of}; samples {first} to {last}"
        self.logger.event(bad.step, bad.kind, said, {**bad.values(), "samples": [first, last]})

    def _roll_back(self, bad: BadStep) -> None:
        """Go back to the newest checkpoint, or to the beginning, and on from there with samples not yet read.

        Not to one that a stop between two checkpoints left: a run without that stop has none. One further back where
        what comes first after going back is bad again, for the cause may be in what the run went back to.

        The state gone back to is saved at once with the place in the data: a run that is killed before its next save
        must not meet the same samples again, nor forget that it went back.
        """
        progress, guards, history = self.progress, self.state.guards, self.history
        left, read, counts = progress.step, progress.samples, (guards.skipped, guards.rollbacks + 1)
        again = history.gone_back and (bad.step == history.back_to + 1 or bad.outcome != "not applied")
        with self.watchdog.during("going back"):
            self.saving.settle()
            last = history.back_to - again
            oldest = min(
                self.saving.checkpoints.agree_on_steps(), default=-1
            )  # that again, if there is none further back
            self._restore(self.feed.data, self._start.again, last=max(last, oldest) if last >= 0 else last)
        self.history.back_to, self.history.gone_back = progress.step, True
        guards.roll_back(*counts)
        first, progress.samples = progress.samples, read
        self.feed.restart()
        self.feed.read_log.passed_over(WENT_BACK, progress.step, first, read)
        self.logger.rewind(progress.step)
        said = (
            f"step {bad.step}: {bad}. From step {left} back to {progress.step}, past samples {first} to {read - 1} "
            f"({guards.rollbacks} of at most {self.recipe.resilience.max_rollbacks})"
        )
        self.logger.event(left, "rollback", said, {"to_step": progress.step, "samples": [first, read - 1]})
        # What it was loaded from says that less was read.
        self.saving.commit_instead(self.state.shards_by_name(), self._metadata())
        self.metrics.start(tokens=progress.tokens)

    def _compare_replicas(self) -> None:
        compare_replicas(self.progress.step, self.state.shards_by_name(), self.world.size)

    def _learned(self) -> dict[str, Tensor]:
        """Weights and moments, by the names that they have in a checkpoint."""
        shards = self.state.shards_by_name()
        return {name: shard.tensor for name, shard in shards.items() if not name.startswith("guards.")}


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
