"""The run: everything is built once, then one loop takes it from step to step.

A step in six files: here, `data/loader.py`, `learner.py`, `parallel/program.py`, `models/llama.py`,
`models/layers.py`. Nothing calls back into the trainer; each room is handed values and returns values.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from titanlite.checkpoint.manager import CheckpointManager
from titanlite.checkpoint.requests import SAVE_NOW, SaveRequests
from titanlite.data.loader import Batch, train_loader, validation_batches
from titanlite.data.splits import DataSplits, compression_baselines
from titanlite.errors import DataError, StoppedEarly
from titanlite.learner import Learner
from titanlite.models.shard import Shard
from titanlite.observe.flops import peak_flops
from titanlite.observe.inspection import NonfiniteFinder, traced_shapes
from titanlite.observe.journal import Journal
from titanlite.observe.metrics import Metrics
from titanlite.observe.rows import validation_row
from titanlite.optim.schedules import lr_factor
from titanlite.parallel.layout import agreed_layout, batch_plan, total_steps
from titanlite.parallel.world import World
from titanlite.recipe.sections import Recipe
from titanlite.resilience.signals import StopRequests

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
        journal: Journal,
    ) -> None:
        """Build model, optimizer and guards on the device, with the values of the latest checkpoint if there is one."""
        self.recipe = recipe
        self.recipe_text = recipe_text
        self.world = world
        self.data = data
        self.checkpoints = checkpoints
        self.journal = journal
        self.total_steps = total_steps(recipe.training)
        layout = agreed_layout(recipe.parallel, world.size)
        self.plan = batch_plan(recipe, layout, layout.place(world.rank).data)

        self.learner = learner = Learner(recipe, world)
        self.program, self.shards, self.guards = learner.program, learner.shards, learner.guards
        manifest = checkpoints.load_latest(self._state())
        self.step = manifest.step if manifest is not None else 0
        """Steps taken so far."""
        self._committed = manifest.step if manifest is not None else None
        self._corpus = data.train.fingerprint
        self._refuse_to_mix(str(manifest.values.get("corpus", self._corpus)) if manifest is not None else self._corpus)
        if manifest is not None:
            self.guards.resumed()
        else:
            learner.initialise()

        self.save_requests = SaveRequests(
            checkpoints.folder.parent / SAVE_NOW, recipe.checkpoint.every_minutes, journal.say, heeded=world.is_first
        )
        self.finder = NonfiniteFinder(self.program.model) if recipe.debug.find_nonfinite else None
        card = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
        self.metrics = Metrics(
            total_steps=self.total_steps,
            log_every=recipe.metrics.log_every,
            devices=world.size,
            device=world.device,
            flops_per_token=learner.spec.flops_per_token(learner.config, recipe.training.sequence_length),
            peak_flops=peak_flops(card),
        )

    def _refuse_to_mix(self, corpus: str) -> None:
        """Refuse what would train on in silence with wrong numbers: ranks that disagree, or another corpus than before.

        `corpus` is the fingerprint in the checkpoint. Raises `DataError`.
        """
        if not self.world.all_equal(int(self._corpus, 16) >> 1):
            raise DataError(
                f"rank {self.world.rank} reads another corpus than others. Every machine must see the same files"
                " (data.corpus; for 'python-stdlib', run the same Python)."
            )
        if corpus != self._corpus:
            raise DataError(
                f"the training text is not what it was when the checkpoint of step {self.step} was written: a file of "
                "data.corpus has changed (for 'python-stdlib': another Python runs). Put it back to go on with this "
                "run, or give the new text a run of its own by another run.name."
            )

    def run(self) -> None:
        """Train to the last step. Raises `StoppedEarly` after saving, `GuardStop`, or `CheckpointError`."""
        started = time.monotonic()
        self.metrics.start(tokens=self._tokens(self.step))
        with StopRequests(self.world.size, speaks=self.world.is_first) as stop_requests, _collecting_garbage_seldom():
            self._stop_if(self._step_limit())
            for batch, wait_seconds in self._batches():
                self._train_step(batch, wait_seconds)
                self._after_step()
                agreement = stop_requests.agreed(self._time_limit(started), self.save_requests.due())
                self._stop_if(self._step_limit() or agreement.stop)
                if agreement.save:
                    with self.metrics.paused():
                        self._save()
            self._save()  # a signal waits for this one too

    def _stop_if(self, reason: str | None) -> None:
        """Save and raise `StoppedEarly` if there is a reason to and the run has more steps to go."""
        if reason and self.step < self.total_steps:
            self._save()
            raise StoppedEarly(f"stopped after step {self.step} of {self.total_steps} ({reason}); state saved")

    def _train_step(self, batch: Batch, wait_seconds: float) -> None:
        """One optimizer step; the host only queues work, unless this step is logged."""
        self.step += 1
        if self.finder is not None:
            self.finder.step = self.step
        factor = lr_factor(self.step, self.recipe.schedule, self.total_steps)
        loss, norm = self.learner.step(self.step, batch, factor)
        row = self.metrics.record(
            step=self.step,
            loss=loss,
            grad_norm=norm,
            lr=self.recipe.optimizer.lr * factor,
            samples=self.step * self.plan.global_batch,
            tokens=self._tokens(self.step),
            data_wait_seconds=wait_seconds,
        )
        if row is not None:
            self.journal.write(row)
            self._review()

    def _after_step(self) -> None:
        if self.step % _COLLECT_EVERY == 0:
            gc.collect(1)
        last = self.step == self.total_steps
        every = self.recipe.validation.every_steps
        if every and (last or self.step % every == 0):
            with self.metrics.paused():
                self._validate(last)
        every = self.recipe.checkpoint.every_steps
        if every and self.step % every == 0 and not last:
            with self.metrics.paused():
                self._save()

    def _validate(self, last: bool) -> None:
        """Loss on held-out text; after the last step with what compressors make of the same text beside it."""
        batches = validation_batches(
            self.data.validation,
            self.recipe.validation.sequences,
            self.plan.microbatch,
            self.plan.data_ranks,
            self.plan.data_rank,
        )
        result = self.program.evaluate(batches)
        self.journal.write(validation_row(self.step, result.loss, result.bits_per_byte))
        if last and self.world.is_first:
            baselines = compression_baselines(self.data.validation)
            needed = ", ".join(f"{name} {bits:.4f}" for name, bits in baselines.items())
            self.journal.event(self.step, "compressors", f"on the same held-out text, in bits per byte: {needed}")

    def _save(self) -> None:
        """Commit a checkpoint of this step; a run whose numbers went bad stops here instead."""
        self._review()
        if self.step != self._committed:
            self._commit()
        self.save_requests.saved()

    def _commit(self) -> None:
        self.journal.sync()  # no row of a committed step may be lost with the machine's power
        self.checkpoints.save(
            step=self.step,
            samples=self.step * self.plan.global_batch,
            tokens=self._tokens(self.step),
            tensors=self._state(),
            values={"corpus": self._corpus},
            recipe_text=self.recipe_text,
        )
        self._committed = self.step
        self.journal.event(self.step, "checkpoint", str(self.checkpoints.path(self.step)))

    def _review(self) -> None:
        said = self.guards.review(self.step)
        if said is not None:
            self.journal.event(self.step, "nonfinite", said)

    def _batches(self) -> Iterator[tuple[Batch, float]]:
        """The remaining steps' batches on the device, each with the seconds it was waited for."""
        section, cuda = self.recipe.data, self.world.device.type == "cuda"
        loader = train_loader(
            self.data.train,
            self.plan,
            self.step,
            self.total_steps,
            workers=section.workers,
            prefetch=section.prefetch,
            pin_memory=cuda,
            overfit_one_batch=self.recipe.debug.overfit_one_batch,
        )
        with ExitStack() as first_step:
            if self.recipe.debug.trace_shapes:
                first_step.enter_context(traced_shapes(self.program.model, self.journal.say))
            while True:
                before = time.perf_counter()
                batch = next(loader, None)
                if batch is None:
                    return
                moved = batch.to(self.world.device)
                yield moved, time.perf_counter() - before
                first_step.close()

    def _step_limit(self) -> str | None:
        limit = self.recipe.run.stop_after_step
        return f"run.stop_after_step = {limit}" if limit is not None and self.step >= limit else None

    def _time_limit(self, started: float) -> str | None:
        limit = self.recipe.run.stop_after_minutes
        over = limit is not None and time.monotonic() - started >= 60 * limit
        return f"run.stop_after_minutes = {limit:g}" if over else None

    def _tokens(self, steps: int) -> int:
        return steps * self.plan.global_batch * self.recipe.training.sequence_length

    def _state(self) -> dict[str, Shard]:
        """This rank's part of everything that a checkpoint holds, by name.

        What is not here is a function of the recipe and the step.
        """
        learner = self.learner
        rooms = {"model": learner.weights, "optimizer": learner.optimizer.state(), "guards": self.guards.state()}
        return {
            f"{room}.{name}": shard
            for room, tensors in rooms.items()
            for name, shard in self.shards.windows(tensors).items()
        }


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
