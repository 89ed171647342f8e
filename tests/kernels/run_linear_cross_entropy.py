"""Linear + cross-entropy by Triton, against float64. `test_linear_cross_entropy.py` runs this file."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support.exactness import DEVICE, DTYPES, Errors, results
from titanlite_kernels import linear_cross_entropy as module
from titanlite_kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from torch import Tensor


@pytest.fixture(autouse=True, scope="module")
def _small_blocks() -> object:
    """Several blocks a row, without the interpreter's hours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 128)
        yield


def logits_and_labels(rows: int, columns: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    logits = (torch.randn(rows, columns, device=DEVICE) * scale).to(dtype)
    return logits, torch.randint(0, columns, (rows,), device=DEVICE)


SIZES = ((1, 3, 1, 1), (4, 300, 20, 3), (12, 140, 128, 5))  # tokens, vocabulary, width, and tokens at a time


@pytest.mark.parametrize(
    ("dtype", "recompute"), [*((dtype, False) for dtype in DTYPES), (torch.bfloat16, True), (torch.float32, True)]
)
def test_as_exact_as_the_format_allows(dtype: torch.dtype, recompute: bool) -> None:
    errors = Errors()
    for (rows, vocab, dim, chunk), z_loss in zip(SIZES, (0.0, 1e-2, 1e-3), strict=True):
        # Few digits, so that logits in float32 are exact in any order of summation; and gradients by a power of two,
        # which both sides round alike: of few tokens, the errors of products are luck, and of kernels' they are not.
        # Many tokens, and any numbers, are in `test_linear_cross_entropy.py`.
        hidden, weight = ((4 * torch.randn(n, dim, device=DEVICE)).round().to(dtype) / 16 for n in (rows, vocab))
        labels, token_weights = torch.randint(0, vocab, (rows,), device=DEVICE), torch.rand(rows, device=DEVICE)
        labels[1::3] = -100
        ours = partial(
            linear_cross_entropy, recompute=recompute, chunk=chunk, backend="triton", wide_products=False,
            labels=labels, token_weights=token_weights, z_loss=z_loss,
        )  # fmt: skip
        eager = partial(linear_cross_entropy_reference, labels=labels, token_weights=token_weights, z_loss=z_loss)
        errors.add(ours, eager, [hidden.requires_grad_(), weight.requires_grad_()], gradient=0.25)
    errors.assert_ideal_but_for_sums(max(map(max, SIZES)))


@pytest.mark.parametrize("recompute", [False, True])
def test_arguments_need_not_be_contiguous(recompute: bool) -> None:
    hidden, weight = torch.randn(6, 40, device=DEVICE), torch.randn(40, 50, device=DEVICE)
    labels = torch.randint(0, 50, (2, 6), device=DEVICE)[:, ::2]
    views = [hidden[:, ::2].reshape(3, 2, 20).transpose(0, 1), weight[::2].t()]
    assert not any(view.is_contiguous() for view in views)
    ours = partial(linear_cross_entropy, labels=labels, chunk=5, backend="triton", recompute=recompute)
    ones = [torch.ones((), device=DEVICE)]
    found = results(ours, [view.detach().requires_grad_() for view in views], ones)
    same = results(ours, [view.contiguous().requires_grad_() for view in views], ones)
    torch.testing.assert_close(found, same, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e4, float("inf"), float("nan")])
@pytest.mark.parametrize("recompute", [False, True])
def test_extreme_hidden_states_give_what_the_reference_gives(value: float, recompute: bool) -> None:
    """A token of zeros, of logits far apart, and one that is no number: its loss and all it touches are none either."""
    hidden, weight = torch.randn(3, 20, device=DEVICE), torch.randn(140, 20, device=DEVICE)
    hidden[1] = value * hidden[1].sign()
    arguments = [hidden.requires_grad_(), weight.requires_grad_()]
    labels, ones = torch.randint(0, 140, (3,), device=DEVICE), [torch.ones((), device=DEVICE)]
    ours = partial(linear_cross_entropy, labels=labels, chunk=2, backend="triton", recompute=recompute)
    found = results(ours, arguments, ones)
    expected = results(partial(linear_cross_entropy_reference, labels=labels), arguments, ones)
    for our, other in zip(found, expected, strict=True):
        finite = other.isfinite()
        assert torch.equal(our.isfinite(), finite)
        torch.testing.assert_close(our[finite], other[finite], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given_statistics", [False, True])
def test_a_chunk_becomes_its_gradient_within_its_rounding(dtype: torch.dtype, given_statistics: bool) -> None:
    logits, labels = logits_and_labels(3, 300, dtype)
    scale = torch.tensor([1.0, 0.0, 0.3], device=DEVICE)
    exact, logits_top = logits.double().requires_grad_(), logits.amax(1)
    lse, target = exact.logsumexp(1), exact.gather(1, labels.unsqueeze(1)).squeeze(1)
    (scale * (lse - target + 1e-3 * lse.square())).sum().backward()
    if given_statistics:
        found = module.statistics_op(logits, labels, None, 0, 0.0)
        module.gradient_op(logits, labels, found, scale, 0, 1e-3)
    else:
        found = module.statistics_op(logits, labels, scale, 0, 1e-3)
    top = logits_top.double()
    expected = torch.stack((top, lse - top, target)).detach()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.double(), exact.grad, rtol=max(eps, 1e-5), atol=1e-7)


def test_a_part_of_the_vocabulary() -> None:
    logits, labels = logits_and_labels(4, 300, torch.float32)
    whole = module.statistics_op(logits, labels, None, 0, 0.0)
    parts = torch.stack(
        [
            module.statistics_op(logits[:, :77].contiguous(), labels, None, 0, 0.0),
            module.statistics_op(logits[:, 77:], labels, None, 77, 0.0),
        ]
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
    module.statistics_op(alone, labels, scale, 0, 0.0)
    module.statistics_op(part, labels, scale, 0, 0.0)
    assert torch.equal(part, alone)
    assert torch.equal(wide[:, :8], before[:, :8]) and torch.equal(wide[:, 265:], before[:, 265:])


@pytest.mark.parametrize("value", [0.0, 1e4, -1e30, float("-inf"), float("inf"), float("nan")])
def test_extreme_logits_give_what_the_reference_gives(value: float) -> None:
    logits, labels = logits_and_labels(3, 300, torch.float32)
    logits[1, :200] = value
    labels[1] = 250
    scale = torch.ones(3, device=DEVICE)
    expected = logits.clone()
    statistics = module._statistics(expected, labels, 0, False, scale, 1e-4)
    found = module.statistics_op(logits, labels, scale, 0, 1e-4)
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
    module.statistics_op(logits, labels, scale, 0, 0.0)
    assert logits[0].isfinite().all() and not logits[1].any()
