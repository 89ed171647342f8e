"""Layers that run fused kernels of `titanlite_kernels`: same parameters, same values.

`plan.kernels` chooses them by the recipe; the kernels themselves fall back to PyTorch where they do not fit.
"""

from __future__ import annotations

from collections.abc import Collection

from titanlite_kernels.rms_norm import add_rms_norm, rms_norm
from titanlite_kernels.rope import rope
from titanlite_kernels.swiglu import swiglu
from torch import Tensor, nn

from titanlite.models.layers import Attention, RMSNorm, Rotation, SwiGLU


def use_kernels(model: nn.Module, operations: Collection[str]) -> None:
    """Have layers run these operations (keys of the recipe's `[kernels]`) by kernels; not all are layers'."""
    for module in model.modules():
        if isinstance(module, RMSNorm) and "rms_norm" in operations:
            module.kernels = rms_norm, add_rms_norm
        elif isinstance(module, Attention) and "rope" in operations:
            module.rotate = _rotate
        elif isinstance(module, SwiGLU) and "swiglu" in operations:
            module.product = swiglu


def _rotate(q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    return rope(q, k, rotation.cos, rotation.sin)
