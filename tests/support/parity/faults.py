"""Training with one of the mistakes that the parity tests are there to find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from support.parity import parity_runs
from support.parity.parity_runs import Curve, Part
from titanlite.models.init import initialise
from titanlite.models.shard import Shard
from titanlite.models.spec import ModelOutput
from titanlite.parallel import context, model, pipeline, shards, tensor
from titanlite.training import train_state as learner

Patch = pytest.MonkeyPatch


def gradients_are_means(patch: Patch) -> None:
    set_factor = FSDPModule.set_gradient_divide_factor
    patch.setattr(FSDPModule, "set_gradient_divide_factor", lambda self, _: set_factor(self, 2.0))


def a_microbatch_is_dropped(patch: Patch) -> None:
    forward = model.GradientAccumulation._forward

    def dropped(self: model.GradientAccumulation, batch: Any, index: int) -> ModelOutput:
        output = forward(self, batch, index)
        return output._replace(result=output.result * (0.0 if index == 1 else 1.0))

    patch.setattr(model.GradientAccumulation, "_forward", dropped)


def a_rank_begins_with_other_rows(patch: Patch) -> None:
    def shifted(table: dict[str, Shard], *rest: Any) -> None:
        moved = {name: (max(shard.offset[0] - 1, 0), *shard.offset[1:]) for name, shard in table.items()}
        initialise({name: replace(shard, offset=moved[name]) for name, shard in table.items()}, *rest)

    patch.setattr(learner, "initialise", shifted)


def each_rank_clips_by_its_own_norm(patch: Patch) -> None:
    own_norm = torch.nn.utils.clip_grad_norm_
    patch.setattr(shards.Shards, "clip_gradients", lambda self, norm: own_norm(self.local().values(), norm))


def parts_of_a_gradient_are_not_summed(patch: Patch) -> None:
    patch.setattr(shards, "_all_reduce_gradients", lambda tensors, group: None)


def a_vocabulary_slice_begins_one_token_late(patch: Patch) -> None:
    begin = tensor.VocabularyLoss.__init__
    patch.setattr(
        tensor.VocabularyLoss,
        "__init__",
        lambda self, group, first, whole: begin(self, group, first + (first > 0), whole),
    )


def every_tensor_parallel_rank_reports_the_loss(patch: Patch) -> None:
    forward_backward = model.ParallelModel.forward_backward

    def reported(self: model.ParallelModel, *arguments: Any) -> torch.Tensor:
        self.reports_loss = True
        return forward_backward(self, *arguments)

    patch.setattr(model.ParallelModel, "forward_backward", reported)


def a_sequence_is_not_balanced_where_it_is_gathered(patch: Patch) -> None:
    patch.setattr(context, "_in_order", lambda dealt, dim: torch.cat(tuple(dealt), dim).flatten(dim, dim + 1))


def a_stage_divides_by_its_own_tokens(patch: Patch) -> None:
    patch.setattr(pipeline, "_share_of_loss", lambda losses, valid: losses / (valid / 2).to(losses.dtype))


def a_stage_leaves_its_auxiliary_losses_out(patch: Patch) -> None:
    patch.setattr(pipeline._WithLosses, "apply", lambda result, *losses: result)


def experts_are_counted_as_often_as_other_weights(patch: Patch) -> None:
    clip = shards.Shards.clip_gradients

    def wrong(self: shards.Shards, clip_norm: float) -> torch.Tensor:
        self._shares = torch.full_like(self._shares, 0.5)
        return clip(self, clip_norm)

    patch.setattr(shards.Shards, "clip_gradients", wrong)


def a_step_updates_buffers_by_its_own_tokens(patch: Patch) -> None:
    patch.setattr(model.ParallelModel, "sum_over_ranks", _only_what_is_no_report(model.ParallelModel.sum_over_ranks))


def _only_what_is_no_report(whole: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def part(self: model.ParallelModel, tensor: torch.Tensor) -> torch.Tensor:
        whole(self, tensor[:1] if tensor.dim() else tensor)
        return tensor

    return part


FAULTS: dict[Callable[[Patch], None], tuple[int, dict[str, dict[str, Any]]]] = {
    gradients_are_means: (4, {"parallel": {"dp_replicate": 2}}),
    a_microbatch_is_dropped: (4, {"parallel": {"dp_replicate": 2}, "training": {"microbatch": 1}}),
    a_rank_begins_with_other_rows: (2, {"parallel": {"zero_stage": 3}}),
    each_rank_clips_by_its_own_norm: (2, {"parallel": {"zero_stage": 1}}),
    parts_of_a_gradient_are_not_summed: (2, {"parallel": {"tp": 2}}),
    a_vocabulary_slice_begins_one_token_late: (2, {"parallel": {"tp": 2}}),
    every_tensor_parallel_rank_reports_the_loss: (2, {"parallel": {"tp": 2}}),
    a_sequence_is_not_balanced_where_it_is_gathered: (2, {"parallel": {"cp": 2}}),
    a_stage_divides_by_its_own_tokens: (2, {"parallel": {"pp": 2}}),
    a_stage_leaves_its_auxiliary_losses_out: (2, {"parallel": {"pp": 2}, "model": {"preset": "mixture"}}),
    experts_are_counted_as_often_as_other_weights: (2, {"parallel": {"ep": 2}, "model": {"preset": "mixture"}}),
    a_step_updates_buffers_by_its_own_tokens: (2, {"model": {"preset": "mixture"}}),
}
"""Each fault with the ranks and the layout that it breaks."""


def train(rank: int, ranks: int, fault: str, recipe_json: str) -> tuple[Curve, list[Part]]:
    """`parity_runs.train` with the fault of this name."""
    with pytest.MonkeyPatch.context() as patch:
        next(made for made in FAULTS if made.__name__ == fault)(patch)
        return parity_runs.train(rank, ranks, recipe_json)
