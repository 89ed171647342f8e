"""The run: everything is built once, then one loop takes it from step to step.

A step in six files: here, `data/loader.py`, `training/train_state.py`, `parallel/model.py`, `models/llama.py`,
`models/layers.py`. Nothing calls back into the trainer; each room is handed values and returns values.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from titanlite.checkpoint.format import Scalar
from titanlite.checkpoint.manager import BACK_TO, VALIDATION_LOSS, CheckpointManager
from titanlite.checkpoint.save import CheckpointMetadata, environment
from titanlite.checkpoint.snapshots import Snapshots
from titanlite.corpus.verification import Verification
from titanlite.data.audit import REORDERED
from titanlite.data.loader import UNREADABLE, ReadAhead, train_loader
from titanlite.data.read_log import NO_LOG, SKIPPED, WENT_BACK, ReadLog
from titanlite.data.splits import DataSplits
from titanlite.errors import DataError, StoppedEarly, UsageError
from titanlite.models.shard import Shard, may_be_nonfinite
from titanlite.observe.flops import peak_flops
from titanlite.observe.inspection import NonfiniteFinder, traced_shapes
from titanlite.observe.logger import RunLogger
from titanlite.observe.metrics import Metrics
from titanlite.observe.run_folder import GO_ON, Start
from titanlite.optim.schedules import lr_factor
from titanlite.parallel.batch import Batch
from titanlite.parallel.world import World
from titanlite.plan.layout import batch_plan, require_layout, sample_schedule, total_steps
from titanlite.recipe.sections import Recipe
from titanlite.resilience.corruption import compare_replicas
from titanlite.resilience.guards import BadStep, RollBack, nonfinite_names
from titanlite.resilience.signals import StopRequests
from titanlite.resilience.watchdog import OFF, Watchdog
from titanlite.training.restore import reordered_steps, restore
from titanlite.training.saving import Saving
from titanlite.training.train_state import TrainState
from titanlite.training.validation import Validation

_COLLECT_EVERY = 100
"""Steps between garbage collections: left to itself, Python would pause the ranks at different moments."""
# Values of a checkpoint that a run goes on by, beside those of `manager`:
_GONE_BACK = "rolled_back"
"""Nothing was saved since the run went back to the step of `BACK_TO`, or to this one."""
_SKIPPED_SINCE = "skipped_since"
"""First of the steps skipped in a row, up to this one."""
_BAD_VALIDATION = "nonfinite_validation"
"""The validation loss after this step was not finite."""


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
    ) -> None:
        """Build model, optimizer and guards on the device, with the values of the checkpoint that `start` means, if
        there is one.
        """
        self.recipe = recipe
        self.recipe_text = recipe_text
        self.world = world
        self.data = data
        self.checkpoints = checkpoints
        self.logger = logger
        self.watchdog = watchdog
        self.read_log = read_log
        self._verification = verification
        self.total_steps = total_steps(recipe.training)
        layout = require_layout(recipe.parallel, world.size)
        self.plan = batch_plan(recipe, layout, layout.coordinates(world.rank).data)

        self.learner = learner = TrainState(recipe, world)
        self.model, self.shards, self.guards = learner.model, learner.shards, learner.guards
        self._start = start
        self._environment = environment(world.device)
        self.snapshots = self._usable(snapshots)
        self._restore(start, self.snapshots)
        self._begin_course()
        self._ahead = self._reading(iter(()))
        every = recipe.checkpoint.every_minutes
        self.saving = Saving(checkpoints, self.snapshots, logger, self.read_log, watchdog, every, world.is_first)
        self.validation = Validation(data.validation, recipe.validation.sequences, self.plan, self.model, logger)
        self.finder = NonfiniteFinder(self.model.module) if recipe.debug.find_nonfinite else None
        card = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
        self.metrics = Metrics(
            total_steps=self.total_steps,
            log_every=recipe.metrics.log_every,
            devices=world.size,
            device=world.device,
            flops_per_token=learner.spec.flops_per_token(learner.config, recipe.training.sequence_length),
            peak_flops=peak_flops(card),
        )

    def _usable(self, snapshots: Snapshots | None) -> Snapshots | None:
        """The snapshots, if the machines can keep any. A restart goes on without rather than not at all."""
        if snapshots is None:
            return None
        try:
            snapshots.prepare()
            snapshots.require_room(self._state())
        except UsageError as error:
            if not self._start.restarted:
                raise
            self.logger.info(f"warning: no snapshots are taken: {error}")
            return None
        return snapshots

    def _restore(self, start: Start, snapshots: Snapshots | None = None, last: int | None = None) -> None:
        """Begin, or go on from a checkpoint (up to step `last`) or one of the `snapshots`, as `start` says."""
        manifest = restore(
            self.learner, self._state(), self.recipe, self.world, self.checkpoints, snapshots,
            self.data, start, self.logger.info, last,
        )  # fmt: skip
        self._reordered = reordered_steps(manifest, self.data, self.logger.info)
        self.step = manifest.step if manifest is not None else 0
        """Steps taken so far."""
        self.samples = manifest.samples if manifest is not None else 0
        """Samples read so far: where in the order the next step begins."""
        self.tokens = manifest.tokens if manifest is not None else 0
        """Tokens trained on so far."""
        values = manifest.values if manifest is not None else {BACK_TO: -1}
        loss = math.nan if values.get(_BAD_VALIDATION) else values.get(VALIDATION_LOSS)
        self._validated = (self.step, float(loss)) if isinstance(loss, int | float) else None
        """The last step after which the model was validated, and its loss: on the first set, or one not finite."""
        self._back_to = _step_in(values, BACK_TO, self.step)
        """The step that a rollback goes back to: one that a run without stops would have saved too; -1: the start."""
        self._gone_back = bool(values.get(_GONE_BACK))
        """Whether the run went back there, and has saved nothing since."""
        self.guards.skips_in_a_row = _step_in(values, _SKIPPED_SINCE, self.step + 1), self.step

    def _begin_course(self) -> None:
        """From the step and the sample that the run is at."""
        self._sample_schedule = sample_schedule(self.recipe, self.step, self.samples)
        self.read_log.begin(self.step)

    def run(self) -> None:
        """Train to the last step. Raises `StoppedEarly` after saving, `GuardStop`, or `CheckpointError`."""
        started = time.monotonic()
        self.watchdog.beat(self.step, "starting")
        self.metrics.start(tokens=self.tokens)
        stop_requests = StopRequests(
            self.world.size,
            self.world.is_first,
            self.recipe.resilience.grace_seconds,
            lambda: self.saving.describe_loss(self.step),
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
        if not alike:
            raise StoppedEarly(f"all {self.step} steps are taken and saved, but another rank cannot read its data")
        self.guards.require_good_end(self.step, self.validation_loss)

    def _stop_if(self, reason: str | None) -> None:
        """Save and raise `StoppedEarly` if there is a reason to and the run has more steps to go."""
        if reason and self.step < self.total_steps:
            self._save_at_end()
            self._raise_unreadable()
            raise StoppedEarly(f"stopped after step {self.step} of {self.total_steps} ({reason}); state saved")

    @property
    def _data_failure(self) -> Exception | None:
        """Why this rank cannot go on with its data."""
        damage = self._verification.failure if self._verification else None
        return self._ahead.failure or self.validation.failure or damage

    def _raise_unreadable(self) -> None:
        """Raise why this rank cannot go on with its data, if there is a reason. The state is saved."""
        failure = self._data_failure
        if failure is None:
            return
        said = f" The state after step {self.step} is saved."
        if failure is self._ahead.failure:
            raise self._ahead.unreadable(said) from failure
        raise DataError(f"{str(failure).removesuffix('.')}.{said}") from failure

    def _train_step(self, batch: Batch, wait_seconds: float) -> None:
        """One optimizer step; the host only queues work, unless this step is logged."""
        self.step += 1
        self._take_samples(batch.samples)
        self.tokens += self.plan.global_batch * self.recipe.training.sequence_length
        if self.finder is not None:
            self.finder.step = self.step
        factor = lr_factor(self.step, self.recipe.schedule, self.total_steps)
        loss, norm = self.learner.step(self.step, batch, factor)
        row = self.metrics.record(
            step=self.step,
            loss=loss,
            grad_norm=norm,
            lr=self.recipe.optimizer.lr * factor,
            samples=self.samples,
            tokens=self.tokens,
            data_wait_seconds=wait_seconds,
        )
        if row is not None:
            self.read_log.flush()  # whoever sees the row can have the step's samples shown
            self.logger.write(row)
            self._review()
            for sentence in self.watchdog.stragglers():
                self.logger.event(self.step, "straggler", sentence)
        self.watchdog.beat(self.step)

    def _take_samples(self, own: tuple[int, ...]) -> None:
        """Write down what the step reads, this rank its `own`, and what it passes over."""
        first = self._sample_schedule.first_sample(self.step)
        if first > self.samples:
            said = f"samples {self.samples} to {first - 1} are passed over, as data.skip_steps says"
            self.logger.event(self.step, "data_skipped", said, {"samples": [self.samples, first - 1]})
            self.read_log.passed_over(SKIPPED, self.step, self.samples, first)
        self.samples = first + self.plan.global_batch
        self.read_log.read(self.step, own)

    def _after_step(self) -> None:
        if self.step % _COLLECT_EVERY == 0:
            gc.collect(1)
        every = self.recipe.resilience.check_replicas_every
        if every and self.step % every == 0:
            with self.metrics.paused():
                self._compare_replicas()
        last = self.step == self.total_steps
        every = self.recipe.validation.every_steps
        if every and (last or self.step % every == 0):
            with self.metrics.paused(), self.watchdog.during("validating"):
                self._validate(last)
        every = self.recipe.checkpoint.every_steps
        if every and self.step % every == 0 and not last:
            with self.metrics.paused():
                self._save()
        every = self.recipe.resilience.snapshot_every
        if self.snapshots is not None and self.step % every == 0 and not last:
            with self.metrics.paused():
                self._examine()
                self.saving.take_snapshot(self._state(), self._metadata())

    def _validate(self, last: bool) -> None:
        loss = self.validation.loss_after(self.step, last)
        if loss is None:
            return
        self._validated = self.step, loss
        if not math.isfinite(loss):
            self._examine()  # raises if the weights are to blame
            bad = self.guards.bad_validation(self.step, loss)
            self._write_down(bad)
            if bad.action == "stop":
                self._save_at_end()
            self.guards.act([bad])

    def _save(self) -> None:
        """Begin a checkpoint of this step; a run whose numbers went bad stops here instead."""
        self._examine()
        self._back_to, self._gone_back = self.step, False
        self.saving.begin(self._state(), self._metadata())

    def _save_at_end(self) -> None:
        """Return once this step is committed."""
        self._examine()
        if self.step == self.total_steps or not self.recipe.checkpoint.every_steps:
            self._back_to, self._gone_back = self.step, False
        self.saving.commit(self._state(), self._metadata())

    def _examine(self) -> None:
        """What is to be saved must be good."""
        if self.saving.covers(self.step):
            self._review()
            return
        suspect = may_be_nonfinite(self._learned().values()).to(self.world.device)  # of a rank without any: on the host
        self._review(self.world.reduce(suspect.int(), "max").bool())
        if self.recipe.resilience.check_replicas_every:
            self._compare_replicas()

    def _learned(self) -> dict[str, Tensor]:
        """Weights and moments, by the names that they have in a checkpoint."""
        return {name: shard.tensor for name, shard in self._state().items() if not name.startswith("guards.")}

    def _metadata(self) -> CheckpointMetadata:
        """What a checkpoint of this step says beside the tensors."""
        values: dict[str, Scalar] = {
            **self.data.train.past(self.samples),
            **self.data.validation_texts,
            "tokenizer": self.data.tokenizer.fingerprint,
        }
        if self._reordered:
            values[REORDERED] = " ".join(map(str, self._reordered))
        if (loss := self.validation_loss) is not None:
            values |= {VALIDATION_LOSS: loss} if math.isfinite(loss) else {_BAD_VALIDATION: True}
        if self.guards.goes_back and self._back_to != self.step:
            values[BACK_TO] = self._back_to
        if self._gone_back:
            values[_GONE_BACK] = True
        first, last = self.guards.skips_in_a_row
        if first <= last == self.step:
            values[_SKIPPED_SINCE] = first
        return CheckpointMetadata(self.step, self.samples, self.tokens, self.recipe_text, values, self._environment)

    def _review(self, suspect: Tensor | None = None) -> None:
        """Write down what went bad since the last review; `suspect`: whether the state may hold inf or NaN.

        Raises `GuardStop` or `RollBack` as the recipe says.
        """
        found = self.guards.review(self.step, suspect, lambda: nonfinite_names(self._learned(), self.world.size))
        for bad in found:
            self._write_down(bad)
        self.guards.act(found)

    def _write_down(self, bad: BadStep) -> None:
        first, last = self._sample_schedule.first_sample(bad.step), self._sample_schedule.end_sample(bad.step) - 1
        skipped = bad.action == "skip" and bad.outcome == "not applied"
        of = f" ({self.guards.skipped} of at most {self.recipe.resilience.max_skips})" * skipped
        said = f"{bad}; {bad.outcome}: {bad.action}{of}; samples {first} to {last}"
        self.logger.event(bad.step, bad.kind, said, {**bad.values(), "samples": [first, last]})

    def _roll_back(self, bad: BadStep) -> None:
        """Go back to the newest checkpoint, or to the beginning, and on from there with samples not yet read.

        Not to one that a stop between two checkpoints left: a run without that stop has none. One further back where
        what comes first after going back is bad again, for the cause may be in what the run went back to.

        The state gone back to is saved at once with the place in the data: a run that is killed before its next save
        must not meet the same samples again, nor forget that it went back.
        """
        left, read, counts = self.step, self.samples, (self.guards.skipped, self.guards.rollbacks + 1)
        again = self._gone_back and (bad.step == self._back_to + 1 or bad.outcome != "not applied")
        with self.watchdog.during("going back"):
            self.saving.settle()
            last = self._back_to - again
            oldest = min(self.checkpoints.agree_on_steps(), default=-1)  # that again, if there is none further back
            self._restore(self._start.again, last=max(last, oldest) if last >= 0 else last)
        self._back_to, self._gone_back = self.step, True
        self.guards.roll_back(*counts)
        first, self.samples = self.samples, read
        self._begin_course()
        self.read_log.passed_over(WENT_BACK, self.step, first, read)
        self.logger.rewind(self.step)
        said = (
            f"step {bad.step}: {bad}. From step {left} back to {self.step}, past samples {first} to {read - 1} "
            f"({self.guards.rollbacks} of at most {self.recipe.resilience.max_rollbacks})"
        )
        self.logger.event(left, "rollback", said, {"to_step": self.step, "samples": [first, read - 1]})
        self.saving.commit_instead(self._state(), self._metadata())  # what it was loaded from says that less was read
        self.metrics.start(tokens=self.tokens)

    def _compare_replicas(self) -> None:
        compare_replicas(self.step, self._state(), self.world.size)

    def _batches(self) -> Iterator[tuple[Batch, float]]:
        """The remaining steps' batches on the device, each with the seconds it was waited for."""
        section, cuda = self.recipe.data, self.world.device.type == "cuda"
        batches = train_loader(
            self.data.train,
            self.plan,
            self.samples,
            self.total_steps - self.step,
            workers=section.workers,
            prefetch=section.prefetch,
            pin_memory=cuda,
            overfit_one_batch=self.recipe.debug.overfit_one_batch,
            skipped=self._sample_schedule.skipped,
        )
        self._ahead = self._reading(batches)
        with ExitStack() as first_step:
            if self.recipe.debug.trace_shapes:
                first_step.enter_context(traced_shapes(self.model.module, self.logger.info))
            while True:
                before = time.perf_counter()
                try:
                    batch = next(self._ahead, None)
                except UNREADABLE as error:
                    raise self._ahead.unreadable(self._saved_alone()) from error
                if batch is None:
                    return
                moved = batch.to(self.world.device)
                yield moved, time.perf_counter() - before
                first_step.close()

    def _reading(self, batches: Iterator[Batch]) -> ReadAhead:
        # An agreement among ranks takes two steps.
        count = 0 if self.world.size == 1 else 2
        return ReadAhead(batches, count, self._sample_schedule)

    @property
    def under_way(self) -> tuple[int, int]:
        """The step that is being taken and its first sample; what fails now is put down to them."""
        return self._ahead.step, self._sample_schedule.first_sample(self._ahead.step)

    @property
    def validation_loss(self) -> float | None:
        """On the first set after the step that the run is at; None if the model was not validated then."""
        return self._validated[1] if self._validated is not None and self._validated[0] == self.step else None

    def _saved_alone(self) -> str:
        """Save before an error, if there are no other ranks to agree with."""
        if self.world.size > 1 or self.step == 0:
            return ""
        self._save_at_end()
        return f" The state after step {self.step} is saved."

    def _step_limit(self) -> str | None:
        limit = self.recipe.run.stop_after_step
        return f"run.stop_after_step = {limit}" if limit is not None and self.step >= limit else None

    def _time_limit(self, started: float) -> str | None:
        limit = self.recipe.run.stop_after_minutes
        over = limit is not None and time.monotonic() - started >= 60 * limit
        return f"run.stop_after_minutes = {limit:g}" if over else None

    def _state(self) -> dict[str, Shard]:
        """This rank's part of everything that a checkpoint holds, by name.

        What is not here is a function of the recipe, the step and the samples read.
        """
        learner = self.learner
        rooms = {"model": learner.weights, "optimizer": learner.optimizer.state(), "guards": self.guards.state()}
        return {
            f"{room}.{name}": shard
            for room, tensors in rooms.items()
            for name, shard in self.shards.shards_of(tensors).items()
        }


def _step_in(values: Mapping[str, Scalar], key: str, otherwise: int) -> int:
    """The step that the values of a checkpoint, which may come from anybody, have under this key."""
    step = values.get(key)
    return step if isinstance(step, int) else otherwise


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
