"""Fused kernels for layers, with the same values; they fall back to PyTorch where they do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titanlite_kernels.rms_norm import add_rms_norm, rms_norm
from titanlite_kernels.rope import rope
from titanlite_kernels.swiglu import swiglu
from torch import Tensor, nn

from titanlite.models.layers import Attention, RMSNorm, Rotation, SwiGLU


def _rotate(q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    return rope(q, k, rotation.cos, rotation.sin)


RMS_NORM = rms_norm, add_rms_norm  # (x, weight, eps) -> normed, and (x, residual, weight, eps) -> (normed sum, sum)
ROPE = _rotate  # (q, k, rotation) -> q and k turned
SWIGLU = swiglu  # (gate, up) -> silu(gate) * up


def use_kernels(model: nn.Module, kernels: Mapping[str, Any]) -> None:
    """Have layers run operations (keys of the recipe's `[kernels]`) by these kernels, of the forms above."""
    for module in model.modules():
        if isinstance(module, RMSNorm) and "rms_norm" in kernels:
            module.kernels = kernels["rms_norm"]
        elif isinstance(module, Attention) and "rope" in kernels:
            module.rotate = kernels["rope"]
        elif isinstance(module, SwiGLU) and "swiglu" in kernels:
            module.product = kernels["swiglu"]
