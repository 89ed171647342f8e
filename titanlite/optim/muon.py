"""Muon: momentum, orthogonalised (Jordan et al. 2024), for the matrices inside the blocks.

Matrices of one shape are stacked and treated as one batch, so that a step costs a handful of kernels however
many layers there are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""The quintic whose iteration drives singular values towards 1, steepest at 0 (Jordan's tuned values)."""
_ITERATIONS = 5


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Approximate U V^T of each matrix's SVD by five Newton-Schulz steps, computed in `dtype`.

    matrices [n, rows, columns]; singular values come out within about 0.7 … 1.2.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.to(dtype)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT  # the Gram matrix is then the smaller of the two
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


class Muon:
    """Nesterov momentum, orthogonalisation, decoupled weight decay; updates happen on the device, or not at all."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], momentum: float, weight_decay: float, dtype: torch.dtype
    ) -> None:
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.dtype = dtype
        by_shape: dict[tuple[int, ...], dict[str, nn.Parameter]] = defaultdict(dict)
        for name, parameter in parameters.items():
            by_shape[tuple(parameter.shape)][name] = parameter
        self._groups = list(by_shape.values())
        self._momenta = [torch.stack([torch.zeros_like(p) for p in group.values()]) for group in self._groups]

    def state(self) -> Iterable[tuple[str, Tensor]]:
        """(`<parameter>/momentum`, view of its buffer): copying into these restores the optimizer."""
        for group, momenta in zip(self._groups, self._momenta, strict=True):
            for name, momentum in zip(group, momenta.unbind(0), strict=True):
                yield f"{name}/momentum", momentum

    @torch.no_grad()
    def step(self, lr: float, taken: Tensor) -> None:
        """One update at learning rate `lr` where `taken` (bool scalar on the device) is true; else nothing changes."""
        for group, momenta in zip(self._groups, self._momenta, strict=True):
            parameters = list(group.values())
            gradients = torch.stack([p.grad for p in parameters])
            moved = torch.lerp(gradients, momenta, self.momentum)
            momenta.copy_(torch.where(taken, moved, momenta))
            update = orthogonalise(torch.lerp(gradients, moved, self.momentum), self.dtype)
            rows, columns = parameters[0].shape
            rate = lr * max(1.0, rows / columns) ** 0.5
            update = torch.where(taken, update * rate, 0.0)
            # In the weights' dtype: a bool times a number would be float32, whatever the weights are.
            torch._foreach_mul_(parameters, 1.0 - taken.to(update.dtype) * (lr * self.weight_decay))
            torch._foreach_sub_(parameters, list(update.unbind(0)))
