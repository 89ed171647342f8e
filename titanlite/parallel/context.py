"""Context parallelism: each rank of the cp group has a part of every sequence, and attention alone looks beyond it.

A sequence is cut into 2 x ranks chunks, and rank r takes the r-th from the front and the r-th from the back: under a
causal mask, every rank then has the same work (Llama 3 paper, section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titanlite.models.layers import at_least_float32, by_float32_units, causal_attention, device_kind
from titanlite.models.spec import ShardingRule
from titanlite.parallel.collectives import SEQUENCE, all_gather, gather_sequence, reduce_scatter
from titanlite.parallel.model import Batch
from titanlite.parallel.modules import GroupModule, modules_by_rule, replace_module


def _local_part(whole: Tensor, ranks: int, rank: int) -> Tensor:
    """A rank's part of [..., seq]: its chunk from the front, then that from the back."""
    chunks = whole.chunk(2 * ranks, dim=-1)
    return torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]), dim=-1)


def local_sequences(batch: Batch, ranks: int, rank: int) -> Batch:
    """The batch with a cp rank's part of the sequences' tokens, labels, positions and documents.

    Positions are those in whole sequences if it had none, and so are counts.
    """
    part = partial(_local_part, ranks=ranks, rank=rank)
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


# ---- all ranks' keys and values, gathered first ----------------------------------------------------------------------


class GatheredMask(GroupModule):
    """Keeps attention within documents, for this rank's queries and all ranks' keys."""

    def forward(self, documents: Tensor) -> Tensor:
        """[batch, seq here] document numbers -> [batch, 1, seq here, seq] bool: may this query see that key?"""
        ranks = self.group.size()
        dealt = gather_sequence(documents, self.group).unflatten(1, (ranks, 2, -1))
        every = _in_order(dealt.movedim(2, 0), dim=1)
        positions = torch.arange(every.shape[1], device=documents.device)
        own = _local_part(positions, ranks, self.group.rank())
        same = documents.unsqueeze(-1) == every.unsqueeze(-2)
        return (same & (positions <= own.unsqueeze(-1))).unsqueeze(1)


class GatheredAttention(GroupModule):
    """Causal attention of this rank's queries to all ranks' keys and values, which are gathered first."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """As in `causal_attention`, with this rank's part of each sequence; mask: as `GatheredMask` builds it."""
        chunk, ranks, rank = q.shape[SEQUENCE] // 2, self.group.size(), self.group.rank()
        if mask is not None:
            k, v = _GatherKeys.apply(k, v, self.group, (2 * ranks,))
            return causal_attention(q, k, v, mask, False)
        assert causal, "a model that sees what follows needs no balance, and has none here"
        seen = rank + 1, 2 * ranks - rank  # chunks up to the end of either of its own
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


# ---- keys and values that pass from rank to rank, never all on one: ring attention (Liu et al. 2023) -----------------


class RingDocuments(GroupModule):
    """All ranks' document numbers, from which `RingAttention` makes the masks of its blocks."""

    def forward(self, documents: Tensor) -> Tensor:
        """[batch, seq here] -> [batch, ranks, seq here]"""
        return gather_sequence(documents, self.group).unflatten(1, (self.group.size(), -1))


class RingAttention(GroupModule):
    """Causal attention of this rank's queries to all ranks' keys and values, which pass by."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """As in `causal_attention`, with this rank's part of each sequence; mask: as `RingDocuments` builds it."""
        assert causal or mask is not None, "a model that sees what follows needs no balance, and has none here"
        dtype = q.dtype
        if by_float32_units(q):
            q, k, v = q.float(), k.float(), v.float()
        out = _Ring.apply(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, self.group)
        return out.transpose(1, 2).to(dtype)


def visible(rank: int, owner: int, length: int) -> tuple[slice, slice]:
    """Which of a rank's `length` queries see which of the owner's keys: all or the back half, all or the front half.

    Of a rank before this one, the front chunk precedes both of this rank's and the back one follows them. Of a later
    rank, both lie between this rank's. So half of the pairs are seen, and only a rank's own chunks in part.
    """
    return slice(length // 2 if owner > rank else 0, length), slice(0, length // 2 if owner < rank else length)


class _Ring(torch.autograd.Function):
    """Tensors are [batch, heads, seq here, head_dim]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, group: dist.ProcessGroup
    ) -> Tensor:
        steps = _steps(k, v, documents, group)
        _, _, keys, values, same = next(steps)
        part, part_lse = attend(q, keys, values, True, same)
        # Copies: what a kernel gave may be kept for recomputation, and is not to be written on.
        out, lse = part.to(torch.promote_types(q.dtype, torch.float32), copy=True), part_lse.clone()
        for here, _, keys, values, same in steps:
            part, part_lse = attend(q[:, :, here], keys, values, False, same)
            _merge(out[:, :, here], lse[:, :, here], part, part_lse)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, documents, out, lse)
        ctx.group = group
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, documents, out, lse = ctx.saved_tensors
        steps = _steps(k, v, documents, ctx.group)
        _, _, keys, values, same = next(steps)
        q_grad, *parts = attend_backward(grad, q, keys, values, out, lse, True, same)
        q_grad = q_grad.to(torch.promote_types(q.dtype, torch.float32), copy=True)
        coming = _pass_on(torch.stack(parts).to(q_grad.dtype), ctx.group)
        for here, there, keys, values, same in steps:
            q_part, *parts = attend_backward(
                grad[:, :, here], q[:, :, here], keys, values, out[:, :, here], lse[:, :, here], False, same
            )
            q_grad[:, :, here] += q_part
            # What others added to the gradients of these keys left the neighbour before this rank began with them.
            grads = _wait(coming)
            grads[..., there, :] += torch.stack(parts)
            coming = _pass_on(grads, ctx.group)
        k_grad, v_grad = _wait(coming).to(k.dtype)  # home again
        return q_grad.to(q.dtype), k_grad, v_grad, None, None


def _steps(
    k: Tensor, v: Tensor, documents: Tensor | None, group: dist.ProcessGroup
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor | None]]:
    """Each rank's `visible` queries and keys, these keys with their values, and which queries are in one document with
    which keys [batch, 1, queries, keys]; this rank's own first. The next are under way meanwhile.
    """
    ranks, rank = group.size(), group.rank()
    both = torch.stack((k, v))
    for step in range(ranks):
        coming = _pass_on(both, group) if step < ranks - 1 else None
        owner, same = (rank - step) % ranks, None
        here, there = visible(rank, owner, k.shape[2])
        if documents is not None:
            ours, theirs = documents[:, rank, here], documents[:, owner, there]
            same = (ours.unsqueeze(-1) == theirs.unsqueeze(-2)).unsqueeze(1)
        yield here, there, *both[..., there, :], same
        if coming is not None:
            both = _wait(coming)


def _pass_on(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send `x` to the next rank; returns what the one before sends, to be waited for by `_wait`."""
    ranks, rank = group.size(), group.rank()
    # Of all collectives the one that the compiler knows and that moves nothing but this. Its splits are rows.
    sent, received = [0] * ranks, [0] * ranks
    sent[(rank + 1) % ranks] = received[(rank - 1) % ranks] = x.shape[0]
    return torch.ops._c10d_functional.all_to_all_single(x.contiguous(), received, sent, group.group_name)


def _wait(coming: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(coming)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Take other keys' part into `out` and `lse`, in place (Milakov & Gimelshein 2018, section 3.1).

    out [batch, heads, seq, head_dim], lse [batch, heads, seq]: the log of the summed exponentials of the scores, and
    -inf in `part_lse` where a query saw none of these keys.
    """
    weight = torch.sigmoid(part_lse - lse).unsqueeze(-1)
    out.lerp_(part.to(out.dtype), weight.to(out.dtype))
    lse.copy_(torch.logaddexp(lse, part_lse))


# ---- attention with what it takes to merge it: the log of the summed exponentials of scores --------------------------


def takes_flash(q: Tensor) -> bool:
    """Whether CUDA's flash attention kernels take queries like `q` [batch, heads, seq, head_dim]."""
    halves = q.dtype in (torch.bfloat16, torch.float16)
    return device_kind(q) == "cuda" and halves and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention with the log-sum-exp of each query's scores: ([batch, heads, seq, head_dim], [batch, heads, seq]).

    k and v may have fewer heads and other lengths; `causal` is for equal lengths. mask [batch, 1, seq, keys] says which
    keys a query may see; for it there is no kernel.
    """
    if not _has_kernel(q, mask):
        return _attend_by_products(q, k, v, _and_causal(mask, q) if causal else mask)
    if device_kind(q) == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    # Not the operation above this one: selective recomputation keeps that, and a ring's parts are much in all.
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False
    )
    return out.transpose(1, 2), lse


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, where `out` and `lse` are over all keys that the queries see, also those not in `k`."""
    if not _has_kernel(q, mask):
        return _attend_by_products_backward(grad, q, k, v, out, lse, _and_causal(mask, q) if causal else mask)
    if device_kind(q) == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal)
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, q, k, v, out))
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)  # random state of the dropout that there is not
    grads = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0, causal, unused, unused
    )
    q_grad, k_grad, v_grad = (x.transpose(1, 2) for x in grads)
    return q_grad, k_grad, v_grad


def _has_kernel(q: Tensor, mask: Tensor | None) -> bool:
    return mask is None and (takes_flash(q) or device_kind(q) == "cpu")


def _and_causal(mask: Tensor | None, q: Tensor) -> Tensor:
    if mask is not None:
        return mask.tril()
    return torch.ones(1, 1, q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()


_ROWS = 256  # queries whose scores are in memory at a time where no kernel forms them piece by piece


def _attend_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for first in range(0, q.shape[2], _ROWS):
        scores, values = _scores(q, k, mask, first), at_least_float32(v).unsqueeze(2)
        lse = scores.logsumexp(-1, keepdim=True)
        # A query that sees none of these keys has an lse of -inf, and weights of 0 rather than of inf - inf.
        weights = (scores - lse.clamp_min(torch.finfo(lse.dtype).min)).exp()
        outs.append((weights @ values).flatten(1, 2).to(q.dtype))
        lses.append(lse.squeeze(-1).flatten(1, 2))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _attend_by_products_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5
    keys, values = at_least_float32(k), at_least_float32(v)
    q_grads, k_grad, v_grad = [], torch.zeros_like(keys), torch.zeros_like(values)
    for first in range(0, q.shape[2], _ROWS):
        queries, grads, outs = (_rows(x, k, first) for x in (q, grad, out))
        weights = (_scores(q, k, mask, first) - _rows(lse.unsqueeze(-1), k, first)).exp()
        v_grad += (weights.transpose(-2, -1) @ grads).sum(2)
        of_weights = grads @ values.unsqueeze(2).transpose(-2, -1)
        of_scores = weights * (of_weights - (grads * outs).sum(-1, keepdim=True)) * scale
        q_grads.append((of_scores @ keys.unsqueeze(2)).flatten(1, 2).to(q.dtype))
        k_grad += (of_scores.transpose(-2, -1) @ queries).sum(2)
    return torch.cat(q_grads, dim=2), k_grad.to(k.dtype), v_grad.to(v.dtype)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, first: int) -> Tensor:
    """Of the queries from `first` on, [batch, kv_heads, heads of each, _ROWS, keys]; -inf where a key is not seen."""
    products = _rows(q, k, first) @ at_least_float32(k).unsqueeze(2).transpose(-2, -1) * q.shape[-1] ** -0.5
    if mask is None:
        return products
    return products.masked_fill(~mask[:, :, first : first + _ROWS].unsqueeze(2), -torch.inf)


def _rows(x: Tensor, k: Tensor, first: int) -> Tensor:
    """[batch, heads, seq, …] -> [batch, kv_heads, heads of each, _ROWS, …], in at least float32."""
    return at_least_float32(x[:, :, first : first + _ROWS].unflatten(1, (k.shape[1], -1)))
