"""Casts to float8 as kernels, bit for bit those of the reference. `test_norms.py` runs this file."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.exactness import DEVICE, DTYPES
from titanlite_kernels import float8_quantise, optional_triton
from titanlite_kernels.float8_quantise import quantise, quantise_both
from titanlite_kernels.float8_reference import Float8, Scale, quantise_both_reference, quantise_reference
from torch import Tensor

from titanlite.plan.float8 import SETTINGS
from titanlite.precision.float8 import Float8Linear, fuse_casts

FORMATS = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES: tuple[Scale, ...] = ("tensor", "row")


def assert_same_bits(ours: Float8, other: Float8) -> None:
    """But for the bits of NaN, which nobody promises."""
    assert ours.values.is_contiguous() and ours.scale.is_contiguous()
    for mine, right in zip(ours, other, strict=True):
        assert mine.dtype == right.dtype and mine.shape == right.shape
        mine, right = mine.float(), right.float()
        assert torch.equal(mine.isnan(), right.isnan())
        assert torch.equal(mine.nan_to_num(0).view(torch.int32), right.nan_to_num(0).view(torch.int32))


def assert_as_the_reference(matrix: Tensor, format: torch.dtype, scale: Scale) -> None:
    """As it is, transposed, and both."""
    plain, turned = quantise_both_reference(matrix, format, scale)
    assert_same_bits(quantise(matrix, format, scale), plain)
    assert_same_bits(quantise(matrix.t(), format, scale), turned)
    for ours, other in zip(quantise_both(matrix, format, scale), (plain, turned), strict=True):
        assert_same_bits(ours, other)


def of_many_sizes(*shape: int) -> Tensor:
    """Values over twelve decades, some so small that float8 has not all of their bits."""
    return torch.randn(shape, device=DEVICE) * torch.logspace(-9, 3, shape[0], device=DEVICE)[:, None]


def test_these_tests_are_of_kernels() -> None:
    assert float8_quantise._fits(torch.ones(1, 1, device=DEVICE))


@settings(max_examples=3, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 150),
    columns=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    format=st.sampled_from(FORMATS),
    scale=st.sampled_from(SCALES),
)
def test_any_shape(rows: int, columns: int, dtype: torch.dtype, format: torch.dtype, scale: Scale) -> None:
    assert_as_the_reference(of_many_sizes(rows, columns).to(dtype), format, scale)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("shape", "format"), [((1, 300), FORMATS[0]), ((300, 1), FORMATS[1]), ((1, 1), FORMATS[1]), ((144, 80), FORMATS[0])]
)
def test_vectors_and_tiles(shape: tuple[int, int], format: torch.dtype, scale: Scale) -> None:
    assert_as_the_reference(of_many_sizes(*shape).bfloat16(), format, scale)


@pytest.mark.parametrize("scale", SCALES)
def test_a_program_takes_many_tiles(monkeypatch: pytest.MonkeyPatch, scale: Scale) -> None:
    """And rows too wide for one to hold are read twice. The largest value of all is in the last tile."""
    monkeypatch.setattr(float8_quantise, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(float8_quantise, "WIDEST_ROW", 500)
    assert_as_the_reference(of_many_sizes(70, 700), torch.float8_e4m3fn, scale)


EXTREME = (0.0, -0.0, 1e-44, 1e-39, 2.0**-101, 7.0, 7 + 2.0**-21, 7 - 2.0**-21, -3e38, math.inf, -math.inf, math.nan)
"""448 and 57344 are 7 times a power of two: at 7, values just fill a format."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_extreme_values(format: torch.dtype, dtype: torch.dtype) -> None:
    """In rows of their own, and in columns with others."""
    values = torch.tensor(EXTREME, device=DEVICE)[:, None].expand(-1, len(EXTREME))
    mixed = torch.where(torch.eye(len(EXTREME), device=DEVICE) > 0, values, torch.randn(values.shape, device=DEVICE))
    for matrix in (values, mixed):
        assert_as_the_reference(matrix.to(dtype).contiguous(), format, "row")


@pytest.mark.parametrize("value", EXTREME)
def test_extreme_values_among_others(value: float) -> None:
    matrix = torch.randn(5, 20, device=DEVICE) * value
    matrix[2, 7] = value
    assert_same_bits(*(each(matrix, FORMATS[1], "tensor") for each in (quantise, quantise_reference)))


def test_small_values_in_float16_have_scales_that_it_has_not() -> None:
    matrix = torch.full((2, 16), 2.0**-24, device=DEVICE, dtype=torch.float16)
    for each in (matrix, torch.zeros_like(matrix)):
        values, scale = quantise(each, torch.float8_e4m3fn, "tensor")
        assert torch.equal(values.float() * scale, each.float())
        assert_as_the_reference(each, torch.float8_e4m3fn, "tensor")


@pytest.mark.parametrize("scale", SCALES)
def test_matrices_need_not_be_contiguous(scale: Scale) -> None:
    x = of_many_sizes(40, 60)
    for matrix in (x[:, ::2], x[::3], x[:1].expand(7, -1), x.view(20, 120)[:, 5:].t()):
        assert not matrix.is_contiguous()
        assert_as_the_reference(matrix, torch.float8_e5m2, scale)


def test_a_transpose_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    find = float8_quantise._find_largest
    monkeypatch.setattr(float8_quantise, "_find_largest", lambda x, *rest: (given.append(x), find(x, *rest))[1])
    matrix = torch.randn(20, 30, device=DEVICE)
    quantise(matrix.t(), torch.float8_e4m3fn, "row")
    assert [each.data_ptr() for each in given] == [matrix.data_ptr()]


def test_float64_is_the_reference() -> None:
    matrix = of_many_sizes(5, 7).double()
    assert not optional_triton.serves(matrix)
    assert_as_the_reference(matrix, torch.float8_e4m3fn, "row")


@pytest.mark.parametrize("recipe", SETTINGS)
def test_a_linear_gives_the_same_bits_with_either(recipe: str) -> None:
    x, weight, grad = (torch.randn(shape, device=DEVICE) for shape in ((32, 64), (96, 64), (32, 96)))
    weight.requires_grad_()
    found = []
    for fused in (False, True):
        for kept in (None, weight):
            linear = Float8Linear(fuse_casts(SETTINGS[recipe]) if fused else SETTINGS[recipe], kept)
            leaf = x.bfloat16().requires_grad_()
            out = linear(leaf, weight)
            found.append([out, *torch.autograd.grad(out, [leaf, weight], grad.bfloat16())])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found[1], found[3], strict=True))


def test_registrations_are_complete() -> None:
    check = ("test_schema", "test_autograd_registration", "test_faketensor")
    for matrix in (torch.randn(6, 16, device=DEVICE), torch.randn(16, 6, device=DEVICE).t()):
        for by_row in (False, True):
            arguments = matrix, torch.float8_e4m3fn, by_row
            torch.library.opcheck(float8_quantise.float8_quantise_op, arguments, test_utils=check)
            torch.library.opcheck(float8_quantise.float8_quantise_both_op, arguments, test_utils=check)
