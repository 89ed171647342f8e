"""One step's gradients: forward and backward over the microbatches, summed over the ranks.

The loss is a sum of token losses divided by the step's global count of valid tokens, so gradients add up to the
same numbers however the batch is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from titanlite.parallel.shards import Shards
from titanlite.parallel.world import World
from titanlite.plan.layout import ORIGIN, Coordinates

if TYPE_CHECKING:
    from titanlite.parallel.pipeline import Pipeline


@dataclass(frozen=True)
class Batch:
    """One step's (or one validation pass's) sequences of one data rank; tensors are int64."""

    tokens: Tensor  # inputs, `[microbatches, microbatch, seq_len]`; padding is the separator
    labels: Tensor  # the token after each input, same shape; padding is `IGNORED`
    positions: Tensor | None  # of each input within its document, same shape; None without `data.document_mask`
    documents: Tensor | None  # number of each input's within its sequence, same shape; None where positions are
    samples: tuple[int, ...]  # numbers of this rank's, in the order of the sequences; padding follows and has none
    sequences: int  # sequences of all data ranks together, without padding
    valid_tokens: int  # labels of this rank that count

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, from which a copy to a GPU can run beside its work."""
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """The same on `device`; the host does not wait for copies out of page-locked memory."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors: dict[str, Any] = {key: change(x) for key, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True)
class Evaluation:
    """What the model makes of held-out text."""

    loss: float  # mean negative log-likelihood per token, in nats
    bits_per_byte: float  # the same per byte of text, in bits: comparable across tokenizers and with compressors


Sync = Callable[[bool], None]
"""Sets what the backward passes from now on communicate; called before each with whether it is the step's last."""


def no_sync(last: bool) -> None:
    """The `Sync` of a model that is whole on its rank."""


@dataclass
class GradientAccumulation:
    """Takes batches through a module that holds all layers, microbatch after microbatch."""

    module: nn.Module
    sync: Sync

    def train(self, batch: Batch, valid: Tensor) -> Tensor:
        """Forward and backward over all microbatches, each loss divided by `valid`; the sum of these losses."""
        losses = []
        microbatches = batch.tokens.shape[0]
        for index in range(microbatches):
            self.sync(index == microbatches - 1)
            loss = self._token_losses(batch, index)
            loss = loss / valid.to(loss.dtype)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def evaluate(self, batch: Batch) -> Tensor:
        """Forward alone; the sum of the token losses."""
        losses = [self._token_losses(batch, index) for index in range(batch.tokens.shape[0])]
        return torch.stack(losses).sum()

    def _token_losses(self, batch: Batch, index: int) -> Tensor:
        positions = None if batch.positions is None else batch.positions[index]
        documents = None if batch.documents is None else batch.documents[index]
        return self.module(batch.tokens[index], batch.labels[index], positions=positions, documents=documents)


@dataclass
class ParallelModel:
    """The model as it runs on this rank."""

    module: nn.Module  # what of the model is on this rank
    world: World
    shards: Shards
    passes: GradientAccumulation | Pipeline
    coordinates: Coordinates = ORIGIN
    refresh: Callable[[], None] = lambda: None  # called before the first pass with weights that may be new
    localize: Callable[[Batch], Batch] = lambda batch: batch  # to this rank's part of each sequence

    def forward_backward(self, batch: Batch) -> Tensor:
        """Leave gradients on the tensors of `shards.local()`; returns the global batch's loss, unread by the host."""
        return self.sum(self.compute(batch))

    def compute(self, batch: Batch) -> Tensor:
        """The first half of `forward_backward`: the loss of this rank's part; gradients are where backward put them."""
        counted = batch.valid_tokens * self.coordinates.is_batch_leader
        valid = self.world.sum(torch.full((), counted, dtype=torch.float64, device=self.world.device))
        self.refresh()
        return self.passes.train(self.localize(batch), valid)

    def sum(self, own: Tensor) -> Tensor:
        """The second half: adds up what each rank still has a part of; returns the loss of the global batch."""
        total = self.world.sum(own * self.reports_loss)
        self.shards.take_gradients()
        return total

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Batch, float]]) -> Evaluation | None:
        """Loss over held-out batches, each with the bytes that its labels stand for. Reads the device once.

        None, on every rank, if these are NaN for a batch of any: it could not be read.
        """
        sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        self.refresh()
        for batch, label_bytes in batches:
            sums[0] += self.passes.evaluate(self.localize(batch.to(self.world.device))) * self.reports_loss
            sums[1] += batch.valid_tokens * self.coordinates.is_batch_leader
            sums[2] += label_bytes * self.coordinates.is_batch_leader
        for module in self.module.modules():
            # FSDP's: weights that it has gathered, in stages below 3, would outlive the next update and be stale.
            if hasattr(module, "reshard"):
                module.reshard()  # type: ignore[operator]
        self.world.sum(sums)
        total, tokens, label_bytes = sums.tolist()
        if math.isnan(label_bytes):
            return None
        bits_per_byte = total / math.log(2) / label_bytes if label_bytes else math.nan
        return Evaluation(total / tokens if tokens else math.nan, bits_per_byte)

    @property
    def reports_loss(self) -> bool:
        """Of the ranks of a tp group, which all have the same loss, one reports it."""
        return self.coordinates.tp == 0
