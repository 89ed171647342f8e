"""The loss on text that a run does not train on, and at its end what compressors make of the same text beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from titanlite.data.loader import UNREADABLE, validation_batches
from titanlite.data.sources import Source
from titanlite.data.splits import compression_baselines
from titanlite.errors import DataError
from titanlite.observe.jsonl import validation_row
from titanlite.observe.logger import RunLogger
from titanlite.parallel.model import ParallelModel
from titanlite.plan.layout import BatchPlan


class Validation:
    """The validation sets of one run on one rank."""

    def __init__(
        self, sets: Sequence[Source], sequences: int, plan: BatchPlan, model: ParallelModel, logger: RunLogger
    ) -> None:
        """Of each set, so many sequences are read."""
        self.failure: DataError | None = None
        """Why a set could not be read, on this rank."""
        self._sets = sets
        self._sequences = sequences
        self._plan = plan
        self._model = model
        self._logger = logger

    def loss_after(self, step: int, last: bool) -> float | None:
        """The loss of the model after this step on the first set, or on another where it is not finite; None, on all
        ranks, if one of them cannot read a set. A row is written for each set.
        """
        losses = []
        for text in self._sets:
            failures: list[Exception] = []
            result = self._model.evaluate(validation_batches(text, self._sequences, self._plan, failures))
            if failures:
                said = f"validation after step {step}: the set {text.name} cannot be read: {failures[0]}"
                self.failure = DataError(said)
            if result is None:
                return None
            losses.append(result.loss)
            named = text.name if len(self._sets) > 1 else None
            self._logger.write(validation_row(step, result.loss, result.bits_per_byte, named))
            if last and self._model.world.is_first:
                self._compress(text, step, named)
        return next((loss for loss in losses if not math.isfinite(loss)), losses[0])

    def _compress(self, text: Source, step: int, named: str | None) -> None:
        try:
            baselines = compression_baselines(text)
        except UNREADABLE as error:
            self._logger.info(f"warning: no compressor was run on the set {text.name}: {error}")
            return
        if baselines:
            needed = ", ".join(f"{name} {bits:.4f}" for name, bits in baselines.items())
            of = f" ({named})" if named else ""
            said = f"on the same held-out text{of}, in bits per byte: {needed}"
            self._logger.event(step, "compressors", said)
