"""The batches of a run on one rank: read ahead by the sample schedule, and written down as they are used."""

from __future__ import annotations

import time
from collections.abc import Iterator

from titanlite.corpus.verification import Verification
from titanlite.data.loader import ReadAhead, train_loader
from titanlite.data.read_log import SKIPPED, ReadLog
from titanlite.data.splits import DataSplits
from titanlite.errors import DataError, WorkerKilled
from titanlite.observe.logger import RunLogger
from titanlite.parallel.batch import Batch
from titanlite.parallel.world import World
from titanlite.plan.layout import BatchPlan, sample_schedule, total_steps
from titanlite.recipe.sections import Recipe
from titanlite.training.progress import RunProgress


class Feed:
    """Batches from where the run is (`progress`) to its end."""

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        data: DataSplits,
        plan: BatchPlan,
        progress: RunProgress,
        logger: RunLogger,
        read_log: ReadLog,
        verification: Verification | None,
    ) -> None:
        self.data = data
        self.plan = plan
        self.read_log = read_log
        self._recipe = recipe
        self._world = world
        self._progress = progress
        self._logger = logger
        self._verification = verification
        self.restart()

    def restart(self) -> None:
        """Go on from the step and the sample that the run is at now."""
        self._schedule = sample_schedule(self._recipe, self._progress.step, self._progress.samples)
        self._ahead = self._read_ahead(iter(()))
        self.read_log.begin(self._progress.step)

    def batches(self) -> Iterator[tuple[Batch, float]]:
        """The remaining steps' batches on the device, each with the seconds it was waited for.

        Raises what the loader does where a batch cannot be read and none is left before it (see `failure`).
        """
        section, progress = self._recipe.data, self._progress
        self._ahead = self._read_ahead(
            train_loader(
                self.data.train,
                self.plan,
                progress.samples,
                total_steps(self._recipe.training) - progress.step,
                workers=section.workers,
                prefetch=section.prefetch,
                pin_memory=self._world.device.type == "cuda",
                overfit_one_batch=self._recipe.debug.overfit_one_batch,
                skipped=self._schedule.skipped,
            )
        )
        while True:
            before = time.perf_counter()
            progress.under_way = progress.step + 1, self._schedule.first_sample(progress.step + 1)
            batch = next(self._ahead, None)
            if batch is None:
                return
            moved = batch.to(self._world.device)
            yield moved, time.perf_counter() - before

    def record(self, step: int, own: tuple[int, ...]) -> int:
        """Write down what a step reads (`own`: this rank's samples) and passes over; returns the first sample after."""
        first, read = self._schedule.first_sample(step), self._progress.samples
        if first > read:
            said = f"samples {read} to {first - 1} are passed over, as data.skip_steps says"
            self._logger.event(step, "data_skipped", said, {"samples": [read, first - 1]})
            self.read_log.passed_over(SKIPPED, step, read, first)
        self.read_log.read(step, own)
        return first + self.plan.global_batch

    def samples_of(self, step: int) -> tuple[int, int]:
        """The first and the last sample of a step."""
        return self._schedule.first_sample(step), self._schedule.end_sample(step) - 1

    @property
    def failure(self) -> Exception | None:
        """Why this rank cannot go on with the text that it trains on: what it met reading ahead, or a file's hash."""
        return self._ahead.failure or (self._verification.failure if self._verification else None)

    def explain(self, failure: Exception, saved: str) -> DataError:
        """The error that ends the run for this `failure`; `saved` says what is kept of it."""
        reason = f"{str(failure).removesuffix('.')}.{saved}"
        if failure is self._ahead.failure:
            step = self._progress.step + 1 + len(self._ahead.ready)
            first, last = self.samples_of(step)
            self._progress.under_way = step, first
            kind = WorkerKilled if isinstance(failure, WorkerKilled) else DataError
            return kind(f"step {step}: one of the samples {first} to {last} cannot be read: {reason}")
        return DataError(reason)

    def _read_ahead(self, batches: Iterator[Batch]) -> ReadAhead:
        # An agreement among ranks takes two steps.
        return ReadAhead(batches, 0 if self._world.size == 1 else 2)
