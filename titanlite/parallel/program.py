"""One step's gradients: forward and backward over the microbatches, summed over the data ranks.

The loss is a sum of token losses divided by the step's global count of valid tokens, so gradients add up to the
same numbers however the batch is cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titanlite.parallel.shards import Shards
from titanlite.parallel.world import World

if TYPE_CHECKING:
    from titanlite.data.loader import Batch


@dataclass(frozen=True)
class Evaluation:
    """What the model makes of held-out text."""

    loss: float
    """Mean negative log-likelihood per token, in nats."""
    bits_per_byte: float
    """The same per byte of text, in bits: comparable across tokenizers and with compressors."""


class Sync(Protocol):
    """What a layout does around the microbatches; the default does nothing, as for a model on one rank."""

    def before(self, last: bool) -> None:
        """Called before each microbatch; `last`: whether it is the step's last."""

    def after_evaluation(self) -> None:
        """Called after forward passes without gradients."""


class NoSync:
    """A model that is whole on its rank has nothing to communicate between microbatches."""

    def before(self, last: bool) -> None:
        pass

    def after_evaluation(self) -> None:
        pass


class Program:
    """The model as it runs on this rank."""

    def __init__(self, model: nn.Module, world: World, shards: Shards | None = None, sync: Sync | None = None) -> None:
        """Without `shards` and `sync`: a model that is whole on its only rank."""
        self.model = model
        self.world = world
        self.shards = shards if shards is not None else Shards(model, None)
        self._sync = sync if sync is not None else NoSync()

    def forward_backward(self, batch: Batch) -> Tensor:
        """Leave this step's gradients on the tensors of `shards.local()`; returns the loss of the global batch.

        Nothing is read from the device.
        """
        valid = torch.full((), batch.valid_tokens, dtype=torch.float64, device=self.world.device)
        self._sum_over_ranks(valid)
        losses = []
        microbatches = batch.tokens.shape[0]
        for index in range(microbatches):
            self._sync.before(last=index == microbatches - 1)
            loss = self._token_losses(batch, index)
            loss = loss / valid.to(loss.dtype)
            loss.backward()
            losses.append(loss.detach())
        total = torch.stack(losses).sum()
        self._sum_over_ranks(total)
        self.shards.take_gradients()
        return total

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Batch, int]]) -> Evaluation:
        """Loss over held-out batches, each with the bytes that its labels stand for. Reads the device once."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        for batch, label_bytes in batches:
            moved = batch.to(self.world.device)
            for index in range(moved.tokens.shape[0]):
                sums[0] += self._token_losses(moved, index)
            sums[1] += moved.valid_tokens
            sums[2] += label_bytes
        self._sync.after_evaluation()
        self._sum_over_ranks(sums)
        total, tokens, label_bytes = sums.tolist()
        return Evaluation(loss=total / tokens, bits_per_byte=total / math.log(2) / label_bytes)

    def _token_losses(self, batch: Batch, index: int) -> Tensor:
        positions = None if batch.positions is None else batch.positions[index]
        documents = None if batch.documents is None else batch.documents[index]
        return self.model(batch.tokens[index], batch.labels[index], positions=positions, documents=documents)

    def _sum_over_ranks(self, tensor: Tensor) -> None:
        if self.world.size > 1:
            dist.all_reduce(tensor)
