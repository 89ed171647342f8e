"""RMSNorm, x / rms(x) * weight (Zhang & Sennrich 2019), alone or fused with the residual addition before it.

Shapes: x (and residual) [..., dim], weight [dim]; results like x. x in bfloat16 or float16, computed in float32, or in
float32, computed in float64, sums too: each result is rounded once. The weight may be wider than x, and is rounded to
x's dtype as the weights of matrices are. The backward keeps x alone: a row is in registers anyway when its rms is
needed, so that forming it anew costs no bytes.
Bytes, for n elements of b bytes (beside the weight): rms_norm 2nb forward, 3nb backward; with the addition 4nb and
4nb (backward: the gradients of both results and the sum are read, the gradient of both arguments is written once).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titanlite_kernels.build import Build
from titanlite_kernels.optional_triton import blank, cdiv, jit, multiprocessors, power_of_two, serves, tl, wrap_triton

WIDEST_ROW = 8192
"""Llama 3 70B's. A program holds its row, and backward the weight and its gradient too, in registers: wider ones spill,
and are left to the reference. In float32, computed in twice its width, half as many."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension: by Triton where that serves, else the reference.

    Raises ValueError for shapes that do not fit.
    """
    _require_shapes(x, x, weight)
    if _fits(x):
        return rms_norm_op(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(h), h) for h = x + residual: by Triton where that serves, else the reference.

    Raises ValueError for shapes that do not fit.
    """
    _require_shapes(x, residual, weight)
    if _fits(x):
        return add_rms_norm_op(x, residual, weight, eps)
    return add_rms_norm_reference(x, residual, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in PyTorch; float64 stays float64."""
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(x.dtype)).to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in PyTorch."""
    summed = x + residual
    return rms_norm_reference(summed, weight, eps), summed


def _require_shapes(x: Tensor, residual: Tensor, weight: Tensor) -> None:
    if x.shape != residual.shape or weight.shape != x.shape[-1:]:
        shapes = f"x {tuple(x.shape)}, residual {tuple(residual.shape)}, weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes} do not fit: the first two must be alike, and the weight as long as their rows")


def _fits(x: Tensor) -> bool:
    return serves(x) and x.shape[-1] <= (WIDEST_ROW // 2 if x.dtype == torch.float32 else WIDEST_ROW)


# ---- kernels: a program holds ROWS rows of DIM values, padded to BLOCK ----------------------------------------------


@jit
def _forward(
    x, residual, weight, y, summed, rows,
    EPS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    stride = tl.full((), DIM, tl.int64)  # all elements may be more than 2^31
    wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float32 else tl.float32
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    at = first * stride + (row * DIM + column)
    inside = (first + row < rows) & (column < DIM)
    values = tl.load(x + at, mask=inside, other=0.0).to(wide)
    if ADDS:
        values += tl.load(residual + at, mask=inside, other=0.0).to(wide)
        rounded = values.to(x.dtype.element_ty)  # what later layers see is what is normed
        tl.store(summed + at, rounded, mask=inside)
        values = rounded.to(wide)
    w = tl.load(weight + column, mask=column < DIM, other=0.0).to(x.dtype.element_ty).to(wide)
    scale = tl.rsqrt(tl.sum(values * values, axis=1, keep_dims=True) / DIM + EPS)
    tl.store(y + at, values * scale * w, mask=inside)


@jit
def _backward(
    grad, grad_summed, x, weight, grad_x, partial_grad_weight, rows,
    EPS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    # Few programs take many rows each: the weight's gradient is a sum over rows, held in registers meanwhile.
    program = tl.program_id(0)
    stride = tl.full((), DIM, tl.int64)
    wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float32 else tl.float32
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + column, mask=column < DIM, other=0.0).to(x.dtype.element_ty).to(wide)
    grad_w = tl.zeros([ROWS, BLOCK], wide)
    # Two stages: the next rows are on their way while these are summed.
    for tile in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=2):
        first = tile * ROWS
        at = first * stride + (row * DIM + column)
        inside = (first + row < rows) & (column < DIM)
        values = tl.load(x + at, mask=inside, other=0.0).to(wide)
        d = tl.load(grad + at, mask=inside, other=0.0).to(wide)
        scale = tl.rsqrt(tl.sum(values * values, axis=1, keep_dims=True) / DIM + EPS)
        normed = values * scale
        grad_w += tl.where(inside, d * normed, 0.0)  # beyond the rows 0 * rsqrt(EPS = 0) is NaN
        d *= w
        grad_values = (d - normed * (tl.sum(d * normed, axis=1, keep_dims=True) / DIM)) * scale
        if ADDS:
            grad_values += tl.load(grad_summed + at, mask=inside, other=0.0).to(wide)
        tl.store(grad_x + at, grad_values, mask=inside)
    tl.store(partial_grad_weight + program * DIM + column, tl.sum(grad_w, axis=0, keep_dims=True), mask=column < DIM)


def _tile(dim: int) -> tuple[int, int]:
    """BLOCK and ROWS for rows of `dim` values: short rows (queries' and keys' norms) share a program."""
    block = power_of_two(dim)
    return block, max(1, 2048 // block)


def _forward_warps(block: int, rows: int) -> int:
    return max(1, block * rows // 1024)  # 32 values a thread: four loads of 16 bytes in flight


def _backward_warps(block: int, rows: int) -> int:
    return max(1, block * rows // 512)  # 16 values a thread: x, its gradient, the weight and its gradient


def _backward_programs(tiles: int, device: torch.device) -> int:
    return min(tiles, 2 * multiprocessors(device))


def _launch_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    y = torch.empty_like(x)
    summed = x if residual is None else torch.empty_like(x)
    dim = x.shape[-1]
    block, tile = _tile(dim)
    if rows := x.numel() // dim:
        wrap_triton(_forward)[(cdiv(rows, tile),)](
            x, x if residual is None else residual, weight, y, summed, rows, EPS=eps,
            DIM=dim, BLOCK=block, ROWS=tile, ADDS=residual is not None, num_warps=_forward_warps(block, tile),
        )  # fmt: skip
    return y, summed


def _launch_backward(
    grad: Tensor, grad_summed: Tensor | None, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    grad_summed = None if grad_summed is None else grad_summed.contiguous()
    grad_x = torch.empty_like(x)
    dim = x.shape[-1]
    block, tile = _tile(dim)
    rows = x.numel() // dim
    programs = _backward_programs(cdiv(rows, tile), x.device)
    wide = torch.float64 if x.dtype == torch.float32 else torch.float32
    partial = torch.empty(programs, dim, dtype=wide, device=x.device)
    if rows:
        wrap_triton(_backward)[(programs,)](
            grad, x if grad_summed is None else grad_summed, x, weight, grad_x, partial, rows, EPS=eps,
            DIM=dim, BLOCK=block, ROWS=tile, ADDS=grad_summed is not None, num_warps=_backward_warps(block, tile),
        )  # fmt: skip
    return grad_x, partial.sum(0).to(weight.dtype)


# ---- registration ---------------------------------------------------------------------------------------------------


@torch.library.triton_op("titanlite_kernels::rms_norm", mutates_args=())
def rms_norm_op(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _launch_forward(x, None, weight, eps)[0]


@torch.library.triton_op("titanlite_kernels::add_rms_norm", mutates_args=())
def add_rms_norm_op(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _launch_forward(x, residual, weight, eps)


@torch.library.triton_op("titanlite_kernels::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _launch_backward(grad, None, x, weight, eps)


@torch.library.triton_op("titanlite_kernels::add_rms_norm_backward", mutates_args=())
def add_rms_norm_backward_op(
    grad: Tensor, grad_summed: Tensor, summed: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _launch_backward(grad, grad_summed, summed, weight, eps)


@rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return blank(x)


@add_rms_norm_op.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return blank(x), blank(x)


@rms_norm_backward_op.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return blank(x), blank(weight)


@add_rms_norm_backward_op.register_fake
def _(grad: Tensor, grad_summed: Tensor, summed: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return blank(summed), blank(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    grad_x, grad_weight = rms_norm_backward_op(grad, *ctx.saved_tensors, ctx.eps)
    return grad_x, grad_weight, None


def _save_added(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)


def _differentiate_added(ctx: Any, grad: Tensor, grad_summed: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    grad_x, grad_weight = add_rms_norm_backward_op(grad, grad_summed, *ctx.saved_tensors, ctx.eps)
    return grad_x, grad_x, grad_weight, None


rms_norm_op.register_autograd(_differentiate, setup_context=_save)
add_rms_norm_op.register_autograd(_differentiate_added, setup_context=_save_added)


# ---- what `python -m titanlite_kernels.inspect` compiles ------------------------------------------------------------


def _build(backward: bool, model: str, dim: int, tokens: int, adds: bool) -> Build:
    def launch(dtype: torch.dtype) -> None:
        x, weight = torch.empty(tokens, dim, dtype=dtype, device="meta"), torch.empty(dim, device="meta")
        other = x if adds else None
        _launch_backward(x, other, x, weight, 1e-5) if backward else _launch_forward(x, other, weight, 1e-5)

    tiles = cdiv(tokens, _tile(dim)[1])
    passes = 3 + adds if backward else 2 + 2 * adds
    return Build(
        name=f"{'add_' * adds}rms_norm.{'backward' if backward else 'forward'}",
        launch=launch,
        shape=f"Llama 3 {model}: {tokens:,} x {dim:,}, bfloat16",
        minimal_bytes=passes * 2 * tokens * dim,
        trips=(tiles / _backward_programs(tiles, torch.device("meta")),) if backward else (),
        cached=("weight",),
    )


_SHAPES = (("8B", 4096, 8192), ("70B", 8192, 8192), ("8B heads", 128, 8192 * 32))

BUILDS = tuple(
    _build(backward, *shape, adds)
    for adds, shapes in ((False, _SHAPES), (True, _SHAPES[:2]))
    for backward in (False, True)
    for shape in shapes
)
