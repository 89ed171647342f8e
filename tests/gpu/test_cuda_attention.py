"""Attention by CUDA's kernels, in bfloat16, against a mask of all queries and keys in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from support.dense_attention import dense_attention
from torch import Tensor

from titanlite.models.attention.varlen import Documents, attend, attend_backward, attend_part, clip_documents
from titanlite.models.layers import causal_attention
from titanlite.parallel.context import _merge

pytestmark = pytest.mark.gpu

SHAPES = [(4, 4, 64), (8, 2, 128)]  # heads, heads of keys and values, head_dim
LENGTH = 256
DOCUMENTS = [0, 100, 128, 129, 256, 300, 512, 512, 512]  # of two sequences


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def close(found: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Within a few roundings of the largest."""
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours.double() - theirs).abs().max() <= 4 * 2**-8 * theirs.abs().max()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("window", [0, 1, 40])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_documents_and_windows(
    heads: int, kv_heads: int, head_dim: int, documents: list[int] | None, window: int, compiled: bool
) -> None:
    offsets = None if documents is None else torch.tensor(documents, dtype=torch.int32, device="cuda")
    given = [random(2, LENGTH, count, head_dim) for count in (heads, kv_heads, kv_heads)]
    exact = [x.detach().double().requires_grad_() for x in given]
    how = torch.compile(causal_attention, fullgraph=True, dynamic=False) if compiled else causal_attention
    found, expected = how(*given, offsets, window), dense_attention(*exact, offsets, window)
    close([found], [expected])
    grad = torch.randn_like(found)
    close(torch.autograd.grad(found, given, grad), torch.autograd.grad(expected, exact, grad.double()))


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_later_queries_of_documents(heads: int, kv_heads: int, head_dim: int, window: int) -> None:
    """As under cp: documents without queries give their keys no gradient, rather than none that is written."""
    offsets = torch.tensor(DOCUMENTS, dtype=torch.int32, device="cuda")
    queries = range(192, LENGTH)
    q, (k, v) = random(2, len(queries), heads, head_dim), (random(2, LENGTH, kv_heads, head_dim) for _ in range(2))
    found = clip_documents(offsets, 2, LENGTH, queries, range(LENGTH), q.device)
    out = attend(*(x.flatten(0, 1) for x in (q, k, v)), *found, window - 1, 0)[0].view_as(q)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = dense_attention(*exact, offsets, window)
    close([out], [expected])
    grad = torch.randn_like(out)
    close(torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, exact, grad.double()))


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_parts_of_a_ring(heads: int, kv_heads: int, head_dim: int) -> None:
    """Queries with their own keys and with earlier ones, of which some are of another document; then merged."""
    half, begin = 128, 50
    q = random(half, heads, head_dim)
    k, v = random(2 * half, kv_heads, head_dim), random(2 * half, kv_heads, head_dim)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    places = torch.tensor([0, begin, 2 * half], dtype=torch.int32, device="cuda")
    expected = dense_attention(*(x.unsqueeze(0) for x in exact), places, 0)[0]
    none, all_q = torch.tensor([0, 0, half], dtype=torch.int32, device="cuda"), torch.tensor([0, half]).int().cuda()
    earlier = Documents(none, torch.tensor([0, begin, half]).int().cuda(), half, half)
    parts = [(slice(half, 2 * half), Documents(all_q, all_q, half, half), (-1, 0)), (slice(0, half), earlier, (-1, -1))]
    out, lse = torch.zeros(1, half, heads, head_dim, device="cuda"), torch.full((heads, 1, half), -torch.inf).cuda()
    for keys, found, limits in parts:
        part, part_lse = attend_part(q, k[keys], v[keys], *found, *limits)
        _merge(out, lse, part.unsqueeze(0), part_lse.masked_fill(part_lse.isinf(), -torch.inf).unsqueeze(1))
    close([out[0]], [expected])
    grad, whole = torch.randn_like(q), out[0].to(q.dtype)
    grads = [attend_backward(grad, q, k[keys], v[keys], whole, lse[:, 0], *f, *limits) for keys, f, limits in parts]
    (q_own, k_own, v_own), (q_first, k_first, v_first) = grads
    ours = (q_own + q_first, torch.cat((k_first, k_own)), torch.cat((v_first, v_own)))
    close(ours, torch.autograd.grad(expected, exact, grad.double()))


def test_queries_without_keys_have_an_infinite_logarithm() -> None:
    q, k = random(64, 4, 64), random(64, 4, 64)
    offsets = torch.tensor([0, 64, 64], dtype=torch.int32, device="cuda"), torch.tensor([0, 0, 64]).int().cuda()
    out, lse = attend_part(q, k, k, *Documents(*offsets, 64, 64), -1, -1)
    assert bool(lse.isinf().all()) and not bool(out.any())
