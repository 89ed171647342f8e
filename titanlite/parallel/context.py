"""Context parallelism: each rank of the cp group has a part of every sequence, and attention alone looks beyond it.

A sequence is cut into 2 x ranks chunks, and rank r takes the r-th from the front and the r-th from the back: under a
causal mask, every rank then has the same work (Llama 3 paper, section 3.3.2). Each chunk's queries go through the same
operator as on one device, `attention.varlen`, with documents cut to the chunk and to the keys that it sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titanlite.models.attention.varlen import Documents, attend, attend_backward, attend_part, clip_documents
from titanlite.models.layers import CausalAttention, by_float32_units
from titanlite.models.spec import ShardingRule
from titanlite.parallel.collectives import SEQUENCE, all_gather, reduce_scatter
from titanlite.parallel.model import Batch
from titanlite.parallel.modules import GroupModule, modules_by_rule, replace_module


def _local_part(whole: Tensor, ranks: int, rank: int) -> Tensor:
    """A rank's part of [..., seq]: its chunk from the front, then that from the back."""
    chunks = whole.chunk(2 * ranks, dim=-1)
    return torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]), dim=-1)


@dataclass
class LocalSequences:
    """Cuts batches to a cp rank's part of the sequences' tokens, labels and positions.

    Positions are those in whole sequences if a batch has none. Documents and counts stay those of whole sequences.
    """

    ranks: int
    rank: int
    _plain: Tensor | None = None  # this rank's positions where batches have none: one tensor, so that tables are kept

    def __call__(self, batch: Batch) -> Batch:
        part = partial(_local_part, ranks=self.ranks, rank=self.rank)
        positions = batch.positions
        if positions is None:
            if self._plain is None:
                self._plain = part(torch.arange(batch.tokens.shape[-1], device=batch.tokens.device))
            positions = self._plain
        else:
            positions = part(positions)
        return replace(batch, tokens=part(batch.tokens), labels=part(batch.labels), positions=positions)


def apply_context_parallel(
    model: nn.Module, plan: Sequence[ShardingRule], group: dist.ProcessGroup, method: Literal["all-gather", "ring"]
) -> None:
    """Replace, in place, the attention that the cp rules of `plan` name by one that sees all ranks' keys and values.

    Rank r of the group has the r-th of `LocalSequences`. Parameters stay what they are. Raises `TypeError` where a rule
    names another module than a `CausalAttention`.
    """
    kind = RingAttention if method == "ring" else GatheredAttention
    for rule, name, module in modules_by_rule(model, plan):
        if rule.style == "attention":
            if type(module) is not CausalAttention:
                wrong = type(module).__name__
                raise TypeError(f"the sharding plan has 'attention' for {name}, and this cannot replace a {wrong}")
            replace_module(model, name, kind(group, module.window))


class SharedAttention(GroupModule):
    """Causal attention of this rank's queries to all ranks' keys and values."""

    def __init__(self, group: dist.ProcessGroup, window: int) -> None:
        super().__init__(group)
        self.window = window

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        """As in `causal_attention`, with this rank's part of each sequence; documents: of whole sequences."""
        dtype = q.dtype
        if by_float32_units(q):
            q, k, v = q.float(), k.float(), v.float()
        return self.attend(q, k, v, documents).to(dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        raise NotImplementedError


# ---- all ranks' keys and values, gathered first ----------------------------------------------------------------------


class GatheredAttention(SharedAttention):
    """Keys and values are gathered first."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        chunk, ranks, rank = q.shape[SEQUENCE] // 2, self.group.size(), self.group.rank()
        outs = []
        places = [chunk * index for index in (rank, 2 * ranks - 1 - rank)]
        # Keys up to the end of the chunk, from the first that a window reaches.
        seen = [(max(0, place - self.window + 1) if self.window else 0, place + chunk) for place in places]
        gathered = _GatherKeys.apply(k, v, self.group, tuple(seen))
        for index, (place, (first, end)) in enumerate(zip(places, seen, strict=True)):
            own = q[:, index * chunk : (index + 1) * chunk]
            keys, values = gathered[2 * index : 2 * index + 2]
            found = clip_documents(documents, len(q), 2 * ranks * chunk, range(place, end), range(first, end), q.device)
            flat = (x.flatten(0, 1) for x in (own, keys, values))
            outs.append(attend(*flat, *found, self.window - 1, 0)[0].view_as(own))
        return torch.cat(outs, dim=SEQUENCE)


class _GatherKeys(torch.autograd.Function):
    """Keys and values of all ranks, in the order of the sequence; gradients, summed over the ranks, back to their own.

    [batch, seq here, heads, head_dim] each -> for each (first, end) of `seen`, these keys and values. They lie in each
    other's memory, so that what several of them are saved for is held once.
    """

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, group: dist.ProcessGroup, seen: tuple[tuple[int, int], ...]
    ) -> tuple[Tensor, ...]:
        ranks, chunk = group.size(), k.shape[1] // 2
        ctx.group, ctx.chunk, ctx.seen = group, chunk, seen
        own = torch.stack((k[:, :chunk], v[:, :chunk], k[:, chunk:], v[:, chunk:]))
        # [rank, front and back, k and v, batch, chunk, heads, head_dim]
        dealt = all_gather(own, group).unflatten(0, (ranks, 2, 2))
        keys, values = _in_order(dealt.movedim(0, 3), dim=2)
        return tuple(x[:, first:end] for first, end in seen for x in (keys, values))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ranks, chunk = ctx.group.size(), ctx.chunk
        batch, _, *heads = grads[0].shape
        # In at least float32, as one device's kernel sums what all queries want of a key.
        dtype = torch.promote_types(grads[0].dtype, torch.float32)
        whole = grads[0].new_zeros(2, batch, 2 * ranks * chunk, *heads, dtype=dtype)
        for index, grad in enumerate(grads):
            first, end = ctx.seen[index // 2]
            whole[index % 2, :, first:end] += grad
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


class RingAttention(SharedAttention):
    """Keys and values pass by."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        return _Ring.apply(q, k, v, documents, self.group, self.window)


class Pair(NamedTuple):
    """Some of a rank's queries, and of an owner's keys, that these see."""

    queries: slice  # of the rank's part of the sequence
    keys: slice  # of the owner's
    place: int  # of the first query in the sequence
    distance: int  # from the first of the keys to it
    window: tuple[int, int]  # as `varlen.attend` takes it, where the last query has the last key's place


def pairs(rank: int, owner: int, ranks: int, chunk: int, window: int) -> Iterator[Pair]:
    """Each chunk of a rank with each of an owner's chunks that it sees, of its own chunks first the same."""
    for mine, index in enumerate((rank, 2 * ranks - 1 - rank)):
        for theirs, other in ((1, 2 * ranks - 1 - owner), (0, owner)):
            distance = chunk * (index - other)
            # Of a chunk that the window cuts at a corner: as many of the first queries as of the last keys.
            hidden = max(0, distance - window + 1) if window and distance else 0
            if distance < 0 or hidden >= chunk:
                continue
            left = max(0, window - 1 - distance) if window and distance + chunk > window else -1
            yield Pair(
                slice(mine * chunk, (mine + 1) * chunk - hidden), slice(theirs * chunk + hidden, (theirs + 1) * chunk),
                index * chunk, distance - hidden, (left, -1 if distance else 0),
            )  # fmt: skip


def _documents_of(pair: Pair, documents: Tensor | None, q: Tensor, length: int) -> tuple[Documents, Tensor | None]:
    """A pair's documents in sequences of `length`, and which queries [batch * queries] see none of the keys for it.

    Keys before a chunk are seen by the one document that reaches into it, if it begins there: all queries are compared
    with its keys, so that the last of both stay side by side, and those of later documents are not counted afterwards.
    """
    batch, queries = q.shape[0], pair.queries.stop - pair.queries.start
    places = range(pair.place, pair.place + queries)
    if pair.distance == 0:
        return clip_documents(documents, batch, length, places, places, q.device), None
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * queries
    if documents is None:
        return Documents(starts, starts, queries, queries), None
    firsts = torch.arange(batch, dtype=torch.int32, device=q.device) * length + pair.place
    after = torch.searchsorted(documents, firsts, right=True)  # each sequence's first document that begins later
    begin, end = documents[after - 1] - firsts, documents[after.clamp(max=len(documents) - 1)] - firsts
    unseen = (begin + pair.distance).clamp(0, queries)  # keys of earlier documents
    q_offsets = torch.cat((starts[:-1].repeat_interleave(2), starts[-1:]))
    k_offsets = torch.cat((torch.stack((starts[:-1], starts[:-1] + unseen), dim=1).flatten(), starts[-1:]))
    hidden = torch.arange(queries, device=q.device) >= end.unsqueeze(1)
    return Documents(q_offsets, k_offsets.to(torch.int32), queries, queries), hidden.flatten()


class _Ring(torch.autograd.Function):
    """Tensors are [batch, seq here, heads, head_dim]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, group: dist.ProcessGroup, window: int
    ) -> Tensor:
        batch, here, heads, _ = q.shape
        out = torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
        lse = out.new_full((heads, batch, here), -torch.inf)
        for owner, (keys, values) in _steps(k, v, group):
            for pair in pairs(group.rank(), owner, group.size(), here // 2, window):
                found, hidden = _documents_of(pair, documents, q, here * group.size())
                given = (q[:, pair.queries], keys[:, pair.keys], values[:, pair.keys])
                part, part_lse = attend_part(*(x.flatten(0, 1) for x in given), *found, *pair.window)
                unseen = part_lse.isinf() if hidden is None else part_lse.isinf() | hidden
                part_lse = part_lse.masked_fill(unseen, -torch.inf).unflatten(1, (batch, -1))
                _merge(out[:, pair.queries], lse[:, :, pair.queries], part.unflatten(0, (batch, -1)), part_lse)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, documents, out, lse)
        ctx.group, ctx.window = group, window
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, documents, out, lse = ctx.saved_tensors
        group, batch, here = ctx.group, q.shape[0], q.shape[1]
        q_grad, coming = torch.zeros_like(q, dtype=lse.dtype), None
        for owner, (keys, values) in _steps(k, v, group):
            grads = torch.zeros_like(torch.stack((keys, values)), dtype=lse.dtype)
            for pair in pairs(group.rank(), owner, group.size(), here // 2, ctx.window):
                found, hidden = _documents_of(pair, documents, q, here * group.size())
                tensors = [x[:, pair.queries] for x in (grad, q)], [x[:, pair.keys] for x in (keys, values)]
                given = (x.flatten(0, 1) for x in (*tensors[0], *tensors[1], out[:, pair.queries]))
                logs = lse[:, :, pair.queries].flatten(1)
                if hidden is not None:
                    logs = logs.masked_fill(hidden, torch.inf)
                parts = attend_backward(*given, logs, *found, *pair.window)
                q_part, *kv_parts = (x.unflatten(0, (batch, -1)) for x in parts)
                q_grad[:, pair.queries] += q_part
                grads[:, :, pair.keys] += torch.stack(kv_parts)
            # What others added to the gradients of these keys left the neighbour before this rank began with them.
            coming = _pass_on(grads if coming is None else grads + _wait(coming), group)
        assert coming is not None
        k_grad, v_grad = _wait(coming).to(k.dtype)  # home again
        return q_grad.to(q.dtype), k_grad, v_grad, None, None, None


def _steps(k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Iterator[tuple[int, Tensor]]:
    """Each rank with its keys and values; this rank's own first. The next are under way meanwhile."""
    ranks, rank = group.size(), group.rank()
    both = torch.stack((k, v))
    for step in range(ranks):
        coming = _pass_on(both, group) if step < ranks - 1 else None
        yield (rank - step) % ranks, both
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

    out [batch, seq, heads, head_dim], lse [heads, batch, seq]: the log of the summed exponentials of the scores, and
    -inf in `part_lse` where a query saw none of these keys.
    """
    weight = torch.sigmoid(part_lse - lse).movedim(0, -1).unsqueeze(-1)
    out.lerp_(part.to(out.dtype), weight.to(out.dtype))
    lse.copy_(torch.logaddexp(lse, part_lse))
