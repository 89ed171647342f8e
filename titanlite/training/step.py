"""One step, as the trainer, `titanlite verify` and the dry run take it. No data, files or logs here."""

from __future__ import annotations

import torch
from torch import Tensor

from titanlite.parallel.model import Batch, Reports
from titanlite.resilience.corruption import checksums, compare_repeated
from titanlite.training.train_state import TrainState


def take_step(state: TrainState, number: int, batch: Batch, factor: float) -> tuple[Tensor, Tensor, Reports]:
    """Step `number` (from 1) at `factor` times the peak learning rates; the host only queues work.

    Returns the loss of the global batch, the norm of its gradient before clipping, and what the model reports, on the
    device. Only every `resilience.rerun_every` steps the host waits: to compare, and all raise `GuardStop` where bits
    differ.
    """
    model, shards, rerun_every = state.model, state.shards, state.recipe.resilience.rerun_every
    if state.finder is not None:
        state.finder.step = number

    # How many tokens of the whole batch have a label that counts. Of ranks with the same sequences one counts them.
    counted = batch.valid_tokens if model.counts_tokens else 0
    valid = model.sum_over_ranks(torch.full((), counted, dtype=torch.float64, device=model.world.device))

    # Sums of token losses over that count, never means of means: the same gradients however the batch is cut.
    tried = _try(state, batch, valid) if rerun_every > 0 and number % rerun_every == 0 else None
    own = model.forward_backward(batch, valid)
    sums = own.clone()
    sums[0] *= model.reports_loss
    model.sum_over_ranks(sums)
    loss, reports = sums[0], model.split_reports(sums)
    shards.take_gradients()
    if tried is not None:
        names = ["the loss", *(f"the gradient of {name}" for name in state.weights)]
        compare_repeated(number, names, tried, _checksums(state, own), model.world)

    # Whether the step is taken is decided on the device: a tensor, so that the host need not wait for it. With weights
    # that rest in the host's memory the norm is there, and the step does wait.
    norm = shards.clip_gradients(state.recipe.optimizer.clip_norm)
    taken = state.guards.judge(number, loss, norm.to(loss.device)).to(norm.device)
    for peak, rule in state.optimizer.rules:
        rule.step(peak * factor, taken)
    model.update_buffers(reports, taken.to(loss.device))
    shards.drop_gradients()
    return loss, norm, reports


def _try(state: TrainState, batch: Batch, valid: Tensor) -> Tensor:
    """The checksums of a first computation, which leaves no gradients."""
    own = state.model.forward_backward(batch, valid)
    state.shards.take_gradients()
    found = _checksums(state, own)
    state.shards.drop_gradients()
    return found


def _checksums(state: TrainState, own: Tensor) -> Tensor:
    """Of this rank's part of the loss, and of the gradients held here."""
    return checksums([own, *(weight.grad for weight in state.weights.values())])  # type: ignore[list-item]
