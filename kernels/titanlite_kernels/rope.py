"""Rotary embedding (Su et al. 2021) of queries and keys in one launch.

Shapes: q [batch, seq, heads, head_dim], k [batch, seq, kv_heads, head_dim] with any strides whose last is 1 (slices
of one projection, gradients that attention hands back transposed); cos and sin [1 or batch, seq, 1, head_dim] whose
two halves are alike. Pair i is (x[i], x[i + head_dim / 2]), as in Hugging Face. Results are contiguous, like q and k;
computed in float32 (of float32: in float64) and rounded once. The backward is the rotation by the opposite angle, so it
keeps cos and sin alone.
Bytes, for n elements of q and k together of b bytes: 2nb, and half of cos and sin; the same backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titanlite_kernels.build import Build
from titanlite_kernels.optional_triton import blank, jit, power_of_two, serves, tl, wrap_triton

LARGEST_TOKEN = 16384
"""Values of one token's queries (128 heads of 128): one program holds them; more are left to the reference."""


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k, rotated: by Triton where that serves, else the reference.

    Raises ValueError for shapes that do not fit.
    """
    batch, seq, _, width = q.shape
    tables = (1, seq, 1, width), (batch, seq, 1, width)
    if k.shape[:2] != q.shape[:2] or k.shape[3] != width or cos.shape not in tables or sin.shape not in tables:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, cos, sin))
        raise ValueError(f"q, k, cos and sin of shapes {shapes} do not fit: see the contract")
    if serves(q) and max(q.shape[2], k.shape[2]) * q.shape[3] <= LARGEST_TOKEN:
        return rope_op(q, k, cos, sin, False)
    return rope_reference(q, k, cos, sin)


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The same in PyTorch."""
    return _rotate_reference(q, cos, sin), _rotate_reference(k, cos, sin)


def _rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


@jit
def _rotate(
    q, k, cos, sin, q_out, k_out, seq, cos_batch, cos_seq, sin_batch, sin_seq,
    q_batch, q_seq, q_head, k_batch, k_seq, k_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_BLOCK: tl.constexpr, KV_HEAD_BLOCK: tl.constexpr,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    # A program rotates all heads of one token, so that its angles are read once.
    token = tl.program_id(0).to(tl.int64)
    batch = token // seq
    place = token % seq
    pair = tl.arange(0, HALF_BLOCK)[None, :]
    wide: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float32 else tl.float32
    c = tl.load(cos + batch * cos_batch + place * cos_seq + pair, mask=pair < HALF).to(wide)
    s = tl.load(sin + batch * sin_batch + place * sin_seq + pair, mask=pair < HALF).to(wide)
    if INVERSE:
        s = -s
    _rotate_heads(
        q + batch * q_batch + place * q_seq, q_head, q_out + token * (HEADS * 2 * HALF), c, s,
        HEADS, HEAD_BLOCK, HALF, HALF_BLOCK,
    )  # fmt: skip
    _rotate_heads(
        k + batch * k_batch + place * k_seq, k_head, k_out + token * (KV_HEADS * 2 * HALF), c, s,
        KV_HEADS, KV_HEAD_BLOCK, HALF, HALF_BLOCK,
    )  # fmt: skip


@jit
def _rotate_heads(
    x, head_stride, out, c, s,
    HEADS: tl.constexpr, HEAD_BLOCK: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, HEAD_BLOCK)[:, None]
    pair = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < HEADS) & (pair < HALF)
    at = x + head.to(tl.int64) * head_stride + pair
    first = tl.load(at, mask=inside).to(c.dtype)
    second = tl.load(at + HALF, mask=inside).to(c.dtype)
    to = out + head * (2 * HALF) + pair
    tl.store(to, first * c - second * s, mask=inside)
    tl.store(to + HALF, second * c + first * s, mask=inside)


def _warps(heads: int, head_dim: int) -> int:
    return min(16, max(1, power_of_two(heads) * power_of_two(head_dim) // 1024))


def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    batch, seq, heads, head_dim = q.shape
    kv_heads, half = k.shape[2], head_dim // 2
    q_out, k_out = blank(q), blank(k)
    if q.numel():
        wrap_triton(_rotate)[(batch * seq,)](
            q, k, cos, sin, q_out, k_out, seq,
            cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1), sin.stride(0) if sin.shape[0] > 1 else 0,
            sin.stride(1), *q.stride()[:3], *k.stride()[:3],
            HEADS=heads, KV_HEADS=kv_heads, HEAD_BLOCK=power_of_two(heads), KV_HEAD_BLOCK=power_of_two(kv_heads),
            HALF=half, HALF_BLOCK=power_of_two(half), INVERSE=inverse, num_warps=_warps(heads, head_dim),
        )  # fmt: skip
    return q_out, k_out


rope_op: Any = torch.library.triton_op("titanlite_kernels::rope", _launch, mutates_args=())


@rope_op.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return blank(q), blank(k)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    grad_q, grad_k = rope_op(grad_q, grad_k, *ctx.saved_tensors, not ctx.inverse)
    return grad_q, grad_k, None, None, None


rope_op.register_autograd(_differentiate, setup_context=_save)


def _build(model: str, heads: int, inverse: bool) -> Build:
    seq, kv_heads, head_dim = 8192, 8, 128

    def launch(dtype: torch.dtype) -> None:
        q, k = (torch.empty(1, seq, count, head_dim, dtype=dtype, device="meta") for count in (heads, kv_heads))
        angles = torch.empty(1, seq, 1, head_dim, device="meta")
        _launch(q, k, angles, angles, inverse)

    return Build(
        name=f"rope.{'backward' if inverse else 'forward'}",
        launch=launch,
        shape=f"Llama 3 {model}: {seq:,} tokens x ({heads} + {kv_heads}) heads x {head_dim}, bfloat16",
        minimal_bytes=2 * 2 * seq * (heads + kv_heads) * head_dim + 2 * 4 * seq * head_dim // 2,
    )


BUILDS = tuple(
    _build(model, heads, inverse)
    for inverse in (False, True)
    for model, heads in (("8B", 32), ("70B", 64), ("405B", 128))
)
