"""Tensor, sequence and loss parallelism, from a model's sharding plan, on plain tensors.

Each rank of the tp group keeps its slice of the matrices and, between them, its part of the sequence (Shoeybi et al.
2019; Korthikanti et al. 2022, section 4.2.2): weights get smaller, and what modules are given and give back passes
through a collective, which the compiler sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titanlite.models.layers import at_least_float32
from titanlite.models.loss import IGNORED, TokenLoss
from titanlite.models.spec import ShardingRule, Style, is_named_by
from titanlite.parallel import collectives
from titanlite.parallel.collectives import gather_sequence, scatter_sequence
from titanlite.plan.float8 import Cast
from titanlite.plan.placement import SHARD_DIMENSION, GroupRank, find_placements
from titanlite.precision.float8 import quantise


def apply_tensor_parallel(
    model: nn.Module, plan: Sequence[ShardingRule], group: dist.ProcessGroup, casts: Mapping[str, Cast]
) -> None:
    """Shard `model`, in place, as the tp rules of `plan` say.

    Parameters in none of them are whole on every rank, and each rank's gradient of one is only a part of its sum.
    The model must be on the meta device or its values of no use. `casts` has the modules whose gathered inputs, or
    gradients of outputs, travel in float8: `plan.float8.plan_gathers`.
    """
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}
    group_rank = GroupRank(group.rank(), group.size())
    cuts = {name: (cut.dimension, *cut.local_range(group_rank)) for name, cut in find_placements(shapes, plan).items()}
    for rule, name, module in modules_by_rule(model, plan):
        if rule.style == "loss":
            assert isinstance(module, TokenLoss)
            first = cuts[f"{name.rpartition('.')[0]}.weight"][1]
            replace_module(model, name, VocabularyLoss(group, first, module))
            continue
        dimension, first, size = cuts.get(f"{name}.weight", (0, 0, 0))
        if rule.style in SHARD_DIMENSION:
            weight = module.get_parameter("weight")
            module.weight = nn.Parameter(torch.empty_like(weight.narrow(dimension, 0, size).contiguous()))
        if rule.style in ("gather", "row", "vocab"):
            module.forward = _forward(rule.style, module, group, first, casts.get(name))


def modules_by_rule(model: nn.Module, plan: Sequence[ShardingRule]) -> Iterator[tuple[ShardingRule, str, nn.Module]]:
    """Each rule of the plan with each submodule that it names, in the plan's order."""
    modules = list(model.named_modules())
    for rule in plan:
        yield from ((rule, name, module) for name, module in modules if is_named_by((rule.pattern,), name))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule of this name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _forward(
    style: Style, module: nn.Module, group: dist.ProcessGroup, first: int, cast: Cast | None
) -> Callable[..., Any]:
    """`module.forward` with the collectives that its style needs."""
    forward = module.forward
    if style == "gather":
        return lambda x, *arguments, **named: forward(_Gather.apply(x, group, cast), *arguments, **named)
    if style == "row":
        return lambda x: _Scatter.apply(forward(x), group, cast)
    rows_here = module.get_parameter("weight").shape[0]

    def look_up(tokens: Tensor) -> Tensor:
        rows = tokens - first
        elsewhere = (rows < 0) | (rows >= rows_here)
        found = forward(rows.masked_fill(elsewhere, 0)).masked_fill(elsewhere.unsqueeze(-1), 0)
        return _Scatter.apply(found, group, cast)

    return look_up


class _Gather(torch.autograd.Function):
    """Parts of the sequence to all of it; gradients, each rank's a summand, back to the part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, cast: Cast | None) -> Tensor:
        ctx.group = group
        return _gather(x, group, cast)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return scatter_sequence(grad, ctx.group), None, None


class _Scatter(torch.autograd.Function):
    """Summands over all of the sequence to this rank's part of the sum; the opposite of `_Gather`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, cast: Cast | None) -> Tensor:
        ctx.group, ctx.cast = group, cast
        return scatter_sequence(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad, ctx.group, ctx.cast), None, None


def _gather(x: Tensor, group: dist.ProcessGroup, cast: Cast | None) -> Tensor:
    """[batch, seq / ranks, dim] of each rank -> [batch, seq, dim] on all, in x's dtype.

    With a `cast`, values and scales, a scale a token, travel as one message: see `fsdp.Float8Gather`.
    """
    if cast is None:
        return gather_sequence(x, group)
    batch, length, width = x.shape
    message = collectives.pack(quantise(x.flatten(0, 1), cast))
    messages = collectives.all_gather(message, group).unflatten(0, (group.size(), -1))
    rounded, scales = (
        # Put in order while they are bytes.
        part.unflatten(1, (batch, length)).transpose(0, 1).flatten(1, 2)
        for part in collectives.unpack(messages, collectives.rows_in_float8(batch * length, width, cast))
    )
    return rounded.to(x.dtype) * scales.to(x.dtype)


class VocabularyLoss(TokenLoss):
    """The summed token losses where each rank has the logits of a part of the vocabulary (Shoeybi et al., section 3).

    Per token, three numbers travel; logits never do. The result is the same on every rank.
    """

    def __init__(self, group: dist.ProcessGroup, first: int, whole: TokenLoss) -> None:
        """`first`: token that this rank's part begins with. `whole`: the loss that this one takes the place of."""
        super().__init__(whole.implementation, whole.recompute)
        self.group, self.first = group, first

    def of_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits [batch, seq, this rank's part], labels [batch, seq] -> scalar."""
        wide = at_least_float32(logits).flatten(0, -2)
        return _VocabularyLoss.apply(wide, labels.flatten(), self.first, self.group)

    def part(self) -> dict[str, Any]:
        """See `TokenLoss`. Each rank's gradient of the hidden states is a summand; `_Gather`'s backward adds them."""
        return {"group": self.group, "first": self.first}


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first: int, group: dist.ProcessGroup) -> Tensor:
        columns = labels - first
        here = (columns >= 0) & (columns < logits.shape[1])
        columns = columns.clamp(0, logits.shape[1] - 1).unsqueeze(1)
        shifted = logits - collectives.all_reduce(logits.amax(1), "max", group).unsqueeze(1)
        target = shifted.gather(1, columns).squeeze(1).masked_fill(~here, 0)
        exponentials = shifted.exp()
        total, target = collectives.all_reduce(torch.stack((exponentials.sum(1), target)), "sum", group).unbind()
        counted = labels != IGNORED
        ctx.save_for_backward(exponentials / total.unsqueeze(1), columns, here, counted)
        return (total.log() - target).masked_fill(~counted, 0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, columns, here, counted = ctx.saved_tensors
        grads = probabilities.scatter_add(1, columns, -here.to(probabilities.dtype).unsqueeze(1))
        return grads * (grad * counted).unsqueeze(1), None, None, None
