"""The batches of a run on one rank: read ahead by the sample schedule, and noted in the read log as they are used."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat

from titanlite.data.loader import UNREADABLE, train_loader
from titanlite.data.read_log import SKIPPED
from titanlite.errors import DataError, WorkerKilled
from titanlite.parallel.model import Batch
from titanlite.plan.layout import BatchPlan, sample_schedule
from titanlite.training.setup import Run

_MOST_PENDING = 128  # steps that wait in memory for the read log


class Feed:
    """Batches from where the run is (`run.progress`) to its end."""

    def __init__(self, run: Run, plan: BatchPlan) -> None:
        progress, section = run.progress, run.recipe.data
        self._run = run
        self._schedule = sample_schedule(run.recipe, progress.step, progress.samples)
        steps = range(progress.step + 1, run.total_steps + 1)
        self._loader = train_loader(
            run.data.train,
            plan,
            repeat(0, len(steps)) if run.recipe.debug.overfit_one_batch else map(self._schedule.first_sample, steps),
            workers=section.workers,
            prefetch=section.prefetch,
            pin_memory=run.world.device.type == "cuda",
        )
        self._documents = 0  # the most that compiled code has room for so far
        self.waited_seconds = 0.0  # for batches, since this was set to zero
        self._most = 1 if run.world.size == 1 else 3  # to agree that a batch cannot be read takes ranks two steps
        self._ready: deque[Batch] = deque()
        self._unreadable: Exception | None = None  # what reading the batch after these met

    def batches(self) -> Iterator[Batch]:
        """The remaining steps' batches on the device.

        They end before one that cannot be read if this rank may save alone then; else that is raised.
        """
        run, progress, log, most = self._run, self._run.progress, self._run.read_log, 1
        while True:
            before, number = time.perf_counter(), progress.step + 1
            skips = run.recipe.data.skip_steps
            progress.under_way = number, self._schedule.first_sample(number) if skips else progress.samples
            try:
                batch = self._next()
            except Exception as error:
                progress.under_way = number, self._schedule.first_sample(number)
                if not isinstance(error, UNREADABLE):
                    raise
                if run.world.size == 1 and progress.step > 0:
                    return
                raise self.explain(error) from error
            if batch is None:
                return
            if run.recipe.debug.overfit_one_batch:  # the same text, counted as if it were the samples of this step
                batch = replace(batch, first=self._schedule.first_sample(number))
            if batch.first > (read := progress.samples):
                said = f"samples {read} to {batch.first - 1} are passed over, as data.skip_steps says"
                run.logger.event(number, "data_skipped", said, {"samples": [read, batch.first - 1]})
                log.write(SKIPPED, number, read, batch.first - read)
            progress.under_way = number, batch.first
            log.pending.append((number, batch.samples))
            if len(log.pending) >= most:  # the first at once: every start leaves a record
                log.flush()
                most = _MOST_PENDING
            if batch.documents is not None and (size := batch.documents.shape[1]) > self._documents:
                if self._documents and run.recipe.compile.enabled:
                    what = f"a microbatch has more than {self._documents - 1} documents"
                    run.logger.event(number, "recompiled", f"{what}: compiled code is made anew for {size - 1}")
                self._documents = size
            moved = batch.to(run.world.device)
            self.waited_seconds += time.perf_counter() - before
            yield moved

    def _next(self) -> Batch | None:
        """The next batch, or None at the end; reads others before they are asked for."""
        while self._unreadable is None and len(self._ready) < self._most:
            try:
                self._ready.append(next(self._loader))
            except StopIteration:
                break
            except UNREADABLE as error:
                self._unreadable = error
        if self._unreadable and not self._ready:
            raise self._unreadable
        return self._ready.popleft() if self._ready else None

    def samples_of(self, step: int) -> tuple[int, int]:
        """The first sample of a step, and the one after its last."""
        return self._schedule.first_sample(step), self._schedule.end_sample(step)

    @property
    def failure(self) -> Exception | None:
        """Why this rank cannot go on with the text that it trains on: what it met reading ahead, or a file's hash."""
        verification = self._run.verification
        return self._unreadable or (verification.failure if verification else None)

    def explain(self, failure: Exception, saved: str = "") -> DataError:
        """The error that ends the run for this `failure`; `saved` says what is kept of it."""
        reason = f"{str(failure).removesuffix('.')}.{saved}"
        if failure is not self._unreadable:
            return DataError(reason)
        step = self._run.progress.step + 1 + len(self._ready)
        first, end = self.samples_of(step)
        self._run.progress.under_way = step, first
        kind = WorkerKilled if isinstance(failure, WorkerKilled) else DataError
        return kind(f"step {step}: one of the samples {first} to {end - 1} cannot be read: {reason}")
