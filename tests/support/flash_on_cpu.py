"""The path of attention on CUDA, on a CPU in float64: torch's operators with kernels that obey their lengths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from unittest.mock import patch

import torch
import torch.nn.attention.varlen as torch_varlen
from torch import Tensor

from titanlite.models.attention import varlen


def _read(offsets: Tensor) -> list[slice]:
    ends = offsets.tolist()
    assert ends[0] == 0 and ends == sorted(ends)
    return [slice(*pair) for pair in pairwise(ends)]


def _seen(q: Tensor, k: Tensor, causal: bool, window: list[int]) -> Tensor:
    """FlashAttention's rule for a document: [queries, keys]."""
    assert causal == (window == [-1, 0])
    distance = torch.arange(len(k)) - torch.arange(len(q)).unsqueeze(1) - (len(k) - len(q))
    least, most = (len(k) + len(q) if limit < 0 else limit for limit in window)
    return (distance >= -least) & (distance <= most)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, q_most: int, k_most: int,
    causal: bool, scale: float | None, window: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """In place of the CUDA kernel, in float64: what it is not given lengths for is not written."""
    out, lse = torch.full_like(q, torch.nan), q.new_full((q.shape[1], len(q)), torch.nan)
    for rows, keys in zip(_read(q_offsets), _read(k_offsets), strict=True):
        assert rows.stop - rows.start <= q_most and keys.stop - keys.start <= k_most and scale is None
        groups = q.shape[1] // k.shape[1]
        its_k, its_v = (x[keys].repeat_interleave(groups, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[rows], its_k) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~_seen(q[rows], k[keys], causal, window), -torch.inf)
        weights = scores.softmax(-1).nan_to_num(0)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, its_v)
        lse[:, rows] = torch.where(weights.sum(-1) > 0, scores.logsumexp(-1), torch.inf)  # as FlashAttention 2 has it
    return out, lse, torch.zeros(2, dtype=torch.uint64)


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_offsets: Tensor, k_offsets: Tensor,
    q_most: int, k_most: int, causal: bool, random_state: Tensor, scale: float | None, window: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    for rows, keys in zip(_read(q_offsets), _read(k_offsets), strict=True):
        groups = q.shape[1] // k.shape[1]
        its_k, its_v = (x[keys].repeat_interleave(groups, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[rows], its_k) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~_seen(q[rows], k[keys], causal, window), -torch.inf)
        weights = (scores - lse[:, rows].unsqueeze(-1)).exp()
        of_weights = torch.einsum("qhd,khd->hqk", grad[rows], its_v)
        delta = (grad[rows] * out[rows]).sum(-1).T.unsqueeze(-1)
        of_scores = weights * (of_weights - delta) * q.shape[-1] ** -0.5
        grads[0][rows] = torch.einsum("hqk,khd->qhd", of_scores, its_k)
        for index, (left, right) in enumerate(((of_scores, q[rows]), (weights, grad[rows])), start=1):
            whole = torch.einsum("hqk,qhd->khd", left, right)
            grads[index][keys] = whole.unflatten(1, (-1, groups)).sum(2)
    return grads[0], grads[1], grads[2]


@contextmanager
def flash_on_cpu() -> Iterator[None]:
    """Have `varlen` take the path of CUDA, whose kernels are the two above."""
    operators = torch_varlen._varlen_attn, torch_varlen._varlen_attn_backward
    for operator, kernel in zip(operators, (_flash, _flash_backward), strict=True):
        operator.register_kernel("cpu")(kernel)
    with patch.object(varlen, "has_flash", lambda q: True):
        yield
