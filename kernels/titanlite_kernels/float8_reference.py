"""Matrices in float8 with power-of-two scales, in PyTorch: what `float8_quantise` gives, bit for bit.

By itself, as importing Triton takes a second that a process without kernels need not pay.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Scale = Literal["tensor", "row"]  # one scale for a matrix, or one for each of its rows

SMALLEST = 2.0**-100
"""A largest value below this is treated as this, so that scales and their reciprocals stay in the range of float32."""
EXPONENT = 0x7F800000  # the bits of a float32 that hold its exponent


class Float8(NamedTuple):
    """A matrix in float8: `values` * `scale`."""

    values: Tensor  # [rows, columns], float8, contiguous
    scale: Tensor  # [] or [rows, 1], or of blocks of columns [rows, blocks]; float32, powers of two

    def widened(self, dtype: torch.dtype) -> Tensor:
        """[rows, columns] in `dtype`."""
        scale = self.scale
        if scale.dim() == 2 and scale.shape[1] > 1:
            scale = scale.repeat_interleave(self.values.shape[1] // scale.shape[1], 1)
        return self.values.to(dtype) * scale.to(dtype)


def power_of_two(largest: Tensor, format: torch.dtype) -> Tensor:
    """What values up to `largest` are multiplied with to fill `format`, rounded down to a power of two.

    NaN where the largest value is not finite, so that everything scaled by it is NaN too.
    """
    largest = largest.float()
    ratio = torch.finfo(format).max / largest.clamp(min=SMALLEST)
    # Times 0: cutting the mantissa away would turn a NaN into infinity.
    return (ratio.view(torch.int32) & EXPONENT).view(torch.float32) + largest * 0


def quantise_reference(matrix: Tensor, format: torch.dtype, scale: Scale) -> Float8:
    """`matrix` [rows, columns] of any float dtype in `format`, contiguous whatever its strides. Nothing overflows."""
    if matrix.dtype == torch.float16:
        matrix = matrix.float()  # which has the powers of two that small values are multiplied with
    factor = power_of_two(_largest(matrix, by_row(scale)), format)
    # In any dtype: multiplying with a power of two is exact.
    return Float8((matrix * factor.to(matrix.dtype)).to(format).contiguous(), factor.reciprocal())


def by_row(scale: Scale) -> bool:
    """Whether rows have scales of their own. Raises ValueError for what is no way to scale."""
    if scale not in ("tensor", "row"):
        raise ValueError(f"scale {scale!r} must be tensor or row")
    return scale == "row"


def _largest(matrix: Tensor, rows: bool) -> Tensor:
    if not matrix.numel():
        return matrix.new_zeros((len(matrix), 1) if rows else ())
    return matrix.abs().amax(1, keepdim=True) if rows else matrix.abs().amax()


def quantise_both_reference(matrix: Tensor, format: torch.dtype, scale: Scale) -> tuple[Float8, Float8]:
    """`matrix` and its transpose in `format`."""
    plain = quantise_reference(matrix, format, scale)
    if scale == "tensor":
        return plain, Float8(plain.values.t().contiguous(), plain.scale.clone())
    return plain, quantise_reference(matrix.t(), format, scale)
