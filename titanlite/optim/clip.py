"""Global gradient norm and clipping, without leaving the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def clip_gradients(tensors: Iterable[Tensor], clip_norm: float, group: dist.ProcessGroup | None = None) -> Tensor:
    """Scale all gradients by min(1, clip_norm / norm) and return the norm before that; 0 for no clipping.

    `group` holds the ranks over which the tensors are cut. Returns a scalar tensor on the device, in at least
    float32, the same on every rank. A norm that is not finite scales nothing into sense: the step is judged by
    `resilience.guards`, not here.
    """
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    squared = torch.stack(torch._foreach_norm(gradients)).square().sum()
    if group is not None:
        dist.all_reduce(squared, group=group)
    norm = squared.sqrt()
    if clip_norm > 0:
        torch._foreach_mul_(gradients, (clip_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
