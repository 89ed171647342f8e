"""Linear + cross-entropy by chunks in plain torch: right in float64, and as lean as it says; its kernels' tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import vocabulary_ranks
from support.exactness import DTYPES, Errors
from support.pool import Pool
from titanlite_kernels import linear_cross_entropy as module
from titanlite_kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    tokens_at_a_time,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from titanlite.dryrun.memory import MemoryTrace

Loss = Callable[..., Tensor]
WAYS = pytest.mark.parametrize("recompute", [False, True])
few = settings(max_examples=15, deadline=None, derandomize=True, database=None)


def arguments(rows: int, vocab: int, dim: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(rows, dim, dtype=dtype), torch.randn(vocab, dim, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, vocab, (rows,))


def with_gradients(loss: Loss, hidden: Tensor, weight: Tensor, *rest: Any, **keys: Any) -> list[Tensor]:
    """The loss, and the gradients of a third of it."""
    value = loss(hidden, weight, *rest, **keys)
    return [value.detach(), *torch.autograd.grad(value / 3, (hidden, weight))]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_kernels(run_on_device: Callable[[str], None]) -> None:
    run_on_device("run_linear_cross_entropy.py")


@few
@given(
    rows=st.integers(1, 40), vocab=st.integers(1, 70), dim=st.integers(1, 9), chunk=st.integers(1, 50),
    recompute=st.booleans(), weighted=st.booleans(), ignored=st.integers(0, 5),
    z_loss=st.sampled_from((0.0, 1e-2)),
)  # fmt: skip
def test_loss_and_gradients_are_those_of_all_logits(
    rows: int, vocab: int, dim: int, chunk: int, recompute: bool, weighted: bool, ignored: int, z_loss: float
) -> None:
    hidden, weight, labels = arguments(rows, vocab, dim)
    labels[torch.randperm(rows)[:ignored]] = -1
    weights = torch.rand(rows, dtype=torch.float64) if weighted else None
    keys = {"ignore_index": -1, "z_loss": z_loss}
    expected = with_gradients(linear_cross_entropy_reference, hidden, weight, labels, weights, **keys)
    ours = with_gradients(
        linear_cross_entropy, hidden, weight, labels, weights, **keys, chunk=chunk, recompute=recompute
    )
    assert_same(ours, expected)


@WAYS
@pytest.mark.parametrize("wide_products", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_exact_as_the_format_allows(dtype: torch.dtype, wide_products: bool, recompute: bool) -> None:
    errors = Errors()
    sizes = ((1, 3, 1, 1), (30, 50, 24, 7), (200, 50, 24, 8), (128, 640, 16, 16), (90, 257, 64, 300))
    for rows, vocab, dim, chunk in 4 * sizes:
        ours = partial(linear_cross_entropy, chunk=chunk, wide_products=wide_products, recompute=recompute)
        for weight_dtype in {dtype, torch.float32}:
            hidden, weight = ((torch.randn(n, dim) / dim**0.25).to(dtype) for n in (rows, vocab))
            weight = weight.to(weight_dtype)
            labels = torch.randint(0, vocab, (rows,))
            eager = partial(linear_cross_entropy_reference, labels=labels)
            leaves = [hidden.requires_grad_(), weight.requires_grad_()]
            once = wide_products and dtype != torch.float32  # whose products are sums that round
            errors.add(partial(ours, labels=labels), eager, leaves, once=once)
    errors.assert_ideal_but_for_sums(640)


@WAYS
def test_any_layout_in_memory(recompute: bool) -> None:
    hidden, weight, labels = arguments(12, 20, 12)
    views = hidden[:, ::2].reshape(3, 4, 6).transpose(0, 1), weight[:, 6:], labels.view(3, 4).t()
    expected = linear_cross_entropy_reference(*views)
    ours = linear_cross_entropy(*views, chunk=5, recompute=recompute)
    assert_same(
        [ours, *torch.autograd.grad(ours, (hidden, weight))],
        [expected, *torch.autograd.grad(expected, (hidden, weight))],
    )


@WAYS
def test_what_does_not_count(recompute: bool) -> None:
    """Padding, whatever it holds; and nothing at all."""
    hidden, weight, labels = arguments(6, 20, 4)
    labels[2:4] = -100
    keys = {"chunk": 2, "recompute": recompute}
    loss = linear_cross_entropy(hidden, weight, labels, **keys)
    spoilt = hidden.detach().clone()
    spoilt[2], spoilt[3] = float("nan"), float("inf")
    spoilt.requires_grad_()
    same, grad, _ = with_gradients(linear_cross_entropy, spoilt, weight, labels, **keys)
    assert torch.equal(same, loss) and grad[[0, 1, 4, 5]].all() and not grad[2:4].any()
    for none in (torch.full((6,), -100), torch.full((0,), 5)):
        found = with_gradients(linear_cross_entropy, hidden[: len(none)], weight, none, **keys)
        assert not any(each.any() for each in found)


@pytest.mark.parametrize("hidden_value", [0.0, 1e4])
@WAYS
def test_extreme_values(hidden_value: float, recompute: bool) -> None:
    """Issue 14, item 0. At 1e4 the last place of a logit is 2^-10, and each token's largest logit is so far above its
    others that its probability is 1 in float32, however that place was rounded: gradients are sums of 20 or 50 numbers.
    """
    hidden, weight, labels = arguments(20, 50, 3, torch.float32)
    with torch.no_grad():
        hidden *= hidden_value
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = with_gradients(linear_cross_entropy_reference, *exact, labels)
    first, second = (exact[0] @ exact[1].t()).topk(2).values.unbind(1)
    assert (first - second > 20).all() or hidden_value == 0
    found = with_gradients(linear_cross_entropy, hidden, weight, labels, chunk=7, recompute=recompute)
    for ours, true in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=2**-20, atol=50 * 2**-24 * true.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_formed_twice_are_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 14, item 0: or a token's probabilities would not add up to 1, by the last place of its largest logit."""
    formed: dict[str, list[Tensor]] = {"_statistics": [], "_gradient": []}
    for name, logits in formed.items():
        given = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *rest, given=given, logits=logits: (logits.append(rest[0].clone()), given(*rest))[1]
        )
    with_gradients(linear_cross_entropy, *arguments(70, 300, 40, dtype), chunk=16, recompute=True)
    first, second = formed.values()
    assert len(first) == len(second) > 3
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@WAYS
def test_what_is_wrong_is_seen(recompute: bool) -> None:
    hidden, weight, labels = arguments(6, 20, 4)
    keys = {"chunk": 2, "recompute": recompute}
    for wrong in (20, -1):
        labels[3] = wrong
        assert linear_cross_entropy(hidden, weight, labels, **keys) == float("inf")
    labels[3] = 0
    with torch.no_grad():
        hidden[3] = float("nan")
    assert all(found.isnan().any() for found in with_gradients(linear_cross_entropy, hidden, weight, labels, **keys))
    with pytest.raises(ValueError, match=r"hidden \(6, 4\), weight \(20, 3\), labels \(6,\) do not fit"):
        linear_cross_entropy(hidden, weight[:, :3], labels)
    with pytest.raises(ValueError, match="float64"):
        linear_cross_entropy(hidden, weight, labels, backend="triton")


class Tied(nn.Module):
    """An embedding that is the head too."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(30, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
        self.loss = loss

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.table[tokens].sin(), self.table, labels)


@WAYS
@pytest.mark.parametrize("how", ["plain", "checkpointed", "both"])
def test_a_tied_weight_compiled_and_checkpointed(how: str, recompute: bool) -> None:
    tokens, labels = torch.randint(0, 30, (2, 9)), torch.randint(0, 30, (2, 9))

    def gradient(loss: Loss, how: str) -> list[Tensor]:
        model = Tied(loss)
        run: Loss = model
        if how != "plain":
            run = lambda *inputs: checkpoint(model, *inputs, use_reentrant=False)  # noqa: E731
        if how == "both":
            run = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=False)
        value = run(tokens, labels)
        (value / 3).backward()
        return [value.detach(), model.table.grad]

    ours = gradient(partial(linear_cross_entropy, chunk=5, recompute=recompute), how)
    assert_same(ours, gradient(linear_cross_entropy_reference, "plain"))


@WAYS
def test_operations_are_those_of_the_contract(recompute: bool) -> None:
    """6 n dim vocab, or 8 with logits formed twice; 2 without gradients, and none for what is frozen."""
    hidden, weight, labels = arguments(24, 32, 4)
    product = 2 * 24 * 32 * 4

    def in_place(total: Any, a: tuple[int, int], b: tuple[int, int], **rest: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    def operations(hidden: Tensor, weight: Tensor) -> int:
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
            loss = linear_cross_entropy(hidden, weight, labels, chunk=10, recompute=recompute)
            if loss.requires_grad:
                loss.backward()
        return counter.get_total_flops()

    assert operations(hidden, weight) == (4 if recompute else 3) * product
    assert operations(hidden, weight.detach()) == operations(hidden.detach(), weight) == (2 + recompute) * product
    with torch.no_grad():
        assert operations(hidden, weight) == product


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_may_come_twice(dtype: torch.dtype, recompute: bool) -> None:
    """As pipeline schedules ask that compute the gradients of inputs and of weights apart; not after the last."""
    hidden, weight, labels = arguments(9, 12, 4, dtype)
    loss = linear_cross_entropy(hidden, weight, labels, recompute=recompute)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    kept = [each.clone() for each in first]
    last = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, last, kept, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("rows", [1, 3, 8, 13])
def test_a_gradient_is_narrowed_where_it_lies(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 4)
    wide = torch.randn(rows, 5)
    expected, address = (wide * 0.3).bfloat16(), wide.data_ptr()
    found = module._scale(wide, torch.tensor(0.3), torch.bfloat16, in_place=True)
    assert torch.equal(found, expected) and found.is_contiguous() and found.data_ptr() == address


@WAYS
def test_ranks_that_share_the_vocabulary(pool: Pool, recompute: bool) -> None:
    """Each has the whole loss, a summand of the hidden states' gradient, and its rows of the weight's."""
    hidden, weight, labels = vocabulary_ranks.arguments()
    expected = with_gradients(linear_cross_entropy_reference, hidden, weight, labels, z_loss=1e-2)
    ranks = pool.run(vocabulary_ranks.loss_and_gradients, 3, recompute)
    for loss, _, _ in ranks:
        assert_same([loss], expected[:1])
    assert_same([sum(grad for _, grad, _ in ranks) / 3, torch.cat([grad for _, _, grad in ranks]) / 3], expected[1:])


class _Shown(TorchDispatchMode):
    """Shows a trace each operation."""

    def __init__(self, trace: MemoryTrace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_dispatch__(self, operation: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        # Torch 2.11 cannot do this one on tensors without memory.
        wider = operation is torch.ops.aten.addmm.dtype_out
        result = named["out"] if wider else operation(*given, **(named or {}))
        self._trace.record(operation, given, named or {}, result)
        return result


def all_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As plainly as it can be written: nothing beside the logits in the compute dtype and in float32."""
    return F.cross_entropy(F.linear(hidden, weight.to(hidden.dtype)).float(), labels, reduction="sum")


def peak_bytes(loss: Loss, rows: int, vocab: int, dim: int, weight_dtype: torch.dtype) -> tuple[int, int]:
    """What a forward and a backward pass hold at most beside their arguments, on tensors without memory; those."""
    hidden = torch.empty(rows, dim, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(vocab, dim, dtype=weight_dtype, device="meta", requires_grad=True)
    labels = torch.empty(rows, dtype=torch.int64, device="meta")
    trace = MemoryTrace()
    for tensor in (hidden, weight, labels):
        trace.mark(tensor, "other")
    before, trace.phase = hidden.nbytes + weight.nbytes + labels.nbytes, "passes"
    with trace.watch_sizes(), _Shown(trace):
        (loss(hidden, weight, labels) / 3).backward()
    return trace.summarize().peak.total - before, before


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_memory_at_the_sizes_of_llama_3(backend: str, weight_dtype: torch.dtype) -> None:
    """16,384 tokens, 1,536 at a time, 128,256 of them known, 4,096 wide: under 15 % of what all logits at once take.

    Ours holds the weight's gradient in float32, which becomes the one in the weight's dtype where it lies, that of the
    hidden states, and a chunk of logits; recomputing, the gradients in the weight's dtype and a chunk. A weight in
    float32 is rounded for the products, on both sides.
    """
    sizes = 16_384, 128_256, 4_096, weight_dtype
    everything, arguments = peak_bytes(all_logits, *sizes)
    assert everything >= 3 * 4 * sizes[0] * sizes[1], "log-softmax, its gradient and that of the logits, in float32"
    ours = partial(linear_cross_entropy, backend=backend, chunk=1536)
    held, _ = peak_bytes(ours, *sizes)
    recomputed, _ = peak_bytes(partial(ours, recompute=True), *sizes)
    in_all = [(peak + arguments) / (everything + arguments) for peak in (held, recomputed)]
    if weight_dtype == torch.float32:
        assert held < 0.16 * everything and recomputed < 0.16 * everything
        return
    assert held < 0.15 * everything and recomputed < 0.08 * everything
    if backend == "triton":
        assert in_all[0] < 0.15 and in_all[1] < 0.125, "with the arguments, which both have to have"


@pytest.mark.parametrize(
    ("gigabytes", "tokens"),
    [(8, 512), (16, 512), (24, 1024), (40, 2048), (80, 4096), (141, 4096), (192, 8192), (999, 8192)],
)
def test_a_chunk_follows_the_memory(gigabytes: int, tokens: int) -> None:
    assert tokens_at_a_time("cuda", gigabytes * 10**9) == tokens
    assert tokens_at_a_time("cpu", gigabytes * 10**9) == 512
    assert tokens_at_a_time("cuda", 84_974_239_744) == 4096, "what CUDA says that an H100 of 80 GB has, 79.1 GiB"
