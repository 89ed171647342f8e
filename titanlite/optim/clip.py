"""Global gradient norm and clipping, without leaving the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], clip_norm: float) -> Tensor:
    """Scale all gradients by min(1, clip_norm / norm) and return the norm before that; 0 for no clipping.

    Returns a scalar tensor on the device, in at least float32. A norm that is not finite scales nothing into
    sense: the step is judged by `resilience.guards`, not here.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if clip_norm > 0:
        torch._foreach_mul_(gradients, (clip_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
