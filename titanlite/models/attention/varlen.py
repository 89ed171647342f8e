"""Attention within documents that lie end to end, by lengths rather than by a mask of queries x keys.

One operator for both devices, forward and backward, which the compiler does not look into. On CUDA it is torch's
`varlen` attention (FlashAttention; 3 or 4 where `use_best_kernels` found them). On a CPU, and in float32 and float64,
documents are taken one after the other, which reads their lengths on the host: there is no kernel in these dtypes.

The operator also gives the log of each query's summed exponentials, so that parts over different keys can be merged.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titanlite.models.attention.products import attend_by_products, attend_by_products_backward


class Documents(NamedTuple):
    """Which keys each query is compared with: the i-th document's queries with its keys.

    Offsets are int32 [documents + 1], from 0 to the number of all queries or keys; a document may have none of either.
    """

    q_offsets: Tensor
    k_offsets: Tensor
    q_longest: int  # the most queries that one may have
    k_longest: int


def clip_documents(
    offsets: Tensor | None, batch: int, length: int, queries: range, keys: range, device: torch.device
) -> Documents:
    """The documents of `batch` sequences of `length`, cut to the `queries` and `keys` of each sequence.

    offsets: int32 [documents + 1], where each begins among all sequences' tokens; None: each sequence is one. What lies
    before the first query of its document is kept as keys without queries, so that every key belongs to a document.
    """
    if offsets is None:
        offsets = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    sequence = torch.div(offsets, length, rounding_mode="floor")
    place = offsets - sequence * length

    def clip(part: range) -> Tensor:
        if part == range(length):
            return offsets
        return (sequence * len(part) + (place - part.start).clamp(0, len(part))).to(torch.int32)

    return Documents(clip(queries), clip(keys), len(queries), len(keys))


def has_flash(q: Tensor) -> bool:
    """Whether queries like `q` [..., head_dim] are on a GPU whose flash kernels take them."""
    halves = q.dtype in (torch.bfloat16, torch.float16)
    return q.device.type == "cuda" and halves and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _torch_operators() -> Any:
    import torch.nn.attention.varlen  # registers them

    return torch.ops.torch_attn


def _attend(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor,
    q_longest: int, k_longest: int, left: int, right: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(q k^T / sqrt(head_dim)) v, document by document, and the log of the summed exponentials.

    q [queries, heads, head_dim], k and v [keys, kv_heads, head_dim] -> [queries, heads, head_dim] in q's dtype, [heads,
    queries] in at least float32. Offsets: see `Documents`. A document's last query has the place of its last key, and
    sees keys from `left` before its own place to `right` after it; -1: all. One that sees no key has a result of 0 and
    an infinite log (of either sign).
    """
    if has_flash(q):
        causal = (left, right) == (-1, 0)
        # By place: torch's versions add arguments at the end.
        out, lse, _ = _torch_operators()._varlen_attn(
            q, k, v, q_offsets, k_offsets, q_longest, k_longest, causal, None, [left, right]
        )
        return out, lse
    out = torch.zeros_like(q)
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for queries, keys in _pairs(q_offsets, k_offsets):
        out[queries], lse[:, queries] = _attend_one(q[queries], k[keys], v[keys], left, right)
    return out, lse


def _attend_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("titanlite::attend_backward", mutates_args=())
def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_offsets: Tensor, k_offsets: Tensor,
    q_longest: int, k_longest: int, left: int, right: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v. `out` and `lse` may be over more keys than these; a query whose lse is +inf has none."""
    if has_flash(q):
        causal, unused = (left, right) == (-1, 0), torch.zeros(2, dtype=torch.uint64, device=q.device)
        return _torch_operators()._varlen_attn_backward(
            grad, q, k, v, out, lse, q_offsets, k_offsets, q_longest, k_longest, causal, unused, None, [left, right]
        )
    q_grad, k_grad, v_grad = (torch.zeros_like(x) for x in (q, k, v))
    for queries, keys in _pairs(q_offsets, k_offsets):
        q_grad[queries], k_grad[keys], v_grad[keys] = _attend_one_backward(
            grad[queries], q[queries], k[keys], v[keys], out[queries], lse[:, queries], left, right
        )
    return q_grad, k_grad, v_grad


@attend_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, q_offsets, k_offsets, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, q_offsets, k_offsets)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = attend_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.numbers)
    return *grads, *[None] * (2 + len(ctx.numbers))


def _operator(name: str) -> Any:
    operator = torch.library.custom_op(f"titanlite::{name}", _attend, mutates_args=())
    operator.register_fake(_attend_fake)
    operator.register_autograd(_backward, setup_context=_save)
    return operator


attend = _operator("attend")
attend_part = _operator("attend_part")
"""The same by another name, which selective recomputation does not keep."""


def register_flops() -> None:
    """Have torch's counter know the operators' forward operations: the whole square of the longest document, as for its
    own attention.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula  # takes a third of a second

    def count(q: Any, k: Any, v: Any, q_offsets: Any, k_offsets: Any, longest: int, *_: Any, **__: Any) -> int:
        return int(4 * q[0] * q[1] * q[2] * longest)

    if torch.ops.titanlite.attend not in flop_registry:
        register_flop_formula([torch.ops.titanlite.attend, torch.ops.titanlite.attend_part])(count)


def _pairs(q_offsets: Tensor, k_offsets: Tensor) -> Iterator[tuple[slice, slice]]:
    """Each document's queries and keys, where it has both."""
    for queries, keys in zip(pairwise(q_offsets.tolist()), pairwise(k_offsets.tolist()), strict=True):
        if queries[0] < queries[1] and keys[0] < keys[1]:
            yield slice(*queries), slice(*keys)


def _cpu_kernel(q: Tensor, k: Tensor, left: int, right: int) -> bool:
    """Whether the CPU's flash kernel computes this: all keys, or those up to a query's own place."""
    return q.device.type == "cpu" and left < 0 and (right < 0 or (right == 0 and q.shape[0] == k.shape[0]))


def _attend_one(q: Tensor, k: Tensor, v: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    if not _cpu_kernel(q, k, left, right):
        return attend_by_products(q, k, v, (left, right))
    heads = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, right == 0)
    return out[0].transpose(0, 1), lse[0]


def _attend_one_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, left: int, right: int
) -> tuple[Tensor, Tensor, Tensor]:
    if not _cpu_kernel(q, k, left, right):
        return attend_by_products_backward(grad, q, k, v, out, lse, (left, right))
    heads = (x.transpose(0, 1).unsqueeze(0) for x in (grad, q, k, v, out))
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *heads, lse.contiguous().unsqueeze(0), 0.0, right == 0
    )
    q_grad, k_grad, v_grad = (x[0].transpose(0, 1) for x in grads)
    return q_grad, k_grad, v_grad
