"""Attention over shared sequences on one rank of several, for test_context_parity.py."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from titanlite.models.layers import CausalAttention
from titanlite.models.llama import DocumentMask
from titanlite.models.spec import ShardingRule
from titanlite.parallel.context import _GatherKeys, apply_context_parallel, local_sequences
from titanlite.parallel.model import Batch
from titanlite.parallel.units import _policy

PLAN = (ShardingRule("core", "attention"), ShardingRule("mask", "mask"))

Method = Literal["all-gather", "ring"]


class Attending(nn.Module):
    """What a model's attention is made of, with a mask of documents or without."""

    def __init__(self) -> None:
        super().__init__()
        self.core = CausalAttention()
        self.mask = DocumentMask()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        mask = None if documents is None else self.mask(documents)
        out: Tensor = self.core(q, k, v, mask, mask is None)
        return out


def part_of(tensor: Tensor, ranks: int, rank: int) -> Tensor:
    """A rank's part of [batch, seq, …], cut as tokens are."""
    numbers = torch.arange(tensor.shape[1])
    batch = Batch(numbers, numbers, None, None, (), 0, 1, len(numbers))
    return tensor[:, local_sequences(batch, ranks, rank).tokens]


def inputs(case: dict[str, Any]) -> tuple[list[Tensor], Tensor | None]:
    """Queries, keys, values and the gradient of the result, whole; documents of about five tokens."""
    generator = torch.Generator().manual_seed(1)
    batch, seq, heads, kv_heads = case["batch"], case["seq"], case["heads"], case["kv_heads"]
    tensors = [
        torch.randn(batch, seq, count, 8, dtype=torch.float64, generator=generator).to(case.get("dtype", torch.float64))
        for count in (heads, kv_heads, kv_heads, heads)
    ]
    begins = torch.rand(batch, seq, generator=generator) < 0.2
    return tensors, begins.cumsum(1) if case["documents"] else None


def attend(
    rank: int, world: int, method: Method, case: dict[str, Any], how: str = "plain"
) -> tuple[list[Tensor], list[Tensor]]:
    """The result and the gradients of queries, keys and values for this rank's part: shared, and as they should be."""
    tensors, documents = inputs(case)
    q, k, v = (tensor.double().clone().requires_grad_() for tensor in tensors[:3])
    whole = Attending()(q, k, v, documents)
    expected = [whole.detach(), *torch.autograd.grad(whole, (q, k, v), tensors[3].double())]

    shared = Attending()
    apply_context_parallel(shared, PLAN, dist.group.WORLD, method)
    mine = [part_of(tensor, world, rank) for tensor in tensors]
    ours = [tensor.requires_grad_() for tensor in mine[:3]]
    numbers = None if documents is None else part_of(documents, world, rank)
    if how == "compiled":
        shared.compile(dynamic=False, backend="aot_eager", fullgraph=True)
    if how.startswith("recomputed"):
        kept = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if "but" in how else {}
        out = checkpoint(shared, *ours, numbers, use_reentrant=False, **kept)
    else:
        out = shared(*ours, numbers)
    found = [out.detach(), *torch.autograd.grad(out, ours, mine[3])]
    return found, [part_of(tensor, world, rank) for tensor in expected]


def gathered_gradients(rank: int, world: int) -> tuple[Tensor, Tensor]:
    """A rank's gradients of its keys and values in bfloat16, given eight-bit ones for all: found, and rounded once."""
    generator = torch.Generator().manual_seed(2)
    shape = 2, 3, 4 * world, 2, 5  # keys and values of each rank's queries
    given = torch.randint(-255, 256, (world, *shape), generator=generator).to(torch.bfloat16)
    seen = (world, 2 * world)
    group = dist.group.WORLD
    assert group is not None
    mine = [part_of(torch.zeros(shape[1:], dtype=torch.bfloat16), world, rank).requires_grad_() for _ in range(2)]
    out = _GatherKeys.apply(*mine, group, seen)
    grads = [given[rank, index % 2, :, : each.shape[1]] for index, each in enumerate(out)]
    found = torch.stack(torch.autograd.grad(out, mine, grads))
    whole = given.double().sum(0)
    whole[:, :, : shape[2] // 2] *= 2  # both of `seen`
    return found, torch.stack([part_of(each, world, rank) for each in whole.to(torch.bfloat16)])
