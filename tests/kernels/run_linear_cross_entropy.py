"""Linear + cross-entropy by Triton, against float64. `test_linear_cross_entropy.py` runs this file."""

from __future__ import annotations

import pytest
import torch
from exactness import DEVICE, DTYPES, assert_as_exact_as_eager
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from titanlite_kernels import linear_cross_entropy as module
from titanlite_kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from torch import Tensor

few = settings(max_examples=5, deadline=None, derandomize=True, database=None, phases=(Phase.generate,))


@pytest.fixture(autouse=True, scope="module")
def _small_blocks() -> object:
    """Several blocks a row, without the interpreter's hours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 128)
        yield


def logits_and_labels(rows: int, columns: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    logits = (torch.randn(rows, columns, device=DEVICE) * scale).to(dtype)
    return logits, torch.randint(0, columns, (rows,), device=DEVICE)


@few
@given(
    dtype=st.sampled_from(DTYPES), rows=st.integers(1, 9), vocab=st.integers(1, 300), dim=st.integers(1, 20),
    chunk=st.integers(1, 9), recompute=st.booleans(), z_loss=st.sampled_from((0.0, 1e-2)),
)  # fmt: skip
def test_the_loss_and_its_gradients(
    dtype: torch.dtype, rows: int, vocab: int, dim: int, chunk: int, recompute: bool, z_loss: float
) -> None:
    # Logits of about 1: beside a probability of nearly 1, what eager loses of its gradient is luck.
    hidden, weight = (
        (torch.randn(n, dim, device=DEVICE) / dim**0.25).to(dtype).requires_grad_() for n in (rows, vocab)
    )
    labels = torch.randint(0, vocab, (rows,), device=DEVICE)
    labels[::3] = -100
    token_weights = torch.rand(rows, device=DEVICE)

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(
            hidden, weight, labels, token_weights, z_loss=z_loss, recompute=recompute, chunk=chunk,
            backend="triton", wide_products=False,
        )  # fmt: skip

    def reference(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy_reference(hidden, weight, labels, token_weights, z_loss=z_loss)

    assert_as_exact_as_eager(ours, reference, [hidden, weight])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given_statistics", [False, True])
def test_a_chunk_becomes_its_gradient_within_its_rounding(dtype: torch.dtype, given_statistics: bool) -> None:
    logits, labels = logits_and_labels(3, 300, dtype)
    scale = torch.tensor([1.0, 0.0, 0.3], device=DEVICE)
    exact, logits_top = logits.double().requires_grad_(), logits.amax(1)
    lse, target = exact.logsumexp(1), exact.gather(1, labels.unsqueeze(1)).squeeze(1)
    (scale * (lse - target + 1e-3 * lse.square())).sum().backward()
    if given_statistics:
        found = module.statistics_op(logits, labels, 0)
        module.gradient_op(logits, labels, found, scale, 0, 1e-3)
    else:
        found = module.statistics_and_gradient_op(logits, labels, scale, 0, 1e-3)
    top = logits_top.double()
    expected = torch.stack((top, lse - top, target)).detach()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.double(), exact.grad, rtol=max(eps, 1e-5), atol=1e-7)


def test_a_part_of_the_vocabulary() -> None:
    logits, labels = logits_and_labels(4, 300, torch.float32)
    whole = module.statistics_op(logits, labels, 0)
    parts = torch.stack(
        [module.statistics_op(logits[:, :77].contiguous(), labels, 0), module.statistics_op(logits[:, 77:], labels, 77)]
    )
    lse = parts[:, :2].sum(1).logsumexp(0)
    torch.testing.assert_close(lse, whole[0] + whole[1])
    assert torch.equal(parts[:, 2].amax(0), whole[2]), "the rank that has the label knows its logit"


def test_rows_may_lie_apart_and_what_lies_between_them_stays() -> None:
    wide, labels = logits_and_labels(3, 400, torch.bfloat16)
    before, part = wide.clone(), wide[:, 8:265]
    labels %= part.shape[1]
    alone = part.contiguous()
    scale = torch.ones(3, device=DEVICE)
    module.statistics_and_gradient_op(alone, labels, scale, 0, 0.0)
    module.statistics_and_gradient_op(part, labels, scale, 0, 0.0)
    assert torch.equal(part, alone)
    assert torch.equal(wide[:, :8], before[:, :8]) and torch.equal(wide[:, 265:], before[:, 265:])


@pytest.mark.parametrize("value", [0.0, 1e4, -1e30, float("-inf"), float("inf"), float("nan")])
def test_extreme_logits_give_what_the_reference_gives(value: float) -> None:
    logits, labels = logits_and_labels(3, 300, torch.float32)
    logits[1, :200] = value
    labels[1] = 250
    scale = torch.ones(3, device=DEVICE)
    expected = logits.clone()
    statistics = module._statistics_and_gradient(expected, labels, scale, 0, 1e-4, triton=False)
    found = module.statistics_and_gradient_op(logits, labels, scale, 0, 1e-4)
    # Of a row with NaN, the largest logit may be another; its sum of exponentials is not.
    for ours, reference in ((found[1:], statistics[1:]), (logits, expected)):
        # A logit of +inf makes no number or an infinite one, both of which are seen.
        finite = reference.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        torch.testing.assert_close(ours[finite], reference[finite], rtol=1e-5, atol=1e-7)


def test_a_token_that_does_not_count_has_no_gradient_whatever_its_logits() -> None:
    logits, labels = logits_and_labels(2, 300, torch.bfloat16)
    logits[1] = float("nan")
    scale = torch.tensor([1.0, 0.0], device=DEVICE)
    module.statistics_and_gradient_op(logits, labels, scale, 0, 0.0)
    assert logits[0].isfinite().all() and not logits[1].any()
