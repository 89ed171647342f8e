"""Attention by matrix products, some queries at a time: in any floating-point dtype, on any device, with any window.

It is what a CPU runs where its own kernel has no such window, and what a GPU runs in float32 and float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 256  # queries whose scores are in memory at a time


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """One document's result [queries, heads, head_dim] and log-sum-exp [heads, queries]: see `varlen.attend`."""
    outs, lses = [], []
    values = _widen(v).movedim(1, 0).unsqueeze(1)  # [kv_heads, 1, keys, head_dim]
    for rows, keys in _blocks(q, k, window):
        scores = _scores(q, k, rows, keys, window)
        lse = scores.logsumexp(-1, keepdim=True)
        # A query that sees no key has an lse of -inf, and weights of 0 rather than of inf - inf.
        weights = (scores - lse.clamp_min(torch.finfo(lse.dtype).min)).exp()
        outs.append((weights @ values[:, :, keys]).flatten(0, 1).movedim(0, 1).to(q.dtype))
        lses.append(lse.squeeze(-1).flatten(0, 1))
    return torch.cat(outs), torch.cat(lses, dim=1)


def attend_by_products_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; `lse` may be over more keys than these."""
    scale = q.shape[-1] ** -0.5
    keys_wide, values = (_widen(x).movedim(1, 0).unsqueeze(1) for x in (k, v))
    q_grads, k_grad, v_grad = [], torch.zeros_like(keys_wide[:, 0]), torch.zeros_like(values[:, 0])
    for rows, keys in _blocks(q, k, window):
        queries, grads, outs = (_rows(x, k, rows) for x in (q, grad, out))
        weights = (_scores(q, k, rows, keys, window) - lse[:, rows].unflatten(0, queries.shape[:2]).unsqueeze(-1)).exp()
        v_grad[:, keys] += (weights.transpose(-2, -1) @ grads).sum(1)
        of_weights = grads @ values[:, :, keys].transpose(-2, -1)
        of_scores = weights * (of_weights - (grads * outs).sum(-1, keepdim=True)) * scale
        q_grads.append((of_scores @ keys_wide[:, :, keys]).flatten(0, 1).movedim(0, 1).to(q.dtype))
        k_grad[:, keys] += (of_scores.transpose(-2, -1) @ queries).sum(1)
    return torch.cat(q_grads), k_grad.movedim(0, 1).to(k.dtype), v_grad.movedim(0, 1).to(v.dtype)


def _blocks(q: Tensor, k: Tensor, window: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Some queries each, with the keys that any of them sees."""
    (left, right), ahead = window, k.shape[0] - q.shape[0]
    blocks = []
    for first in range(0, q.shape[0], _ROWS):
        last = min(first + _ROWS, q.shape[0]) - 1
        begin = 0 if left < 0 else max(0, first + ahead - left)
        end = k.shape[0] if right < 0 else max(begin, min(k.shape[0], last + ahead + right + 1))
        blocks.append((slice(first, last + 1), slice(begin, end)))
    return blocks


def _scores(q: Tensor, k: Tensor, rows: slice, keys: slice, window: tuple[int, int]) -> Tensor:
    """[kv_heads, heads of each, rows, keys]; -inf where a key is not seen."""
    (left, right), ahead = window, k.shape[0] - q.shape[0]
    transposed = _widen(k[keys]).movedim(1, 0).unsqueeze(1).transpose(-2, -1)
    products = _rows(q, k, rows) @ transposed * q.shape[-1] ** -0.5
    places = torch.arange(rows.start, rows.stop, device=q.device).unsqueeze(1) + ahead  # each query's own key
    distance = torch.arange(keys.start, keys.stop, device=q.device) - places
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    return products.masked_fill(hidden, -torch.inf)


def _rows(x: Tensor, k: Tensor, rows: slice) -> Tensor:
    """[queries, heads, head_dim] -> [kv_heads, heads of each, rows, head_dim], in at least float32."""
    return _widen(x[rows]).movedim(1, 0).unflatten(0, (k.shape[1], -1))


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
