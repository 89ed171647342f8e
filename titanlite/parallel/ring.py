"""Ring attention (Liu et al. 2023): keys and values of divided sequences pass from rank to rank, never all on one.

What a block of keys adds to the outputs is merged by its log-sum-exp. A rank's part of a sequence is that of
`context.py`, which makes every step one call of a plain attention kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titanlite.models.layers import at_least_float32, by_float32_units, device_kind
from titanlite.parallel.collectives import gather_sequence


class GroupModule(nn.Module):
    """A module whose work is divided among the ranks of a group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group


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


class _Block(NamedTuple):
    """What a rank computes with another's keys: all of its queries or the back half, all keys or the front half.

    Of a rank before this one, the front chunk precedes both of this rank's and the back one follows them. Of a later
    rank, both lie between this rank's. So half of the pairs are seen, and only a rank's own chunks in part.
    """

    rank: int
    owner: int  # Rank that the keys came from
    queries: slice
    keys: slice

    @staticmethod
    def of(rank: int, owner: int, length: int) -> _Block:
        """For `length` queries and keys a rank."""
        front, back, both = slice(0, length // 2), slice(length // 2, length), slice(0, length)
        queries = back if owner > rank else both
        return _Block(rank, owner, queries, front if owner < rank else both)

    def same_document(self, documents: Tensor | None) -> Tensor | None:
        """[batch, 1, queries, keys]: are both in one document?"""
        if documents is None:
            return None
        ours, theirs = documents[:, self.rank, self.queries], documents[:, self.owner, self.keys]
        return (ours.unsqueeze(-1) == theirs.unsqueeze(-2)).unsqueeze(1)


class _Ring(torch.autograd.Function):
    """Tensors are [batch, heads, seq here, head_dim]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, group: dist.ProcessGroup
    ) -> Tensor:
        steps = _steps(k, v, group)
        block, keys, values = next(steps)
        part, part_lse = attend(q, keys, values, True, block.same_document(documents))
        # Copies: what a kernel gave may be kept for recomputation, and is not to be written on.
        out, lse = part.to(torch.promote_types(q.dtype, torch.float32), copy=True), part_lse.clone()
        for block, keys, values in steps:
            seen = block.queries
            part, part_lse = attend(q[:, :, seen], keys, values, False, block.same_document(documents))
            _merge(out[:, :, seen], lse[:, :, seen], part, part_lse)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, documents, out, lse)
        ctx.group = group
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, documents, out, lse = ctx.saved_tensors
        steps = _steps(k, v, ctx.group)
        block, keys, values = next(steps)
        same = block.same_document(documents)
        q_grad, *parts = attend_backward(grad, q, keys, values, out, lse, True, same)
        q_grad = q_grad.to(torch.promote_types(q.dtype, torch.float32), copy=True)
        coming = _pass_on(torch.stack(parts).to(q_grad.dtype), ctx.group)
        for block, keys, values in steps:
            seen, same = block.queries, block.same_document(documents)
            q_part, *parts = attend_backward(
                grad[:, :, seen], q[:, :, seen], keys, values, out[:, :, seen], lse[:, :, seen], False, same
            )
            q_grad[:, :, seen] += q_part
            # What others added to the gradients of these keys left the neighbour before this rank began with them.
            grads = _wait(coming)
            grads[..., block.keys, :] += torch.stack(parts)
            coming = _pass_on(grads, ctx.group)
        k_grad, v_grad = _wait(coming).to(k.dtype)  # home again
        return q_grad.to(q.dtype), k_grad, v_grad, None, None


def _steps(k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Iterator[tuple[_Block, Tensor, Tensor]]:
    """What to compute with which keys and values, this rank's own first; the next are under way meanwhile."""
    ranks, rank = group.size(), group.rank()
    here = torch.stack((k, v))
    for step in range(ranks):
        coming = _pass_on(here, group) if step < ranks - 1 else None
        block = _Block.of(rank, (rank - step) % ranks, k.shape[2])
        keys, values = here[..., block.keys, :]
        yield block, keys, values
        if coming is not None:
            here = _wait(coming)


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


_ROWS = 256  # Queries whose scores are in memory at a time where no kernel forms them piece by piece


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
