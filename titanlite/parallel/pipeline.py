"""Pipeline parallelism: stages of the model, run by torch's schedules.

Only hidden states and their gradients travel between ranks; all ranks of a pipeline have the same batch. Shapes are
known before the first step, so nothing is negotiated and nothing is read from the device.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from titanlite.models.spec import Piece
from titanlite.parallel.model import Batch, Reports, Sync, add_reports, as_output
from titanlite.plan.stages import SPLIT_BACKWARD, rank_of_stage

# Before any error of a step, torch prints its whole timetable, on every rank that this ends.
logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)


def keep_pieces(model: nn.Module, pieces: Sequence[Piece], kept: Sequence[str]) -> nn.Module:
    """Delete what is not `kept` of the `pieces` from `model`'s ModuleDicts, in place; other attributes become None."""
    for name in (name for piece in pieces for name in piece.modules if name not in kept):
        path, _, child = name.rpartition(".")
        parent = model.get_submodule(path)
        if isinstance(parent, nn.ModuleDict):
            del parent[child]
        else:
            setattr(parent, child, None)
    return model


@dataclass(frozen=True)
class PipelineConfig:
    """What all stages of a pipeline agree on."""

    schedule: str
    stages: int
    microbatches: int
    hidden: tuple[int, int, int]  # shape of what stages hand on: [microbatch, positions on this rank, width]
    dtype: torch.dtype  # of the hidden states
    sequence_length: int  # positions that the attention of a stage sees, where the batch does not say which these are
    group: dist.ProcessGroup  # the ranks of this pipeline, by coordinate
    device: torch.device


class Pipeline:
    """The passes of a batch through the stages that this rank holds."""

    def __init__(self, held: Sequence[ScheduledStage], config: PipelineConfig) -> None:
        """`held`: in the order of computation."""
        self._config, self._stages = config, held
        kind = get_schedule_class(config.schedule)
        stages = held[0] if issubclass(kind, PipelineScheduleSingle) else [*held]
        self._schedule = kind(stages, config.microbatches, loss_fn=_share_of_loss, scale_grads=False)

    def train(self, batch: Batch, valid: Tensor) -> tuple[Tensor, Reports]:
        """See `GradientAccumulation`, by the schedule; the loss is zero on ranks that do not end with it."""
        first = [batch.tokens.flatten(0, 1)] if self._stages[0].is_first else []
        last = self._stages[-1].is_last
        losses: list[Tensor] = []
        reports: Reports = {}
        for stage in self._stages:
            stage.valid, stage.reports = valid, reports
        with _unwrap_errors():
            self._schedule.step(
                *first,
                target=valid.expand(self._config.microbatches) if last else None,
                losses=losses,
                return_outputs=False,
                **{
                    name: tensor if name == "documents" else tensor.flatten(0, 1)
                    for name, tensor in self._keywords(batch).items()
                },
            )
        if self._config.schedule in SPLIT_BACKWARD:
            for parameter in (each for stage in self._stages for each in stage.submod.parameters()):
                if parameter.grad is not None and parameter.grad.stride() != parameter.stride():
                    # Gradients of weights alone lie as they were computed; fused optimizers want them as weights lie.
                    parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
        return torch.cat(losses).detach().sum() if last else self._zero(), reports

    def evaluate(self, batch: Batch) -> Tensor:
        """See `train`, forward alone: one microbatch after the other; ranks that have sent theirs on go to the next."""
        total = self._zero()
        keywords = self._keywords(batch)
        for index, tokens in enumerate(batch.tokens):
            result = tokens
            for stage in self._stages:
                if not stage.is_first and stage.source != stage.group_rank:
                    shape = tokens.shape[0], *self._config.hidden[1:]
                    result = torch.empty(shape, dtype=self._config.dtype, device=self._config.device)
                    dist.recv(result, group=stage.group, group_src=stage.source)
                given = {name: tensor[index] for name, tensor in keywords.items()}
                result = stage.forward_maybe_with_nosync(result, **given)
                if not stage.is_last and stage.destination != stage.group_rank:
                    dist.send(result.contiguous(), group=stage.group, group_dst=stage.destination)
            if self._stages[-1].is_last:
                total += result
        return total

    def _keywords(self, batch: Batch) -> dict[str, Tensor]:
        """What stages are given beside their inputs, by microbatch; positions that are those of all are set on them."""
        tensors = {"positions": batch.positions, "documents": batch.documents, "labels": batch.labels}
        if batch.positions is not None and batch.positions.dim() == 1:
            for stage in self._stages:
                stage.positions = batch.positions
            del tensors["positions"]
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def _zero(self) -> Tensor:
        wide = torch.promote_types(self._config.dtype, torch.float32)
        return torch.zeros((), dtype=wide, device=self._config.device)


@contextmanager
def _unwrap_errors() -> Iterator[None]:
    """Torch's stages put a `RuntimeError` of their own around every other: raise what was inside, as it was."""
    try:
        yield
    except RuntimeError as error:
        inner: BaseException = error
        while inner.__cause__ is not None:
            *_, (frame, _) = traceback.walk_tb(inner.__traceback__)  # that of the line which raised it
            if not str(frame.f_globals.get("__name__")).startswith("torch.distributed.pipelining"):
                break
            inner = inner.__cause__
        if inner is error:
            raise
        raise inner from inner.__cause__  # never from `error`, whose cause it is


def _share_of_loss(token_losses: Tensor, valid: Tensor) -> Tensor:
    """The last stage's sum of token losses over the step's valid tokens [1] -> [1]."""
    return token_losses / valid.to(token_losses.dtype)


class _WithLosses(torch.autograd.Function):
    """A stage's result; backward also begins at losses that are not in it."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *losses: Tensor) -> Tensor:
        ctx.like = losses
        return result.clone()  # schedules that split the backward pass detach results in place: no view can be

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *map(torch.ones_like, ctx.like)


class ScheduledStage(PipelineStage):
    """One stage as torch's schedules drive it.

    Where these compute whole backward passes, FSDP works in a stage as it does in a plain loop, and they must not see
    that the module is FSDP's: they would gather all of it at once, in stage 3 too, and reduce gradients once a step in
    any stage. That is what those do that compute the gradients of weights apart, which bypasses FSDP's hooks.
    """

    def __init__(self, index: int, module: nn.Module, sync: Sync, config: PipelineConfig) -> None:
        last, wide = config.stages - 1, torch.promote_types(config.dtype, torch.float32)
        with torch.device("meta"):
            hidden = torch.empty(config.hidden, dtype=config.dtype, requires_grad=True)
            tokens = torch.empty(config.hidden[0], config.sequence_length, dtype=torch.int64)
            loss = torch.empty((), dtype=wide, requires_grad=True)
        self._splits = config.schedule in SPLIT_BACKWARD
        super().__init__(
            module if self._splits else nn.ModuleList([module]), index, config.stages, config.device,
            input_args=tokens if index == 0 else hidden, output_args=loss if index == last else hidden,
            group=config.group,
        )  # fmt: skip
        self._sync, self._module = sync, module
        self.valid: Tensor | None = None  # the step's count of tokens, which losses are divided by
        self.reports: Reports = {}  # the sums of what forward passes report
        self.positions = torch.arange(config.sequence_length, device=config.device)  # where a batch has none by token
        self.source = rank_of_stage(config.schedule, index - 1, self.group_size) if index > 0 else None
        self.destination = rank_of_stage(config.schedule, index + 1, self.group_size) if index < last else None

    def forward_maybe_with_nosync(self, *inputs: Tensor, **keywords: Tensor) -> Any:
        """The module's result. Positions are given to every stage: hidden states may be a part of the sequence.

        Backward begins at results alone, so auxiliary losses are tied to them.
        """
        if "documents" in keywords:
            keywords["documents"] = keywords["documents"].flatten()  # the schedule leaves the dimension that it cuts
        output = as_output(self._module(*inputs, **{"positions": self.positions, **keywords}))
        if not torch.is_grad_enabled():
            return output.result
        assert self.valid is not None, "passes of a step come after its count of tokens"
        losses = add_reports(self.reports, output, self.valid)
        return _WithLosses.apply(output.result, *losses) if losses else output.result

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """One microbatch backward, after FSDP is set for the step's last of this stage, or not."""
        if not self._splits:
            self._sync(last_backward)
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Gradients of the weights alone; these add up in the reduce dtype, as those of whole passes do."""
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        if isinstance(self.submod, FSDPModule):
            for state in fully_shard.state(self.submod)._state_ctx.all_states:  # type: ignore[attr-defined]
                for group in state._fsdp_param_groups:
                    group.post_backward()

    def _warmup_backward_result(self, received_result: Tensor | None = None) -> Tensor:
        """Ends torch's exchange, before the first step, of whether stages know their shapes. They do, so the answer is
        not read from the device; the exchange itself sets up the communicators.
        """
        super()._warmup_backward_result(received_result)
        return torch.tensor([1], dtype=torch.int32)
