"""Global gradient norm and clipping, without leaving the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def clip_gradients(
    tensors: Iterable[Tensor], clip_norm: float, *, ranks: int = 1, parts: Tensor | None = None
) -> Tensor:
    """Scale all gradients by min(1, clip_norm / norm) and return the norm before that; 0 for no clipping.

    Where `ranks` hold parts of the model, `parts` [tensors] is, for each tensor, 1 over the ranks that hold the same
    part of it. Returns a scalar tensor on the device, in at least float32, the same bits on every rank: were it formed
    within each copy of the model, copies could drift apart. A norm that is not finite scales nothing into sense:
    `resilience.guards` judges the step, not this.
    """
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    squared = torch.stack(torch._foreach_norm(gradients)).square()
    total = squared.sum() if parts is None else squared @ parts
    if ranks > 1:
        dist.all_reduce(total)
    norm = total.sqrt()
    if clip_norm > 0:
        torch._foreach_mul_(gradients, (clip_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
