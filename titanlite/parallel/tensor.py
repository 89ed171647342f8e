"""Tensor, sequence and loss parallelism, from a model's sharding plan, on plain tensors.

Each rank of the tp group keeps its slice of the matrices and, between them, its part of the sequence (Shoeybi et al.
2019; Korthikanti et al. 2022, section 4.2.2): weights get smaller, and what modules are given and give back passes
through a collective, which the compiler sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titanlite.models.layers import Embedding, Linear, at_least_float32
from titanlite.models.loss import IGNORED, TokenLoss
from titanlite.models.spec import ShardingRule, Style
from titanlite.parallel import collectives
from titanlite.parallel.collectives import SEQUENCE, gather_sequence, scatter_sequence
from titanlite.parallel.modules import GroupModule, modules_by_rule, replace_module
from titanlite.plan.float8 import Cast
from titanlite.plan.placement import Placement
from titanlite.precision.float8 import quantise


def apply_tensor_parallel(
    model: nn.Module,
    plan: Sequence[ShardingRule],
    placements: Mapping[str, Placement],
    rank: int,
    group: dist.ProcessGroup,
    casts: Mapping[str, Cast],
) -> None:
    """Shard `model`, in place, as the tp rules of `plan` say.

    Parameters in none of them are whole on every rank, and each rank's gradient of one is only a part of its sum.
    The model must be on the meta device or its values of no use. `casts` has the modules whose gathered inputs, or
    gradients of outputs, travel in float8: `plan.float8.plan_gathers`. Raises `TypeError` where a rule names a module
    of another kind than its style is for.
    """
    for rule, name, module in modules_by_rule(model, plan):
        owner = name.rpartition(".")[0] if rule.style in ("gather", "loss") else name
        placement = placements.get(f"{owner}.weight")
        _, first, _ = cut = placement.used_range(rank) if placement is not None else (0, 0, 0)
        if rule.style in ("vocab", "column", "row"):
            weight = module.get_parameter("weight")
            module.weight = nn.Parameter(torch.empty_like(weight.narrow(*cut).contiguous()))
            if isinstance(module, nn.Linear):
                module.out_features, module.in_features = module.weight.shape
        if rule.style not in ("column", "experts", "attention"):
            replace_module(model, name, _replacement(rule.style, name, module, group, first, casts.get(owner)))


def _replacement(
    style: Style, name: str, whole: Any, group: dist.ProcessGroup, first: int, cast: Cast | None
) -> nn.Module:
    """What takes the place of `whole`; `first`: row that this rank's part of the vocabulary begins with.

    It computes what the class named here does, which may not be what classes derived from that do.
    """
    kind = type(whole)
    if style == "vocab" and kind is Embedding:
        return VocabularyEmbedding(whole, group, first)
    if style == "gather" and kind is nn.Identity:
        return GatherSequence(group, cast)
    if style == "row" and kind is Linear:
        return RowLinear(whole, group, cast)
    if style == "loss" and kind is TokenLoss:
        return VocabularyLoss(group, first, whole)
    if style == "split" and not whole.state_dict():  # whose tensors would get other names
        return SplitSequence(whole, group)
    raise TypeError(f"the sharding plan has '{style}' for {name}, and this rule cannot replace a {kind.__name__}")


class GatherSequence(GroupModule):
    """Joins parts of the sequence."""

    def __init__(self, group: dist.ProcessGroup, cast: Cast | None) -> None:
        """`cast`: how they travel, unless as they are."""
        super().__init__(group)
        self.cast = cast

    def forward(self, x: Tensor) -> Tensor:
        """[batch, seq / ranks, dim] of each rank -> [batch, seq, dim] on all."""
        return _Gather.apply(x, self.group, self.cast)


class SplitSequence(GroupModule):
    """Keeps this rank's part of the sequence of what a module returns that has no state, the same on all ranks."""

    def __init__(self, whole: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.whole = whole

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """Arguments of the module, which returns [batch, seq, …] -> [batch, seq / ranks, …]."""
        return self.whole(*arguments, **named).chunk(self.group.size(), dim=SEQUENCE)[self.group.rank()]


class RowLinear(Linear):
    """A linear of some input features: outputs are summed over the ranks, and each keeps its part of the sequence."""

    def __init__(self, whole: Linear, group: dist.ProcessGroup, cast: Cast | None) -> None:
        """`whole`: has this rank's weight already. `cast`: how gradients of outputs travel, unless as they are."""
        with torch.device("meta"):
            super().__init__(whole.in_features, whole.out_features)
        self.weight, self.multiply = whole.weight, whole.multiply
        self.group, self.cast = group, cast

    def forward(self, x: Tensor) -> Tensor:
        """[batch, seq, this rank's inputs] -> [batch, seq / ranks, outputs]."""
        return _Scatter.apply(super().forward(x), self.group, self.cast)


class VocabularyEmbedding(Embedding):
    """Some of a table's rows: what is found is summed over the ranks, and each keeps its part of the sequence."""

    def __init__(self, whole: Embedding, group: dist.ProcessGroup, first: int) -> None:
        """`whole`: has this rank's rows already, from that of token `first` on."""
        rows, dim = whole.weight.shape
        with torch.device("meta"):
            super().__init__(rows, dim, whole.compute_dtype)
        self.weight, self.group, self.first = whole.weight, group, first

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, seq] -> [batch, seq / ranks, dim]."""
        rows = tokens - self.first
        elsewhere = (rows < 0) | (rows >= self.weight.shape[0])
        found = super().forward(rows.masked_fill(elsewhere, 0)).masked_fill(elsewhere.unsqueeze(-1), 0)
        return _Scatter.apply(found, self.group, None)


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
