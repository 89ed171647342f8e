"""One step's gradients: forward and backward over the microbatches, summed over the ranks.

The loss is a sum of token losses divided by the step's global count of valid tokens, so gradients add up to the
same numbers however the batch is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from titanlite.parallel.shards import Shards
from titanlite.parallel.world import World
from titanlite.plan.layout import ORIGIN, Coordinates

if TYPE_CHECKING:
    from titanlite.parallel.batch import Batch


@dataclass(frozen=True)
class Evaluation:
    """What the model makes of held-out text."""

    loss: float
    """Mean negative log-likelihood per token, in nats."""
    bits_per_byte: float
    """The same per byte of text, in bits: comparable across tokenizers and with compressors."""


class ForwardBackward(Protocol):
    """Takes a batch through the model: microbatch after microbatch, or by a pipeline's schedule."""

    def train(self, batch: Batch, valid: Tensor) -> Tensor:
        """Forward and backward over all microbatches, each loss divided by `valid`; the sum of these losses.

        Zero on ranks that do not end with the loss.
        """

    def evaluate(self, batch: Batch) -> Tensor:
        """Forward alone; the sum of the token losses, zero on ranks that do not end with it."""

    def after_evaluation(self) -> None:
        """Called once the last batch was evaluated."""


class Sync:
    """What a layout communicates around microbatches: nothing, for a model that is whole on its rank."""

    def before(self, last: bool) -> None:
        """Called before each microbatch; `last`: whether it is the step's last."""

    def after_evaluation(self) -> None:
        """Called after forward passes without gradients."""


class GradientAccumulation:
    """One microbatch after the other through a module that holds all layers."""

    def __init__(self, module: nn.Module, sync: Sync) -> None:
        self._module = module
        self._sync = sync

    def train(self, batch: Batch, valid: Tensor) -> Tensor:
        losses = []
        microbatches = batch.tokens.shape[0]
        for index in range(microbatches):
            self._sync.before(last=index == microbatches - 1)
            loss = self._token_losses(batch, index)
            loss = loss / valid.to(loss.dtype)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def evaluate(self, batch: Batch) -> Tensor:
        losses = [self._token_losses(batch, index) for index in range(batch.tokens.shape[0])]
        return torch.stack(losses).sum()

    def after_evaluation(self) -> None:
        self._sync.after_evaluation()

    def _token_losses(self, batch: Batch, index: int) -> Tensor:
        positions = None if batch.positions is None else batch.positions[index]
        documents = None if batch.documents is None else batch.documents[index]
        loss: Tensor = self._module(batch.tokens[index], batch.labels[index], positions=positions, documents=documents)
        return loss


class ParallelModel:
    """The model as it runs on this rank."""

    def __init__(
        self,
        module: nn.Module,
        world: World,
        shards: Shards,
        passes: ForwardBackward,
        coordinates: Coordinates = ORIGIN,
        localize: Callable[[Batch], Batch] | None = None,
        refresh: Callable[[], None] = lambda: None,
    ) -> None:
        """`module`: what of the model is on this rank. `localize`: to this rank's part of each sequence.

        `refresh` is called before the first pass with weights that may be new.
        """
        self.module = module
        self.world = world
        self.shards = shards
        self._passes = passes
        self._coordinates = coordinates
        self._localize = localize or (lambda batch: batch)
        self._refresh = refresh

    def forward_backward(self, batch: Batch) -> Tensor:
        """Leave this step's gradients on the tensors of `shards.local()`; returns the loss of the global batch.

        Nothing is read from the device.
        """
        return self.sum(self.compute(batch))

    def compute(self, batch: Batch) -> Tensor:
        """The first half of `forward_backward`: the loss of this rank's part; gradients are where backward put them."""
        valid = torch.full(
            (), batch.valid_tokens * self._coordinates.is_batch_leader, dtype=torch.float64, device=self.world.device
        )
        self.world.reduce(valid, "sum")
        self._refresh()
        return self._passes.train(self._localize(batch), valid)

    def sum(self, own: Tensor) -> Tensor:
        """The second half: adds up what each rank still has a part of; returns the loss of the global batch."""
        total = own * self.reports_loss
        self.world.reduce(total, "sum")
        self.shards.take_gradients()
        return total

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Batch, float]]) -> Evaluation | None:
        """Loss over held-out batches, each with the bytes that its labels stand for. Reads the device once.

        None, on every rank, if these are NaN for a batch of any: it could not be read.
        """
        sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        self._refresh()
        for batch, label_bytes in batches:
            sums[0] += self._passes.evaluate(self._localize(batch.to(self.world.device))) * self.reports_loss
            sums[1] += batch.valid_tokens * self._coordinates.is_batch_leader
            sums[2] += label_bytes * self._coordinates.is_batch_leader
        self._passes.after_evaluation()
        self.world.reduce(sums, "sum")
        total, tokens, label_bytes = sums.tolist()
        if math.isnan(label_bytes):
            return None
        bits_per_byte = total / math.log(2) / label_bytes if label_bytes else math.nan
        return Evaluation(total / tokens if tokens else math.nan, bits_per_byte)

    @property
    def reports_loss(self) -> bool:
        """Of the ranks of a tp group, which all have the same loss, one reports it."""
        return self._coordinates.tp == 0
