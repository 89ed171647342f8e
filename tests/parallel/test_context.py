"""How sequences are cut, which rank computes what, and the kernels that attention over several ranks is made of."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from titanlite.models.layers import CausalAttention
from titanlite.models.llama import DocumentMask
from titanlite.models.spec import ShardingRule
from titanlite.parallel import context
from titanlite.parallel.context import _attend_to_the_last, apply_context_parallel, local_sequences
from titanlite.parallel.model import Batch

RANKS = st.integers(2, 7)
CHUNK = st.integers(1, 4)


def batch_of(tokens: Tensor, positions: Tensor | None = None, documents: Tensor | None = None) -> Batch:
    return Batch(tokens, tokens + 1, positions, documents, (0,), 0, 1, tokens.numel())


@settings(deadline=None)
@given(RANKS, CHUNK, st.integers(1, 3), st.integers(1, 3))
def test_the_parts_tile_every_sequence(ranks: int, chunk: int, microbatches: int, microbatch: int) -> None:
    length = 2 * ranks * chunk
    tokens = torch.arange(microbatches * microbatch * length).view(microbatches, microbatch, length)
    whole = batch_of(tokens)
    parts = [local_sequences(whole, ranks, rank) for rank in range(ranks)]
    assert torch.cat([part.tokens for part in parts], -1).sort(-1).values.equal(tokens)
    for part in parts:
        assert part.positions is not None and part.positions.shape == part.tokens.shape == (
            *tokens.shape[:2],
            2 * chunk,
        )
        assert tokens.gather(-1, part.positions).equal(part.tokens)
        assert part.labels.equal(part.tokens + 1)
        assert part.documents is None and part.valid_tokens == whole.valid_tokens
    pairs = {int((part.positions[0, 0] + 1).sum()) for part in parts if part.positions is not None}
    assert len(pairs) == 1, "every rank's queries see as many keys"
    for rank in range(ranks):
        part = local_sequences(batch_of(tokens, tokens * 3, tokens * 5), ranks, rank)
        assert part.positions is not None and part.positions.equal(part.tokens * 3)
        assert part.documents is not None and part.documents.equal(part.tokens * 5)


@given(RANKS, CHUNK)
def test_a_ring_forms_every_pair_once(ranks: int, chunk: int) -> None:
    tokens = torch.arange(2 * ranks * chunk).view(1, 1, -1)
    places = [local_sequences(batch_of(tokens), ranks, rank).tokens.flatten() for rank in range(ranks)]
    times = torch.zeros(tokens.numel(), tokens.numel(), dtype=torch.int64)
    for rank in range(ranks):
        for owner in range(ranks):
            here, there = context.visible(rank, owner, 2 * chunk)
            queries, keys = places[rank][here], places[owner][there]
            seen = torch.ones(len(queries), len(keys), dtype=torch.int64)
            times[queries.unsqueeze(1), keys] += seen.tril() if owner == rank else seen
    assert times.equal(torch.ones_like(times).tril())


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("queries", [3, 8])
def test_queries_at_the_end_of_the_keys(queries: int, heads: int, kv_heads: int) -> None:
    """Against the last rows of the whole square."""
    q, k, v = random(2, 8, heads, 4), random(2, 8, kv_heads, 4), random(2, 8, kv_heads, 4)
    whole = CausalAttention()(q, k, v, None, True)
    torch.testing.assert_close(_attend_to_the_last(q[:, -queries:], k, v), whole[:, -queries:], rtol=1e-12, atol=1e-12)


def by_autograd(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)


@pytest.mark.parametrize("rows", [2, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("case", ["full", "causal", "documents", "causal documents"])
def test_a_block_and_its_gradients(
    case: str, kernel: bool, heads: int, kv_heads: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "_ROWS", rows)
    if not kernel:
        monkeypatch.setattr(context, "_has_kernel", lambda q, mask: False)
    causal = case.startswith("causal")
    q, grad = random(2, heads, 5, 8), random(2, heads, 5, 8)
    k, v = random(2, kv_heads, 5 if causal else 7, 8), random(2, kv_heads, 5 if causal else 7, 8)
    mask = torch.rand(2, 1, 5, k.shape[2]) < 0.6 if "documents" in case else None
    if mask is not None:
        mask[..., :, 0] = True  # a query that sees nothing has no softmax
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    seen = mask.tril() if mask is not None and causal else mask
    expected = by_autograd(*inputs, seen, causal and mask is None)
    out, lse = context.attend(q, k, v, causal, mask)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grads = context.attend_backward(grad, q, k, v, out, lse, causal, mask)
    for found, correct in zip(grads, torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(found, correct, rtol=1e-12, atol=1e-12)


def test_parts_merge_to_the_whole_where_a_query_sees_nothing_of_one() -> None:
    q, k, v = random(2, 4, 5, 8), random(2, 4, 6, 8), random(2, 4, 6, 8)
    mask = torch.ones(2, 1, 5, 6, dtype=torch.bool)
    mask[:, :, 3, 3:] = False
    out, lse = context.attend(q, k[:, :, :3], v[:, :, :3], False, mask[..., :3])
    context._merge(out, lse, *context.attend(q, k[:, :, 3:], v[:, :, 3:], False, mask[..., 3:]))
    torch.testing.assert_close(out, by_autograd(q, k, v, mask, False), rtol=1e-12, atol=1e-12)


def test_cuda_kernels_give_the_shapes_that_are_counted_on() -> None:
    with FakeTensorMode():
        q = torch.empty(2, 64, 8, 16, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        k = torch.empty(2, 128, 2, 16, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        assert context.takes_flash(q) and not context.takes_flash(torch.empty(2, 8, 64, 16, device="cuda"))
        out, lse = context.attend(q, k, k, False, None)
        assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
        grads = context.attend_backward(out, q, k, k, out, lse, False, None)
        assert [grad.shape for grad in grads] == [q.shape, k.shape, k.shape]


@pytest.fixture
def eight_ranks_of_which_this_is_the_third() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=8)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


class Communicated(TorchDispatchMode):
    """Bytes that this rank sends, by collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func._opname
        if func.namespace == "_c10d_functional" and name != "wait_tensor":
            self.sent.setdefault(name, []).append(args[0].numel() * args[0].element_size())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("method", ["all-gather", "ring"])
def test_what_is_sent(method: str, documents: bool, eight_ranks_of_which_this_is_the_third: dist.ProcessGroup) -> None:
    """In a dry run, with neither memory nor other ranks: keys and values once, their gradients once; nothing of the
    queries. A ring sends its own 7 times, and gradients 8 times, as the last goes home.
    """
    group, plan = eight_ranks_of_which_this_is_the_third, (ShardingRule("0", "attention"), ShardingRule("1", "mask"))
    model = torch.nn.Sequential(CausalAttention(), DocumentMask())
    apply_context_parallel(model, plan, group, method)  # type: ignore[arg-type]
    with FakeTensorMode(), Communicated() as communicated:
        q = torch.empty(2, 32, 6, 16, requires_grad=True)
        k, v = (torch.empty(2, 32, 3, 16, requires_grad=True) for _ in range(2))
        mask = model[1](torch.zeros(2, 32, dtype=torch.int64)) if documents else None
        model[0](q, k, v, mask, not documents).sum().backward()
        assert k.grad is not None and k.grad.shape == k.shape
    own, sent = 2 * k.numel() * 4, communicated.sent
    numbers = [2 * 32 * 8] if documents else []
    if method == "ring":
        assert sent.pop("all_gather_into_tensor", []) == numbers
        assert sent == {"all_to_all_single": [own] * (7 + 7 + 8)}
    else:
        assert sent == {"all_gather_into_tensor": [*numbers, own], "reduce_scatter_tensor": [8 * own]}
