"""One rank of several that share a vocabulary, for test_linear_cross_entropy.py."""

from __future__ import annotations

import torch
import torch.distributed as dist
from titanlite_kernels.linear_cross_entropy import linear_cross_entropy
from torch import Tensor

FIRST = (0, 4, 17, 23)  # where each rank's rows begin, and the end


def arguments() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the whole weight, and labels, the same on every rank; of the tokens some are padding."""
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(rows, 6, dtype=torch.float64, generator=generator) for rows in (14, FIRST[-1]))
    labels = torch.randint(0, FIRST[-1], (14,), generator=generator)
    labels[::5] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def loss_and_gradients(rank: int, world: int, recompute: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and this rank's gradients of the hidden states and of its rows."""
    hidden, weight, labels = arguments()
    first, end = FIRST[rank : rank + 2]
    part = weight[first:end].detach().requires_grad_()
    loss = linear_cross_entropy(
        hidden, part, labels, z_loss=1e-2, chunk=4, recompute=recompute, group=dist.group.WORLD, first=first
    )
    return loss.detach(), *torch.autograd.grad(loss, (hidden, part))
