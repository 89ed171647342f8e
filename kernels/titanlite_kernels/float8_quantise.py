"""A matrix in float8 (Micikevicius et al. 2022) with power-of-two scales, as it is, transposed, or both at once.

Shapes: matrix [rows, columns] in bfloat16, float16 or float32; values alike, contiguous, in float8_e4m3fn or
float8_e5m2, with float32 scales [] or [rows, 1]: values * scale is the matrix. Of the transpose: [columns, rows], with
[] or [columns, 1]. A scale is the smallest power of two with which nothing overflows, of all or of a row; a NaN or an
infinity makes all that shares its scale NaN. There is no gradient: callers are autograd functions, and have their own.
Bytes, for n elements of b bytes: n (2b + 1) and, both at once, n (2b + 2), as a matrix is read for its largest values,
and again to be cast; n (b + 1) for scales of rows, as a row is held meanwhile. Transposing costs none: a matrix whose
transpose is contiguous is read as it lies, and written the other way.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from titanlite_kernels.build import Build
from titanlite_kernels.float8_reference import Float8, Scale, by_row, quantise_both_reference, quantise_reference
from titanlite_kernels.optional_triton import cdiv, jit, multiprocessors, power_of_two, serves, tl, wrap_triton

WIDEST_ROW = 32768
"""A program holds its row in registers; the largest values of wider ones are found by a launch of their own."""
_CAPABILITY = (8, 9)  # GPUs that convert to float8


def quantise(matrix: Tensor, format: torch.dtype, scale: Scale) -> Float8:
    """`matrix` in `format`: by Triton where that serves, else the reference."""
    if _fits(matrix):
        return Float8(*float8_quantise_op(matrix, format, by_row(scale)))
    return quantise_reference(matrix, format, scale)


def quantise_both(matrix: Tensor, format: torch.dtype, scale: Scale) -> tuple[Float8, Float8]:
    """`matrix` and its transpose in `format`: by Triton where that serves, else the reference."""
    if _fits(matrix):
        found = float8_quantise_both_op(matrix, format, by_row(scale))
        return Float8(*found[:2]), Float8(*found[2:])
    return quantise_both_reference(matrix, format, scale)


def _fits(matrix: Tensor) -> bool:
    return serves(matrix) and matrix.numel() > 0 and _has_float8(matrix.device)


@cache
def _has_float8(device: torch.device) -> bool:
    asked = device.type == "cuda" and torch.cuda.is_available()
    return not asked or torch.cuda.get_device_capability(device) >= _CAPABILITY


# ---- kernels: largest values are kept as the bits of |x| in float32, whose order as integers is finite, infinite, NaN


@jit
def _size(values):
    # By the bits: what |NaN| is, devices may choose.
    return values.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def _factor(bits, MAX: tl.constexpr):
    # `float8_reference.power_of_two`. Divisions are exact ones: an approximate one may end below a power of two.
    largest = bits.to(tl.float32, bitcast=True)
    ratio = tl.div_rn(MAX, tl.maximum(largest, 2.0**-100))
    return (ratio.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) + largest * 0.0


@jit
def _largest(matrix, largest, elements, tiles, BLOCK: tl.constexpr):
    # Few programs take many tiles each, and the cast takes the largest of what each found.
    found = tl.zeros([BLOCK], tl.int32)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=3):
        at = tile * tl.full((), BLOCK, tl.int64) + tl.arange(0, BLOCK)  # may be more than 2^31
        found = tl.maximum(found, _size(tl.load(matrix + at, mask=at < elements, other=0.0)))
    tl.store(largest + tl.program_id(0), tl.max(found, axis=0))


@jit
def _largest_by(
    matrix, largest, rows, columns,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr,
):  # fmt: skip
    # Programs (i, j) take the i-th columns of every n-th rows. `largest`: of rows, then of columns.
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    found = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.int32)
    for tile in tl.range(tl.program_id(1), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(1), num_stages=3):
        row = tile * tl.full((), BLOCK_ROWS, tl.int64) + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        size = _size(tl.load(matrix + row[:, None] * columns + column[None, :], mask=inside, other=0.0))
        if BY_ROW:
            tl.atomic_max(largest + row, tl.max(size, axis=1), mask=row < rows, sem="relaxed")
        if BY_COLUMN:
            found = tl.maximum(found, size)
    if BY_COLUMN:
        at = largest + (rows if BY_ROW else 0) + column
        tl.atomic_max(at, tl.max(found, axis=0), mask=column < columns, sem="relaxed")


@jit
def _cast(
    matrix, largest, values, scale, turned, turned_scale, rows, columns, parts,
    MAX: tl.constexpr, PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    PLAIN: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    # The last tile first: of what the launch before has read, the end is still in the cache.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    across = tl.cdiv(columns, BLOCK_COLUMNS)
    row = (tile // across).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tile % across).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(matrix + row[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if PARTS:
        part = tl.arange(0, PARTS)
        factor = _factor(tl.max(tl.load(largest + part, mask=part < parts, other=0), axis=0), MAX)
        cast = (x * factor).to(values.dtype.element_ty)
    if PLAIN:
        if PARTS:
            if tile == 0:
                tl.store(scale, tl.div_rn(1.0, factor))
        else:
            factor = _factor(tl.load(largest + row, mask=row < rows, other=0), MAX)
            cast = (x * factor[:, None]).to(values.dtype.element_ty)
            if tile % across == 0:
                tl.store(scale + row, tl.div_rn(1.0, factor), mask=row < rows)
        tl.store(values + row[:, None] * columns + column[None, :], cast, mask=inside)
    if TURNED:
        if PARTS:
            if tile == 0:
                tl.store(turned_scale, tl.div_rn(1.0, factor))
        else:
            of_columns = largest + (rows if PLAIN else 0) + column
            factor = _factor(tl.load(of_columns, mask=column < columns, other=0), MAX)
            cast = (x * factor[None, :]).to(turned.dtype.element_ty)
            if tile // across == 0:
                tl.store(turned_scale + column, tl.div_rn(1.0, factor), mask=column < columns)
        tl.store(turned + column[:, None] * rows + row[None, :], tl.trans(cast), mask=tl.trans(inside))


@jit
def _by_rows(
    matrix, values, scale, rows, columns, MAX: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    at = row * columns + column
    x = tl.load(matrix + at, mask=inside, other=0.0).to(tl.float32)
    factor = _factor(tl.max(_size(x), axis=1, keep_dims=True), MAX)
    tl.store(values + at, (x * factor).to(values.dtype.element_ty), mask=inside)
    tl.store(scale + row, tl.div_rn(1.0, factor), mask=row < rows)


_BLOCK = 8192  # elements of a tile: 32 for each thread of `_WARPS`, in loads of 16 bytes
_WARPS = 8
_TURNED_TILE = (128, 64)
"""Rows and columns: 128 bytes in a row of bfloat16, and in a row of the transpose in float8, are a line of memory."""


def _tile(columns: int, widest: int) -> tuple[int, int]:
    """Rows and columns of a tile, at most `widest` of the latter."""
    block = min(power_of_two(columns), widest)
    return max(1, _BLOCK // block), block


def _row_warps(block_columns: int) -> int:
    return max(_WARPS, block_columns // 1024)  # 32 values a thread, here too


def _parts(device: torch.device) -> int:
    """How many programs look for the largest value, at most."""
    return 2 * multiprocessors(device)


def _spans(rows: int, columns: int, device: torch.device) -> tuple[int, int]:
    """Programs of `_largest_by`."""
    block_rows, block_columns = _tile(columns, 512)
    across = cdiv(columns, block_columns)
    return across, min(cdiv(rows, block_rows), cdiv(2 * _parts(device), across))


def _find_largest(matrix: Tensor, by_row: bool, plain: bool, turned: bool) -> Tensor:
    """Bits of the largest values that the cast needs: of all, in parts, or of rows and then of columns."""
    rows, columns = matrix.shape
    if not by_row:
        tiles = cdiv(matrix.numel(), _BLOCK)  # not by the kernel: of nearly 2^31 elements it would overflow
        largest = matrix.new_empty(min(tiles, _parts(matrix.device)), dtype=torch.int32)
        wrap_triton(_largest)[(len(largest),)](matrix, largest, matrix.numel(), tiles, BLOCK=_BLOCK, num_warps=_WARPS)
        return largest
    largest = matrix.new_zeros(rows * plain + columns * turned, dtype=torch.int32)
    block_rows, block_columns = _tile(columns, 512)
    wrap_triton(_largest_by)[_spans(rows, columns, matrix.device)](
        matrix, largest, rows, columns,
        BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns, BY_ROW=plain, BY_COLUMN=turned, num_warps=_WARPS,
    )  # fmt: skip
    return largest


def _launch(matrix: Tensor, format: torch.dtype, by_row: bool, plain: bool, turned: bool) -> tuple[Tensor, ...]:
    """Values and scale of the matrix, then of its transpose, as asked."""
    if not matrix.is_contiguous() and matrix.t().is_contiguous():
        found = _launch(matrix.t(), format, by_row, turned, plain)
        return (*found[2:], *found[:2])
    matrix = matrix.contiguous()
    rows, columns = matrix.shape
    of_plain = _empty(matrix, format, by_row) if plain else ()
    of_turned = _empty(matrix.t(), format, by_row) if turned else ()
    highest = torch.finfo(format).max
    if by_row and not turned and columns <= WIDEST_ROW:
        block_rows, block_columns = _tile(columns, WIDEST_ROW)
        wrap_triton(_by_rows)[(cdiv(rows, block_rows),)](
            matrix, *of_plain, rows, columns,
            MAX=highest, BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns,
            num_warps=_row_warps(block_columns),
        )  # fmt: skip
        return of_plain
    largest = _find_largest(matrix, by_row, plain, turned)
    block_rows, block_columns = _cast_tile(columns, turned)
    wrap_triton(_cast)[(cdiv(rows, block_rows) * cdiv(columns, block_columns),)](
        matrix, largest, *(of_plain or of_turned), *(of_turned or of_plain), rows, columns, len(largest),
        MAX=highest, PARTS=0 if by_row else power_of_two(_parts(matrix.device)),
        BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns, PLAIN=plain, TURNED=turned, num_warps=_WARPS,
    )  # fmt: skip
    return (*of_plain, *of_turned)


def _cast_tile(columns: int, turned: bool) -> tuple[int, int]:
    return _TURNED_TILE if turned else _tile(columns, 1024)


def _empty(matrix: Tensor, format: torch.dtype, by_row: bool) -> tuple[Tensor, Tensor]:
    """Memory for `matrix` in float8, and for its scale."""
    scale = (matrix.shape[0], 1) if by_row else ()
    return matrix.new_empty(matrix.shape, dtype=format), matrix.new_empty(scale, dtype=torch.float32)


# ---- registration ---------------------------------------------------------------------------------------------------


@torch.library.triton_op("titanlite_kernels::float8_quantise", mutates_args=())
def float8_quantise_op(matrix: Tensor, format: torch.dtype, by_row: bool) -> tuple[Tensor, Tensor]:
    values, scale = _launch(matrix, format, by_row, plain=True, turned=False)
    return values, scale


@torch.library.triton_op("titanlite_kernels::float8_quantise_both", mutates_args=())
def float8_quantise_both_op(matrix: Tensor, format: torch.dtype, by_row: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values, scale, turned, turned_scale = _launch(matrix, format, by_row, plain=True, turned=True)
    return values, scale, turned, turned_scale


@float8_quantise_op.register_fake
def _(matrix: Tensor, format: torch.dtype, by_row: bool) -> tuple[Tensor, Tensor]:
    return _empty(matrix, format, by_row)


@float8_quantise_both_op.register_fake
def _(matrix: Tensor, format: torch.dtype, by_row: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_empty(matrix, format, by_row), *_empty(matrix.t(), format, by_row)


# ---- what `python -m titanlite_kernels.inspect` compiles ------------------------------------------------------------


def _build(
    kernel: str, shape: tuple[str, int, int], format: torch.dtype = torch.float8_e4m3fn, *,
    by_row: bool = True, plain: bool = True, turned: bool = True,
) -> Build:  # fmt: skip
    def launch(dtype: torch.dtype) -> None:
        _launch(torch.empty(rows, columns, dtype=dtype, device=device), format, by_row, plain, turned)

    what, rows, columns = shape
    device, finds = torch.device("meta"), kernel.startswith("largest")
    way = f"_{'rows' if by_row else 'tensor'}_{'both' if plain and turned else 'turned' if turned else 'plain'}"
    trips = {
        "largest": (cdiv(rows * columns, _BLOCK) / _parts(device),),
        "largest_by": (cdiv(rows, _tile(columns, 512)[0]) / _spans(rows, columns, device)[1],),
    }
    return Build(
        name=f"float8_quantise.{kernel}{'' if kernel in ('largest', 'by_rows') else way}",
        launch=launch,
        number=0 if finds else -1,
        shape=f"Llama 3 8B: {what}, {rows:,} x {columns:,}, bfloat16",
        minimal_bytes=(2 + (0 if finds else plain + turned)) * rows * columns,
        trips=trips.get(kernel, ()),
        cached=() if kernel == "largest" else ("largest", "scale", "turned_scale"),
        targets=("sm_90", "sm_100"),
    )


_ACTIVATIONS, _HIDDEN, _WEIGHT = ("activations", 8192, 4096), ("hidden", 8192, 14336), ("weight", 14336, 4096)

BUILDS = (
    _build("largest", _ACTIVATIONS, by_row=False, turned=False),
    _build("cast", _ACTIVATIONS, by_row=False, turned=False),
    _build("cast", _ACTIVATIONS, by_row=False, plain=False),
    _build("by_rows", _ACTIVATIONS, turned=False),
    _build("by_rows", _HIDDEN, turned=False),
    _build("largest_by", _ACTIVATIONS, plain=False),
    _build("largest_by", _ACTIVATIONS),
    _build("cast", _ACTIVATIONS, plain=False),
    *(_build("cast", shape, torch.float8_e5m2, by_row=False) for shape in (_ACTIVATIONS, _HIDDEN)),
    *(_build("cast", shape) for shape in (_ACTIVATIONS, _HIDDEN, _WEIGHT)),
)
