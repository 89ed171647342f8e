"""Tensor, sequence and loss parallelism, from a model's sharding plan, on plain tensors.

Each rank of the tp group keeps its slice of the matrices and, between them, its part of the sequence (Shoeybi et al.
2019; Korthikanti et al. 2022, section 4.2.2). Modules stay what they are: their weights get smaller, and what they are
given and give back passes through a collective. There is no dispatch on tensor types: eager mode pays for nothing but
the communication, and the compiler sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titanlite.models.layers import at_least_float32
from titanlite.models.loss import IGNORED, TokenLoss
from titanlite.models.spec import ShardingRule, is_named_by
from titanlite.parallel.float8_message import Parts, packed
from titanlite.plan.float8 import Cast
from titanlite.plan.slicing import SHARD_DIMENSION, GroupRank, Placement
from titanlite.precision.float8 import quantise

_SEQUENCE = 1
"""Dimension of activations [batch, seq, …] that is cut between matrices."""


class Sent(NamedTuple):
    """How numbers become float8 to travel."""

    cast: Cast
    fused: bool
    """By a fused kernel."""


def cut_tensors(
    model: nn.Module, plan: Sequence[ShardingRule], group: dist.ProcessGroup, sent: Mapping[str, Sent]
) -> dict[str, Placement]:
    """Cut `model`, in place, as the tp rules of `plan` say; returns how, by parameter name.

    Parameters in none of them are whole on every rank, and each rank's gradient of one is only a part of its sum.
    The model must be on the meta device or its values of no use. `sent` has the modules whose gathered inputs, or
    gradients of outputs, travel in float8: `float8_plan.gathers`.
    """
    slices: dict[str, Placement] = {}
    group_rank = GroupRank(group.rank(), group.size())
    for rule, name, module in ruled(model, plan):
        if rule.style == "loss":
            head = slices[f"{name.rpartition('.')[0]}.weight"]
            assert isinstance(module, TokenLoss)
            replace_module(model, name, VocabularyLoss(group, head.local_range(group_rank)[0], module))
            continue
        dimension = SHARD_DIMENSION.get(rule.style)
        first = 0
        if dimension is not None:
            slices[f"{name}.weight"] = placement = Placement(dimension, module.weight.shape[dimension], rule.unit)  # type: ignore[union-attr, index]
            first = _keep(module, placement, group_rank)
        wrap = _WRAPPERS.get(rule.style)
        if wrap is not None:
            module.forward = wrap(module, group, first, sent.get(name))
    return slices


def ruled(model: nn.Module, plan: Sequence[ShardingRule]) -> Iterator[tuple[ShardingRule, str, nn.Module]]:
    """Each rule of the plan with each submodule that it names, in the plan's order."""
    modules = list(model.named_modules())
    for rule in plan:
        yield from ((rule, name, module) for name, module in modules if is_named_by((rule.pattern,), name))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule of this name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _keep(module: nn.Module, placement: Placement, group: GroupRank) -> int:
    """Give `module` a weight of this rank's share; returns where that begins."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    first, size = placement.local_range(group)
    module.weight = nn.Parameter(torch.empty_like(weight.narrow(placement.dimension, 0, size).contiguous()))
    return first


Forward = Callable[..., Any]


def _gathering(module: nn.Module, group: dist.ProcessGroup, first: int, sent: Sent | None) -> Forward:
    forward = module.forward

    def with_whole_sequence(x: Tensor, *arguments: Any, **named: Any) -> Any:
        return forward(_Gather.apply(x, group, sent), *arguments, **named)

    return with_whole_sequence


def _scattering(module: nn.Module, group: dist.ProcessGroup, first: int, sent: Sent | None) -> Forward:
    forward = module.forward

    def to_part_of_sequence(x: Tensor) -> Tensor:
        return _Scatter.apply(forward(x), group, sent)  # type: ignore[no-any-return]

    return to_part_of_sequence


def _looking_up(module: nn.Module, group: dist.ProcessGroup, first: int, sent: Sent | None) -> Forward:
    forward = module.forward

    def in_own_rows(tokens: Tensor) -> Tensor:
        rows = tokens - first
        elsewhere = (rows < 0) | (rows >= module.weight.shape[0])  # type: ignore[operator, union-attr]
        found = forward(rows.masked_fill(elsewhere, 0)).masked_fill(elsewhere.unsqueeze(-1), 0)
        return _Scatter.apply(found, group, sent)  # type: ignore[no-any-return]

    return in_own_rows


_WRAPPERS = {"gather": _gathering, "row": _scattering, "vocab": _looking_up}


class _Gather(torch.autograd.Function):
    """Parts of the sequence to all of it; gradients, each rank's a summand, back to the part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, sent: Sent | None) -> Tensor:
        ctx.group = group
        return _gather(x, group, sent)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _scatter_sequence(grad, ctx.group), None, None


class _Scatter(torch.autograd.Function):
    """Summands over all of the sequence to this rank's part of the sum; the opposite of `_Gather`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, sent: Sent | None) -> Tensor:
        ctx.group, ctx.sent = group, sent
        return _scatter_sequence(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _gather(grad, ctx.group, ctx.sent), None, None


def _gather(x: Tensor, group: dist.ProcessGroup, sent: Sent | None) -> Tensor:
    """`gather_sequence`, of numbers that travel as they are or in float8."""
    return gather_sequence(x, group) if sent is None else _gather_in_float8(x, group, sent)


def gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[batch, seq / ranks, …] of each rank -> [batch, seq, …] on all."""
    return torch.cat(all_gather(x.contiguous(), group).chunk(group.size()), dim=_SEQUENCE)


def _gather_in_float8(x: Tensor, group: dist.ProcessGroup, sent: Sent) -> Tensor:
    """[batch, seq / ranks, dim] of each rank -> [batch, seq, dim] on all, rounded to float8 with a scale a token.

    Values and scales are one message. What arrives has x's dtype, in which float8 times a power of two is exact: a cast
    to the same format with any such scale then rounds nothing but what is close to nothing.
    """
    batch, length, width = x.shape
    message = packed(quantise(x.flatten(0, 1), sent.cast, sent.fused))
    messages = all_gather(message, group).unflatten(0, (group.size(), -1))
    rounded, scales = (
        # Put in order while they are bytes.
        part.unflatten(1, (batch, length)).transpose(0, 1).flatten(1, 2)
        for part in Parts(messages).next_rows(batch * length, width, sent.cast)
    )
    return rounded.to(x.dtype) * scales.to(x.dtype)


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[rows, …] of each rank -> [ranks x rows, …]."""
    # Functional collectives, waited for at once: the form that the compiler knows how to split and overlap. (The plain
    # call has another name from one version of torch to the next.)
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(x, group.size(), group.group_name)
    return torch.ops._c10d_functional.wait_tensor(gathered)  # type: ignore[no-any-return]


def _scatter_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[batch, seq, …] of each rank -> the sum over ranks of this rank's part, [batch, seq / ranks, …]."""
    ranks = group.size()
    stacked = torch.cat(x.chunk(ranks, dim=_SEQUENCE))
    summed = torch.ops._c10d_functional.reduce_scatter_tensor(stacked, "sum", ranks, group.group_name)
    return torch.ops._c10d_functional.wait_tensor(summed)  # type: ignore[no-any-return]


class VocabularyLoss(TokenLoss):
    """The summed token losses where each rank has the logits of a part of the vocabulary (Shoeybi et al., section 3).

    Per token, three numbers travel; logits never do. The result is the same on every rank.
    """

    def __init__(self, group: dist.ProcessGroup, first: int, whole: TokenLoss) -> None:
        """`first`: token that this rank's part begins with. `whole`: the loss that this one takes the place of."""
        super().__init__(whole.way, whole.recompute)
        self.group = group
        self.first = first

    def of_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits [batch, seq, this rank's part], labels [batch, seq] -> scalar."""
        wide = at_least_float32(logits).flatten(0, -2)
        return _VocabularyLoss.apply(wide, labels.flatten(), self.first, self.group)  # type: ignore[no-any-return]

    def part(self) -> dict[str, Any]:
        """See `TokenLoss`. Each rank's gradient of the hidden states is a summand; `_Gather`'s backward adds them."""
        return {"group": self.group, "first": self.first}


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first: int, group: dist.ProcessGroup) -> Tensor:
        columns = labels - first
        here = (columns >= 0) & (columns < logits.shape[1])
        columns = columns.clamp(0, logits.shape[1] - 1).unsqueeze(1)
        shifted = logits - _all_reduce(logits.amax(1), "max", group).unsqueeze(1)
        target = shifted.gather(1, columns).squeeze(1).masked_fill(~here, 0)
        exponentials = shifted.exp()
        total, target = _all_reduce(torch.stack((exponentials.sum(1), target)), "sum", group).unbind()
        counted = labels != IGNORED
        ctx.save_for_backward(exponentials / total.unsqueeze(1), columns, here, counted)
        return (total.log() - target).masked_fill(~counted, 0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        probabilities, columns, here, counted = ctx.saved_tensors
        grads = probabilities.scatter_add(1, columns, -here.to(probabilities.dtype).unsqueeze(1))
        return grads * (grad * counted).unsqueeze(1), None, None, None


def _all_reduce(x: Tensor, how: str, group: dist.ProcessGroup) -> Tensor:
    reduced = torch.ops._c10d_functional.all_reduce(x, how, group.group_name)
    return torch.ops._c10d_functional.wait_tensor(reduced)  # type: ignore[no-any-return]
