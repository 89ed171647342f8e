"""Context parallelism: each rank of the cp group has a part of every sequence, and attention alone looks beyond it.

A sequence is cut into 2 x ranks chunks, and rank r takes the r-th from the front and the r-th from the back: under a
causal mask, every rank then has the same work (Llama 3 paper, section 3.3.2). Keys and values are gathered here;
`ring.py` passes them round instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titanlite.models.layers import causal_attention
from titanlite.models.spec import ShardingRule
from titanlite.parallel.collectives import SEQUENCE, all_gather, gather_sequence, reduce_scatter
from titanlite.parallel.ring import GroupModule, RingAttention, RingDocuments, takes_flash
from titanlite.parallel.tensor import modules_by_rule, replace_module

if TYPE_CHECKING:
    from titanlite.parallel.batch import Batch


def chunks_of(ranks: int, rank: int) -> tuple[int, int]:
    """Which two of a sequence's 2 x ranks chunks a rank has, in this order."""
    return rank, 2 * ranks - 1 - rank


def local_sequences(batch: Batch, ranks: int, rank: int) -> Batch:
    """The batch with a cp rank's part of the sequences' tokens, labels, positions and documents: its chunk from the
    front, then that from the back. Positions are those in whole sequences if it had none, and so are counts.
    """

    def part(whole: Tensor) -> Tensor:
        chunks = whole.chunk(2 * ranks, dim=-1)
        return torch.cat([chunks[index] for index in chunks_of(ranks, rank)], dim=-1)

    tokens = part(batch.tokens)
    if batch.positions is not None:
        positions = part(batch.positions)
    else:
        # In the shape of the tokens because a pipeline cuts all its inputs alike; in memory it is one row.
        positions = part(torch.arange(batch.tokens.shape[-1], device=tokens.device)).expand_as(tokens)
    documents = None if batch.documents is None else part(batch.documents)
    return replace(batch, tokens=tokens, labels=part(batch.labels), positions=positions, documents=documents)


def apply_context_parallel(
    model: nn.Module, plan: Sequence[ShardingRule], group: dist.ProcessGroup, method: Literal["all-gather", "ring"]
) -> None:
    """Replace, in place, what the cp rules of `plan` name for what sees all ranks' parts of the sequence.

    Rank r of the group has the r-th of `local_sequences`. Parameters stay what they are.
    """
    attention, mask = (RingAttention, RingDocuments) if method == "ring" else (GatheredAttention, GatheredMask)
    for rule, name, _ in modules_by_rule(model, plan):
        if rule.style in ("attention", "mask"):
            replace_module(model, name, (attention if rule.style == "attention" else mask)(group))


class GatheredMask(GroupModule):
    """Keeps attention within documents, for this rank's queries and all ranks' keys."""

    def forward(self, documents: Tensor) -> Tensor:
        """[batch, seq here] document numbers -> [batch, 1, seq here, seq] bool: may this query see that key?"""
        ranks = self.group.size()
        dealt = gather_sequence(documents, self.group).unflatten(1, (ranks, 2, -1))
        every = _in_order(dealt.movedim(2, 0), dim=1)
        chunk = documents.shape[1] // 2
        positions = torch.arange(every.shape[1], device=documents.device)
        own = torch.cat([positions.narrow(0, index * chunk, chunk) for index in chunks_of(ranks, self.group.rank())])
        same = documents.unsqueeze(-1) == every.unsqueeze(-2)
        return (same & (positions <= own.unsqueeze(-1))).unsqueeze(1)


class GatheredAttention(GroupModule):
    """Causal attention of this rank's queries to all ranks' keys and values, which are gathered first."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """As in `causal_attention`, with this rank's part of each sequence; mask: as `GatheredMask` builds it."""
        chunk = q.shape[SEQUENCE] // 2
        if mask is not None:
            k, v = _GatherKeys.apply(k, v, self.group, (2 * self.group.size(),))
            return causal_attention(q, k, v, mask, False)
        assert causal, "a model that sees what follows needs no balance, and has none here"
        seen = tuple(index + 1 for index in chunks_of(self.group.size(), self.group.rank()))
        front_k, front_v, back_k, back_v = _GatherKeys.apply(k, v, self.group, seen)
        front = _attend_to_the_last(q[:, :chunk], front_k, front_v)
        return torch.cat((front, _attend_to_the_last(q[:, chunk:], back_k, back_v)), dim=SEQUENCE)


def _attend_to_the_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention where the last query's place is that of the last key; shapes as in `causal_attention`."""
    queries, keys = q.shape[SEQUENCE], k.shape[SEQUENCE]
    if queries == keys:
        return causal_attention(q, k, v, None, True)
    q_heads, k_heads, v_heads = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if takes_flash(q_heads):
        # The kernel aligns its causal mask to the last key. The public function would align it to the first.
        out = torch.ops.aten._scaled_dot_product_flash_attention(q_heads, k_heads, v_heads, 0.0, True)[0]
        return out.transpose(1, 2)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return causal_attention(q, k, v, mask, False)


class _GatherKeys(torch.autograd.Function):
    """Keys and values of all ranks, in the order of the sequence; gradients, summed over the ranks, back to their own.

    [batch, seq here, heads, head_dim] each -> for each of `seen`, keys and values of that many chunks, from
    the first on. These lie in each other's memory, so that what several of them are saved for is held once.
    """

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, group: dist.ProcessGroup, seen: tuple[int, ...]) -> tuple[Tensor, ...]:
        ranks, chunk = group.size(), k.shape[1] // 2
        ctx.group, ctx.chunk = group, chunk
        own = torch.stack((k[:, :chunk], v[:, :chunk], k[:, chunk:], v[:, chunk:]))
        # [rank, front and back, k and v, batch, chunk, heads, head_dim]
        dealt = all_gather(own, group).unflatten(0, (ranks, 2, 2))
        keys, values = _in_order(dealt.movedim(0, 3), dim=2)
        return tuple(x[:, : count * chunk] for count in seen for x in (keys, values))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ranks, chunk = ctx.group.size(), ctx.chunk
        batch, _, *heads = grads[0].shape
        # In at least float32, as one device's kernel sums what all queries want of a key.
        dtype = torch.promote_types(grads[0].dtype, torch.float32)
        whole = grads[0].new_zeros(2, batch, 2 * ranks * chunk, *heads, dtype=dtype)
        for index, grad in enumerate(grads):
            whole[index % 2, :, : grad.shape[1]] += grad
        fronts, backs = whole.unflatten(2, (2, ranks, chunk)).movedim(3, 0).unbind(3)
        dealt = torch.stack((fronts, backs.flip(0)), dim=1)  # [rank, front and back, k and v, batch, chunk, …]
        front, back = reduce_scatter(dealt.flatten(0, 1), ctx.group)
        k_grad, v_grad = torch.cat((front, back), dim=2).to(grads[0].dtype)
        return k_grad, v_grad, None, None


def _in_order(dealt: Tensor, dim: int) -> Tensor:
    """[front and back, …, rank, chunk, …], rank being `dim` of what the two are of -> […, sequence, …]."""
    fronts, backs = dealt
    return torch.cat((fronts, backs.flip(dim)), dim).flatten(dim, dim + 1)
