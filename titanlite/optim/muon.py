"""Muon: momentum, orthogonalised (Jordan et al. 2024), for the matrices inside the blocks.

Matrices of one shape are stacked and treated as one batch, so that a step costs a handful of kernels however
many layers there are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from titanlite.errors import UsageError
from titanlite.models.spec import ModelSpec
from titanlite.optim import adamw
from titanlite.optim.base import Optimizer, OptimizerSpec, Weights
from titanlite.recipe import sections

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""The quintic whose iteration drives singular values towards 1, steepest at 0 (Jordan's tuned values)."""
_ITERATIONS = 5


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Approximate U V^T of each matrix's SVD by five Newton-Schulz steps, computed in `dtype`.

    matrices [n, rows, columns]; singular values come out within about 0.7 … 1.2.
    """
    import torch

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

    def __init__(self, weights: Weights, section: sections.Optimizer, dtype: torch.dtype) -> None:
        """`dtype`: of the products."""
        import torch

        self._section, self._dtype, self._exchange, self._device = section, dtype, weights.exchange, weights.device
        alike: dict[Any, dict[str, Tensor]] = defaultdict(dict)
        for name, parameter in weights.held.items():
            alike[weights.exchange.cuts[name] if weights.exchange else (parameter.shape,)][name] = parameter
        self._groups = list(alike.items())
        self._momenta = [torch.stack([torch.zeros_like(p) for p in group.values()]) for _, group in self._groups]

    def state(self) -> Iterable[tuple[str, Tensor]]:
        """`<parameter>/momentum`, a view of the buffer of its group."""
        for (_, group), momenta in zip(self._groups, self._momenta, strict=True):
            for name, momentum in zip(group, momenta.unbind(0), strict=True):
                yield f"{name}/momentum", momentum

    def step(self, lr: float, taken: Tensor) -> None:
        import torch

        momentum, change = self._section.muon_momentum, partial(orthogonalise, dtype=self._dtype)
        with torch.no_grad():
            for (cut, group), momenta in zip(self._groups, self._momenta, strict=True):
                parameters = list(group.values())
                rows, columns = cut[0]
                gradients = torch.stack([p.grad for p in parameters])  # type: ignore[misc]
                moved = torch.lerp(gradients, momenta, momentum)
                momenta.copy_(torch.where(taken, moved, momenta))
                ahead = torch.lerp(gradients, moved, momentum).to(self._device)
                update = self._exchange.apply(change, ahead, cut) if self._exchange else change(ahead)
                update = torch.where(taken, update.to(momenta.device) * (lr * max(1.0, rows / columns) ** 0.5), 0.0)
                # In the weights' dtype: a bool times a number would be float32, whatever the weights are.
                torch._foreach_mul_(parameters, 1.0 - taken.to(update.dtype) * (lr * self._section.weight_decay))
                torch._foreach_sub_(parameters, list(update.unbind(0)))


def build(recipe: sections.Recipe, model: ModelSpec, weights: Weights, compute: torch.dtype) -> Optimizer:
    """Muon for the blocks' matrices, AdamW for embedding, head and norms."""
    section = recipe.optimizer
    matrices = {name: held for name, held in weights.held.items() if model.is_block_matrix(name)}
    if other := next((name for name, held in matrices.items() if held.dim() != 2), None):
        raise UsageError(f"optimizer.name: muon takes matrices, and {other} is none; choose adamw for this model.")
    rest = {name: held for name, held in weights.held.items() if name not in matrices}
    muon = Muon(replace(weights, held=matrices), section, compute)
    return Optimizer((section.lr, adamw.AdamW(rest, section)), (section.muon_lr, muon))


SPEC = OptimizerSpec(
    build,
    keys=(*adamw.KEYS, "muon_lr", "muon_momentum"),
    rates=("lr", "muon_lr"),
    states=lambda block_matrix: 1 if block_matrix else 2,
)
