"""The model as a rank runs it: a batch's microbatches pass through, one by one or by a pipeline's schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titanlite.models.spec import ModelOutput, saved_buffers
from titanlite.parallel.shards import Shards
from titanlite.parallel.world import World

if TYPE_CHECKING:
    from titanlite.parallel.pipeline import Pipeline


@dataclass(frozen=True)
class Batch:
    """One step's (or one validation pass's) sequences of one data rank; tensors are int64, but for `documents`."""

    tokens: Tensor  # inputs, `[microbatches, microbatch, seq_len]`; padding is the separator
    labels: Tensor  # the token after each input, same shape; padding is `IGNORED`
    positions: Tensor | None
    """Of each input in its document, same shape; or `[seq_len]`, those of every sequence; None: 0, 1, 2 …"""
    documents: Tensor | None
    """Where documents begin in each microbatch's tokens, int32 `[microbatches, size]`: `packing.document_offsets`. None
    without `data.document_mask`, where each sequence is one."""
    samples: tuple[int, ...]  # numbers of this rank's, in the order of the sequences; padding follows and has none
    first: int  # number of all data ranks' first: `sequences` are taken from there on
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


Reports = dict[str, Tensor]
"""Auxiliary losses, over the step's count of tokens, and statistics, by name: sums over what was passed so far."""


def as_output(given: Tensor | ModelOutput) -> ModelOutput:
    """What a forward returned, a loss alone or more."""
    return given if isinstance(given, ModelOutput) else ModelOutput(given, {}, {})


def add_reports(reports: Reports, output: ModelOutput, valid: Tensor) -> list[Tensor]:
    """Add what a forward reports; returns its auxiliary losses over `valid`, the step's count of tokens."""
    losses = {name: loss / valid.to(loss.dtype) for name, loss in output.losses.items()}
    for name, found in (*losses.items(), *output.statistics.items()):
        reports[name] = reports[name] + found.detach() if name in reports else found.detach()
    return list(losses.values())


Sync = Callable[[bool], None]
"""Sets what the backward passes from now on communicate; called before each with whether it is the step's last."""


def no_sync(last: bool) -> None:
    """The `Sync` of a model that is whole on its rank."""


@dataclass
class GradientAccumulation:
    """Takes batches through a module that holds all layers, microbatch after microbatch."""

    module: nn.Module
    sync: Sync

    def train(self, batch: Batch, valid: Tensor) -> tuple[Tensor, Reports]:
        """Forward and backward over all microbatches, each loss divided by `valid`; the sums of losses and reports."""
        losses, reports = [], Reports()
        microbatches = batch.tokens.shape[0]
        for index in range(microbatches):
            self.sync(index == microbatches - 1)
            output = self._forward(batch, index)
            loss = output.result / valid.to(output.result.dtype)
            torch.autograd.backward([loss, *add_reports(reports, output, valid)])
            losses.append(loss.detach())
        return torch.stack(losses).sum(), reports

    def evaluate(self, batch: Batch) -> Tensor:
        """Forward alone; the sum of the token losses."""
        losses = [self._forward(batch, index).result for index in range(batch.tokens.shape[0])]
        return torch.stack(losses).sum()

    def _forward(self, batch: Batch, index: int) -> ModelOutput:
        positions = batch.positions
        if positions is not None and positions.dim() > 1:
            positions = positions[index]
        documents = None if batch.documents is None else batch.documents[index]
        return as_output(
            self.module(batch.tokens[index], batch.labels[index], positions=positions, documents=documents)
        )


@dataclass
class ParallelModel:
    """The model as it runs on this rank."""

    module: nn.Module  # what of the model is on this rank
    world: World
    shards: Shards
    passes: GradientAccumulation | Pipeline
    counts_tokens: bool = True  # of the ranks that have the same sequences, one counts them
    reports_loss: bool = True  # of those of a tp group, which all have the same loss, one reports it
    refresh: Callable[[], None] = lambda: None  # called before the first pass with weights that may be new
    localize: Callable[[Batch], Batch] = lambda batch: batch  # to this rank's part of each sequence
    reports: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # shapes of what forwards report, by name
    updates_buffers: Sequence[tuple[Any, Mapping[str, Tensor]]] = ()
    """Modules with a method `update_buffers`, and their saved buffers."""

    def forward_backward(self, batch: Batch, valid: Tensor) -> Tensor:
        """All microbatches' losses over `valid`, the global batch's count of labels: this rank's part of their sum,
        unread by the host, then those of what `reports` names, end to end. Gradients are where backward put them: see
        `Shards.take_gradients`.
        """
        self.refresh()
        loss, found = self.passes.train(self.localize(batch), valid)
        if not self.reports:
            return loss.reshape(1)
        if unknown := found.keys() - self.reports.keys():
            raise ValueError(
                f"its family's `reports` do not name {', '.join(sorted(unknown))}, which the model reports"
            )
        parts = [found[name] if name in found else loss.new_zeros(shape) for name, shape in self.reports.items()]
        return torch.cat([part.flatten().to(loss.dtype) for part in (loss, *parts)])

    def split_reports(self, sums: Tensor) -> Reports:
        """The reports, by name, of sums as `forward_backward` returns them."""
        parts = sums[1:].split([math.prod(shape) for shape in self.reports.values()])
        return {name: part.view(self.reports[name]) for name, part in zip(self.reports, parts, strict=True)}

    @torch.no_grad()
    def update_buffers(self, reports: Reports, taken: Tensor) -> None:
        """Have modules that can update their saved buffers from a step's reports, where the step is `taken`. Raises
        `ValueError` if one has put another tensor in the place of a buffer: checkpoints would have the old one.
        """
        for module, buffers in self.updates_buffers:
            before = [buffer.clone() for buffer in buffers.values()]
            module.update_buffers(reports)
            if any(buffer is not buffers[name] for name, buffer in saved_buffers(module).items()):
                raise ValueError(f"{type(module).__name__}.update_buffers must change buffers in place")
            for buffer, old in zip(buffers.values(), before, strict=True):
                buffer.copy_(torch.where(taken, buffer, old))

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' tensors, in place of each."""
        if self.world.size > 1:
            dist.all_reduce(tensor)
        return tensor

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Batch, float]]) -> Evaluation | None:
        """Loss over held-out batches, each with the bytes that its labels stand for. Reads the device once.

        None, on every rank, if these are NaN for a batch of any: it could not be read.
        """
        sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        self.refresh()
        for batch, label_bytes in batches:
            sums[0] += self.passes.evaluate(self.localize(batch.to(self.world.device))) * self.reports_loss
            sums[1] += batch.valid_tokens * self.counts_tokens
            sums[2] += label_bytes * self.counts_tokens
        for module in self.module.modules():
            # FSDP's: weights that it has gathered, in stages below 3, would outlive the next update and be stale.
            if hasattr(module, "reshard"):
                module.reshard()  # type: ignore[operator]
        self.sum_over_ranks(sums)
        total, tokens, label_bytes = sums.tolist()
        if math.isnan(label_bytes):
            return None
        bits_per_byte = total / math.log(2) / label_bytes if label_bytes else math.nan
        return Evaluation(total / tokens if tokens else math.nan, bits_per_byte)
