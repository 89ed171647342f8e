"""Modules of a model exchanged for those that run a fused kernel of `titanlite_kernels`: same parameters, same values.

Which ones, `rules.kernels` says from the recipe; the kernels themselves fall back to PyTorch where they do not fit.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from titanlite_kernels.rms_norm import add_rms_norm, rms_norm
from titanlite_kernels.rope import rope
from titanlite_kernels.swiglu import swiglu
from torch import Tensor, nn

from titanlite.models.layers import GatedProduct, RMSNorm, Rotate, Rotation


class FusedRMSNorm(RMSNorm):
    """`RMSNorm` in one pass over its input, forward and backward; with the addition before it, if it is given that."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return rms_norm(x, self.weight, self.eps)
        return add_rms_norm(x, residual, self.weight, self.eps)

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        normed, h = self(x, residual)  # as a call of the module: hooks, and what is wrapped around `forward`, see it
        return normed, h


class FusedRotate(Rotate):
    """`Rotate` for queries and keys in one launch."""

    def forward(self, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        return rope(q, k, rotation.cos, rotation.sin)


class FusedProduct(GatedProduct):
    """`GatedProduct` that keeps its inputs alone for the backward pass."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return swiglu(gate, up)


FUSED: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "rms_norm": (RMSNorm, FusedRMSNorm),
    "rope": (Rotate, FusedRotate),
    "swiglu": (GatedProduct, FusedProduct),
}
"""The plain module and the fused one of each operation; keys as in the recipe's `[kernels]`."""


def use_kernels(model: nn.Module, operations: Collection[str]) -> None:
    """Exchange the modules of these operations, in place; not all operations are modules."""
    fused = {plain: by_kernel for name, (plain, by_kernel) in FUSED.items() if name in operations}
    for module in model.modules():
        if type(module) in fused:
            module.__class__ = fused[type(module)]
