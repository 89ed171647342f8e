"""Attention over shared sequences on one rank of several, for test_context_parity.py."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support.dense_attention import dense_attention, random_documents
from support.flash_on_cpu import flash_on_cpu
from titanlite.models.layers import CausalAttention
from titanlite.models.spec import ShardingRule
from titanlite.parallel.context import LocalSequences, _GatherKeys, apply_context_parallel
from titanlite.parallel.model import Batch
from titanlite.parallel.units import _contexts

PLAN = (ShardingRule("core", "attention"),)

Method = Literal["all-gather", "ring"]


class Attending(nn.Module):
    """What holds a model's attention."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.core = CausalAttention(window)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        out: Tensor = self.core(q, k, v, documents)
        return out


def part_of(tensor: Tensor, ranks: int, rank: int) -> Tensor:
    """A rank's part of [batch, seq, …], cut as tokens are."""
    numbers = torch.arange(tensor.shape[1])
    batch = Batch(numbers, numbers, None, None, (), 0, 1, len(numbers))
    return tensor[:, LocalSequences(ranks, rank)(batch).tokens]


def inputs(case: dict[str, Any]) -> tuple[list[Tensor], Tensor | None]:
    """Queries, keys, values and the gradient of the result, whole; documents of about five tokens."""
    generator = torch.Generator().manual_seed(1)
    batch, seq, heads, kv_heads = case["batch"], case["seq"], case["heads"], case["kv_heads"]
    tensors = [
        torch.randn(batch, seq, count, 8, dtype=torch.float64, generator=generator).to(case.get("dtype", torch.float64))
        for count in (heads, kv_heads, kv_heads, heads)
    ]
    return tensors, random_documents(batch, seq, generator) if case["documents"] else None


def attend(
    rank: int, world: int, method: Method, case: dict[str, Any], how: str = "plain"
) -> tuple[list[Tensor], list[Tensor]]:
    """The result and the gradients of queries, keys and values for this rank's part: shared, and as they should be."""
    tensors, documents = inputs(case)
    q, k, v = (tensor.double().clone().requires_grad_() for tensor in tensors[:3])
    whole = dense_attention(q, k, v, documents, case["window"])
    expected = [whole.detach(), *torch.autograd.grad(whole, (q, k, v), tensors[3].double())]

    shared = Attending(case["window"])
    apply_context_parallel(shared, PLAN, dist.group.WORLD, method)
    mine = [part_of(tensor, world, rank) for tensor in tensors]
    ours = [tensor.requires_grad_() for tensor in mine[:3]]
    if how == "compiled":
        torch.compiler.reset()  # of the other cases, which the same code was compiled for
        shared.compile(dynamic=False, backend="aot_eager", fullgraph=True)
    with flash_on_cpu() if how == "by CUDA's path" else nullcontext():
        if how.startswith("recomputed"):
            kept = {"context_fn": partial(_contexts, "every_second_product")} if "but" in how else {}
            out = checkpoint(shared, *ours, documents, use_reentrant=False, **kept)
        else:
            out = shared(*ours, documents)
        found = [out.detach(), *torch.autograd.grad(out, ours, mine[3])]
    return found, [part_of(tensor, world, rank) for tensor in expected]


def gathered_gradients(rank: int, world: int) -> tuple[Tensor, Tensor]:
    """A rank's gradients of its keys and values in bfloat16, given eight-bit ones for all: found, and rounded once."""
    generator = torch.Generator().manual_seed(2)
    shape = 2, 3, 4 * world, 2, 5  # keys and values of each rank's queries
    given = torch.randint(-255, 256, (world, *shape), generator=generator).to(torch.bfloat16)
    seen = (0, 2 * world), (world, 4 * world)
    group = dist.group.WORLD
    assert group is not None
    mine = [part_of(torch.zeros(shape[1:], dtype=torch.bfloat16), world, rank).requires_grad_() for _ in range(2)]
    out = _GatherKeys.apply(*mine, group, seen)
    grads = [given[rank, index % 2, :, : each.shape[1]] for index, each in enumerate(out)]
    found = torch.stack(torch.autograd.grad(out, mine, grads))
    whole = torch.zeros(2, shape[1], 4 * world, *shape[3:], dtype=torch.float64)
    for index in range(4):
        first, end = seen[index // 2]
        whole[index % 2, :, first:end] += given[:, index % 2, :, : end - first].double().sum(0)
    return found, torch.stack([part_of(each, world, rank) for each in whole.to(torch.bfloat16)])
