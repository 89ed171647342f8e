"""RMSNorm, rotary embedding and SwiGLU as kernels, against float64. `test_norms.py` runs this file."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.exactness import DEVICE, DTYPES, Operation, assert_nearest, results
from titanlite_kernels import optional_triton, rms_norm, rope, swiglu
from titanlite_kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm_reference
from titanlite_kernels.rope import rope_reference
from titanlite_kernels.swiglu import swiglu_reference
from torch import Tensor
from torch.utils.checkpoint import checkpoint

few = settings(max_examples=4, deadline=None, derandomize=True, database=None)
dtypes = st.sampled_from(DTYPES)


def leaf(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype).requires_grad_()


def angles(batch: int, seq: int, head_dim: int) -> tuple[Tensor, Tensor]:
    half = torch.randn(batch, seq, 1, head_dim // 2, device=DEVICE)
    doubled = torch.cat((half, half), dim=-1)
    return doubled.cos(), doubled.sin()


def norm_arguments(dtype: torch.dtype, *shape: int, residual: bool = False) -> list[object]:
    """With a weight in float32 that is one of `dtype` already: its rounding is no error of the operation's."""
    inputs = [leaf(*shape, dtype=dtype) for _ in range(2 if residual else 1)]
    weight = leaf(shape[-1], dtype=dtype).detach().float().requires_grad_()
    # Of a row of one value, without a share of eps in its norm, no gradient is left but roundings.
    return [*inputs, weight, 1e-5 if shape[-1] > 1 else 0.5]


def exact_add_rms_norm(dtype: torch.dtype) -> Operation:
    """Of the sum as later layers see it, rounded; the sum itself is the exact one."""

    def exact(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        summed = x + residual
        rounded = summed + (summed.to(dtype).double() - summed).detach()
        return rms_norm_reference(rounded, weight, eps), summed

    return exact


def test_these_tests_are_of_kernels() -> None:
    assert optional_triton.serves(torch.empty(1, device=DEVICE))
    assert not optional_triton.serves(torch.empty(1, device=DEVICE, dtype=torch.float64))


@few
@given(dtype=dtypes, rows=st.integers(1, 19), dim=st.integers(1, 300))
def test_rms_norm(dtype: torch.dtype, rows: int, dim: int) -> None:
    assert_nearest(rms_norm.rms_norm, rms_norm_reference, norm_arguments(dtype, rows, dim))


@few
@given(dtype=dtypes, rows=st.integers(1, 19), dim=st.integers(1, 300))
def test_add_rms_norm(dtype: torch.dtype, rows: int, dim: int) -> None:
    arguments = norm_arguments(dtype, rows, dim, residual=True)
    assert_nearest(add_rms_norm, add_rms_norm_reference, arguments, exact_add_rms_norm(dtype))


def test_a_program_takes_many_rows_for_the_gradient_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rms_norm, "multiprocessors", lambda device: 1)  # two programs, with three or four tiles each
    rows = 7 * rms_norm._tile(1000)[1] - 1
    assert rows > 7
    assert_nearest(rms_norm.rms_norm, rms_norm_reference, norm_arguments(torch.float32, rows, 1000))
    arguments = norm_arguments(torch.bfloat16, rows, 1000, residual=True)
    assert_nearest(add_rms_norm, add_rms_norm_reference, arguments, exact_add_rms_norm(torch.bfloat16))


def test_rows_that_do_not_count_add_nothing_to_the_weights_gradient_when_eps_is_zero() -> None:
    arguments = [*norm_arguments(torch.float32, 3, 100)[:2], 0.0]
    assert_nearest(rms_norm.rms_norm, rms_norm_reference, arguments)


@few
@given(dtype=dtypes, elements=st.integers(1, 5000))
def test_swiglu(dtype: torch.dtype, elements: int) -> None:
    arguments = [leaf(elements, dtype=dtype, scale=4), leaf(elements, dtype=dtype)]
    assert_nearest(swiglu.swiglu, swiglu_reference, arguments)


@few
@given(
    dtype=dtypes,
    batch=st.integers(1, 2),
    seq=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    half=st.integers(1, 20),
    positions_differ=st.booleans(),
)
def test_rope(
    dtype: torch.dtype, batch: int, seq: int, kv_heads: int, groups: int, half: int, positions_differ: bool
) -> None:
    q = leaf(batch, seq, kv_heads * groups, 2 * half, dtype=dtype)
    k = leaf(batch, seq, kv_heads, 2 * half, dtype=dtype)
    cos, sin = angles(batch if positions_differ else 1, seq, 2 * half)
    assert_nearest(rope.rope, rope_reference, [q, k, cos, sin])


NON_CONTIGUOUS: dict[str, tuple[Operation, Operation, list[object], Operation | None]] = {
    "rms_norm": (rms_norm.rms_norm, rms_norm_reference, [leaf(40, 6).t(), leaf(80)[::2], 1e-5], None),
    "add_rms_norm": (
        add_rms_norm,
        add_rms_norm_reference,
        [leaf(4, 60)[:, :40], leaf(40, 4).t(), leaf(40), 1e-5],
        exact_add_rms_norm(torch.float32),
    ),
    "swiglu": (swiglu.swiglu, swiglu_reference, [*leaf(5, 60).chunk(2, dim=-1)], None),
    "rope, from one projection": (
        rope.rope,
        rope_reference,
        [*leaf(2, 3, 6, 8).split((4, 2), dim=2), *angles(1, 3, 8)],
        None,
    ),
    "rope, heads before positions": (
        rope.rope,
        rope_reference,
        [leaf(2, 4, 3, 8).transpose(1, 2), leaf(2, 8, 3, 2).permute(0, 2, 3, 1), *angles(2, 3, 8)],
        None,
    ),
    "rope, angles expanded": (
        rope.rope,
        rope_reference,
        [leaf(2, 3, 4, 8), leaf(2, 3, 4, 8), *(table.expand(2, -1, -1, -1) for table in angles(1, 3, 8))],
        None,
    ),
}


@pytest.mark.parametrize("name", NON_CONTIGUOUS)
def test_arguments_need_not_be_contiguous(name: str) -> None:
    operation, reference, arguments, exact = NON_CONTIGUOUS[name]
    assert not all(argument.is_contiguous() for argument in arguments if isinstance(argument, Tensor))
    assert_nearest(operation, reference, arguments, exact)


def test_gradients_need_not_be_contiguous() -> None:
    q, k, (cos, sin) = leaf(2, 2, 4, 8), leaf(2, 2, 2, 8), angles(1, 2, 8)
    gradients = [torch.randn(2, x.shape[2], 2, 8, device=DEVICE).transpose(1, 2) for x in (q, k)]
    ours = results(rope.rope, [q, k, cos, sin], gradients)
    same = results(rope.rope, [q, k, cos, sin], [gradient.contiguous() for gradient in gradients])
    assert all(torch.equal(a, b) for a, b in zip(ours, same, strict=True))


@pytest.mark.parametrize("value", [0.0, -1e18, float("inf"), float("nan")])
def test_extreme_values_give_what_the_reference_gives(value: float) -> None:
    x, y, weight = (torch.randn(3, 40, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    x[1, 7:] = value
    q, k = x.reshape(1, 3, 5, 8), y.reshape(1, 3, 5, 8)
    cases: list[tuple[Operation, Operation, list[object]]] = [
        (rms_norm.rms_norm, rms_norm_reference, [x, weight[0], 1e-5]),
        (add_rms_norm, add_rms_norm_reference, [x, y, weight[0], 1e-5]),
        (swiglu.swiglu, swiglu_reference, [x, y]),
        (rope.rope, rope_reference, [q, k, *angles(1, 3, 8)]),
    ]
    for operation, reference, arguments in cases:
        given = [
            a.detach().requires_grad_(a.dtype == torch.bfloat16) if isinstance(a, Tensor) else a for a in arguments
        ]
        ones = [torch.ones(1, device=DEVICE).expand(a.shape) for a in _outputs(reference(*given))]
        for our, other in zip(results(operation, given, ones), results(reference, given, ones), strict=True):
            torch.testing.assert_close(our, other, rtol=0.02, atol=0.02, equal_nan=True)


def _outputs(returned: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return returned if isinstance(returned, tuple) else (returned,)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, (cos, sin) = leaf(2, 3, 4, 8), angles(1, 3, 8)
    for call in (
        lambda: swiglu.swiglu(x, x[:1]),
        lambda: rms_norm.rms_norm(x, leaf(4), 1e-5),
        lambda: add_rms_norm(x, x[:1], leaf(8), 1e-5),
        lambda: rope.rope(x, x[:, :2], cos, sin),
        lambda: rope.rope(x, x, cos[:, :2], sin),
    ):
        with pytest.raises(ValueError, match=r"fit|alike"):
            call()


def test_no_rows_are_no_launch() -> None:
    x, weight = leaf(0, 8), leaf(8)
    rms_norm.rms_norm(x, weight, 1e-5).sum().backward()
    assert weight.grad is not None and not weight.grad.any()
    assert swiglu.swiglu(x, x).shape == x.shape


def test_wide_rows_and_float64_are_the_references() -> None:
    wide = torch.randn(1, rms_norm.WIDEST_ROW + 1, device=DEVICE)
    for row in (wide, wide[:, : rms_norm.WIDEST_ROW // 2 + 1], wide.bfloat16()):
        assert torch.equal(rms_norm.rms_norm(row, row[0], 1e-5), rms_norm_reference(row, row[0], 1e-5))
    double = torch.randn(2, 8, device=DEVICE, dtype=torch.float64)
    assert torch.equal(rms_norm.rms_norm(double, double[0], 1e-5), rms_norm_reference(double, double[0], 1e-5))


def test_recomputation_gives_the_same_gradients() -> None:
    x, weight = leaf(3, 40), leaf(40)

    def block(x: Tensor) -> Tensor:
        return swiglu.swiglu(rms_norm.rms_norm(x, weight, 1e-5), x)

    plain = torch.autograd.grad(block(x).sum(), [x, weight])
    again = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).sum(), [x, weight])
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_registrations_are_complete() -> None:
    check = ("test_schema", "test_autograd_registration", "test_faketensor")
    x, weight, q, k = leaf(2, 3, 16), leaf(16), leaf(2, 3, 4, 8), leaf(2, 3, 2, 8)
    torch.library.opcheck(rms_norm.rms_norm_op, (x, weight, 1e-5), test_utils=check)
    torch.library.opcheck(rms_norm.add_rms_norm_op, (x, x.detach(), weight, 1e-5), test_utils=check)
    torch.library.opcheck(swiglu.swiglu_op, (x, x.detach()), test_utils=check)
    torch.library.opcheck(rope.rope_op, (q, k, *angles(1, 3, 8), False), test_utils=check)
