"""Expert parallelism: each rank of an ep group has some of the experts, is given the tokens of all, and sends each rank
the sum of what its experts make of that rank's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titanlite.models.spec import ModelConfig, ModelSpec
from titanlite.parallel.collectives import all_gather, reduce_scatter
from titanlite.parallel.modules import Wrapper, modules_by_rule, replace_module
from titanlite.plan.placement import Placement


def apply_expert_parallel(
    model: nn.Module,
    spec: ModelSpec,
    config: ModelConfig,
    placements: Mapping[str, Placement],
    rank: int,
    group: dist.ProcessGroup,
) -> None:
    """Keep this rank's experts, in place, in the modules that `experts` rules name; `model` is on the meta device."""
    for rule, name, module in modules_by_rule(model, spec.sharding(config)):
        if rule.style != "experts":
            continue
        first = count = 0
        for key, parameter in module.named_parameters(recurse=False):
            dimension, begin, size = placements[f"{name}.{key}"].used_range(rank)
            first, count = begin // rule.unit, size // rule.unit
            module.register_parameter(key, nn.Parameter(torch.empty_like(parameter.narrow(dimension, begin, size))))
        replace_module(model, name, ExpertParallel(module, group, first, count))


class ExpertParallel(Wrapper):
    """Experts on several ranks."""

    def __init__(self, whole: nn.Module, group: dist.ProcessGroup, first: int, count: int) -> None:
        super().__init__(whole)
        self.group, self.first, self.count = group, first, count

    def forward(self, x: Tensor, shares: Tensor) -> Tensor:
        """x [batch, seq, dim] and shares [batch, seq, experts] of this rank's tokens -> [batch, seq, dim]."""
        x, shares = (_GatherTokens.apply(each.contiguous(), self.group) for each in (x, shares))
        return _SumTokens.apply(self.whole(x, shares.narrow(-1, self.first, self.count)), self.group)

    def extra_repr(self) -> str:
        return f"{type(self.whole).__name__}, experts {self.first} to {self.first + self.count - 1}"


class _GatherTokens(torch.autograd.Function):
    """[batch, …] of each rank -> [ranks x batch, …]; gradients, each rank's a summand, back to where tokens are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grad.contiguous(), ctx.group), None


class _SumTokens(torch.autograd.Function):
    """Summands [ranks x batch, …] -> the sum [batch, …] of this rank's tokens; the opposite of `_GatherTokens`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter(x.contiguous(), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad.contiguous(), ctx.group), None
