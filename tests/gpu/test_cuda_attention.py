"""Attention: the flash kernels that several ranks call by name, and masks of documents, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from titanlite.models.layers import CausalAttention
from titanlite.models.llama import DocumentMask
from titanlite.parallel import context
from titanlite.parallel.context import _attend_to_the_last

pytestmark = pytest.mark.gpu

SHAPES = [(4, 4, 64), (8, 2, 128)]  # heads, heads of keys and values, head_dim


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def close(found: Tensor, exact: Tensor) -> None:
    """Within a few roundings of the largest."""
    assert (found.double() - exact).abs().max() <= 4 * 2**-8 * exact.abs().max()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
@pytest.mark.parametrize("queries", [64, 256])
def test_queries_at_the_end_of_the_keys(queries: int, heads: int, kv_heads: int, head_dim: int, compiled: bool) -> None:
    q, k, v = (random(2, 256, count, head_dim) for count in (heads, kv_heads, kv_heads))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    whole = CausalAttention()(*exact, None, True)[:, -queries:]
    found = [x.clone().requires_grad_() for x in (q, k, v)]
    attend = torch.compile(_attend_to_the_last, fullgraph=True) if compiled else _attend_to_the_last
    out = attend(found[0][:, -queries:], *found[1:])
    close(out, whole)
    grad = random(*out.shape)
    for ours, theirs in zip(
        torch.autograd.grad(out, found, grad), torch.autograd.grad(whole, exact, grad.double()), strict=True
    ):
        close(ours, theirs)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_blocks_of_a_ring(heads: int, kv_heads: int, head_dim: int) -> None:
    """Causal attention over 256 places, as a block of its first half and one of its second, the queries' own."""
    q, grad = random(2, heads, 128, head_dim), random(2, heads, 128, head_dim)
    k, v = random(2, kv_heads, 256, head_dim), random(2, kv_heads, 256, head_dim)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    mask = torch.ones(128, 256, dtype=torch.bool, device="cuda").tril(128)
    whole = torch.nn.functional.scaled_dot_product_attention(*exact, attn_mask=mask, enable_gqa=True)
    first, own = slice(0, 128), slice(128, 256)
    part, lse = context.attend(q, k[:, :, own], v[:, :, own], True, None)
    out = part.float()
    context._merge(out, lse, *context.attend(q, k[:, :, first], v[:, :, first], False, None))
    close(out, whole)
    parts = [
        context.attend_backward(grad, q, k[:, :, keys], v[:, :, keys], out.to(q.dtype), lse, keys is own, None)
        for keys in (first, own)
    ]
    (q_first, k_first, v_first), (q_own, k_own, v_own) = parts
    found = (q_first + q_own, torch.cat((k_first, k_own), 2), torch.cat((v_first, v_own), 2))
    for ours, theirs in zip(found, torch.autograd.grad(whole, exact, grad.double()), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_documents_of_a_sequence_are_each_alone(heads: int, kv_heads: int, head_dim: int, compiled: bool) -> None:
    lengths = [100, 28, 1, 127]
    documents = torch.arange(len(lengths), device="cuda").repeat_interleave(torch.tensor(lengths, device="cuda"))
    q, k, v = (random(1, 256, count, head_dim) for count in (heads, kv_heads, kv_heads))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    parts = zip(*(x.split(lengths, dim=1) for x in exact), strict=True)
    alone = torch.cat([CausalAttention()(*part, None, True) for part in parts], dim=1)
    found = [x.clone().requires_grad_() for x in (q, k, v)]
    core = CausalAttention()
    attend = torch.compile(core, fullgraph=True, dynamic=False) if compiled else core
    out = attend(*found, DocumentMask()(documents.unsqueeze(0)), False)
    close(out, alone)
    grad = random(*out.shape)
    for ours, theirs in zip(
        torch.autograd.grad(out, found, grad), torch.autograd.grad(alone, exact, grad.double()), strict=True
    ):
        close(ours, theirs)
