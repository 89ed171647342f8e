"""How sequences are cut, which rank computes what, and the kernels that attention over several ranks is made of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from titanlite.models.layers import CausalAttention
from titanlite.models.spec import ShardingRule
from titanlite.parallel.context import LocalSequences, apply_context_parallel, pairs
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
    parts = [LocalSequences(ranks, rank)(whole) for rank in range(ranks)]
    assert torch.cat([part.tokens for part in parts], -1).sort(-1).values.equal(tokens)
    for part in parts:
        assert part.positions is not None and part.tokens.shape == (*tokens.shape[:2], *part.positions.shape)
        assert tokens[..., part.positions].equal(part.tokens)
        assert part.labels.equal(part.tokens + 1)
        assert part.documents is None and part.valid_tokens == whole.valid_tokens
    pairs = {int((part.positions + 1).sum()) for part in parts if part.positions is not None}
    assert len(pairs) == 1, "every rank's queries see as many keys"
    for rank in range(ranks):
        documents = torch.tensor([[0, length]] * microbatches, dtype=torch.int32)
        part = LocalSequences(ranks, rank)(batch_of(tokens, tokens * 3, documents))
        assert part.positions is not None and part.positions.equal(part.tokens * 3)
        assert part.documents is documents, "those of whole sequences"


@settings(deadline=None)
@given(RANKS, CHUNK, st.integers(0, 12))
def test_a_ring_forms_every_pair_once(ranks: int, chunk: int, window: int) -> None:
    """Each query with each key that it sees, by the geometry of `varlen.attend`: the last of both side by side."""
    length = 2 * ranks * chunk
    tokens = torch.arange(length).view(1, 1, -1)
    places = [LocalSequences(ranks, rank)(batch_of(tokens)).tokens.flatten() for rank in range(ranks)]
    times = torch.zeros(length, length, dtype=torch.int64)
    for rank, owner in itertools.product(range(ranks), repeat=2):
        for number, pair in enumerate(pairs(rank, owner, ranks, chunk, window)):
            queries, keys = places[rank][pair.queries], places[owner][pair.keys]
            assert (int(queries[0]), int(queries[0] - keys[0])) == (pair.place, pair.distance)
            assert pair.distance == 0 or owner != rank or number > 0, "a query's own chunk first"
            left, right = (len(keys) if limit < 0 else limit for limit in pair.window)
            off = torch.arange(len(keys)) - torch.arange(len(queries)).unsqueeze(1) - (len(keys) - len(queries))
            times[queries.unsqueeze(1), keys] += ((off >= -left) & (off <= right)).long()
    seen = torch.ones_like(times).tril()
    assert times.equal(seen.triu(1 - window) if window else seen)


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
    group, plan = eight_ranks_of_which_this_is_the_third, (ShardingRule("0", "attention"),)
    model = torch.nn.Sequential(CausalAttention())
    apply_context_parallel(model, plan, group, method)  # type: ignore[arg-type]
    with FakeTensorMode(), Communicated() as communicated:
        q = torch.empty(2, 32, 6, 16, requires_grad=True)
        k, v = (torch.empty(2, 32, 3, 16, requires_grad=True) for _ in range(2))
        offsets = torch.zeros(9, dtype=torch.int32) if documents else None
        model[0](q, k, v, offsets).sum().backward()
        assert k.grad is not None and k.grad.shape == k.shape
    own, sent = 2 * k.numel() * 4, communicated.sent
    if method == "ring":
        assert sent == {"all_to_all_single": [own] * (7 + 7 + 8)}
    else:
        assert sent == {"all_gather_into_tensor": [own], "reduce_scatter_tensor": [8 * own]}
