"""The loss on text that a run does not train on, and at its end what compressors make of the same text beside it."""

from __future__ import annotations

import math

from titanlite.data.loader import UNREADABLE, validation_batches
from titanlite.data.splits import compression_baselines
from titanlite.errors import DataError
from titanlite.observe.jsonl import validation_row
from titanlite.parallel.model import ParallelModel
from titanlite.plan.layout import BatchPlan
from titanlite.training.setup import Run


def validate(run: Run, plan: BatchPlan, model: ParallelModel, last: bool) -> tuple[float | None, DataError | None]:
    """The loss on the first set, or on another where it is not finite; None, on all ranks, if one of them cannot read a
    set, and there the error. A row is written for each set.
    """
    step, logger, sets, losses = run.progress.step, run.logger, run.data.validation, []
    for text in sets:
        failures: list[Exception] = []
        result = model.evaluate(validation_batches(text, run.recipe.validation.sequences, plan, failures))
        if result is None:
            said = f"validation after step {step}: the set {text.name} cannot be read"
            return None, DataError(f"{said}: {failures[0]}") if failures else None
        losses.append(result.loss)
        named = text.name if len(sets) > 1 else None
        logger.write(validation_row(step, result.loss, result.bits_per_byte, named))
        if not (last and run.world.is_first):
            continue
        try:
            baselines = compression_baselines(text)
        except UNREADABLE as error:
            logger.info(f"warning: no compressor was run on the set {text.name}: {error}")
            continue
        if baselines:
            needed = ", ".join(f"{name} {bits:.4f}" for name, bits in baselines.items())
            of = f" ({named})" if named else ""
            logger.event(step, "compressors", f"on the same held-out text{of}, in bits per byte: {needed}")
    return next((loss for loss in losses if not math.isfinite(loss)), losses[0]), None
