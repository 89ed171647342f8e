"""Fused kernels for layers, with the same values; they fall back to PyTorch where they do not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from titanlite_kernels.rms_norm import add_rms_norm, rms_norm
from titanlite_kernels.rope import rope
from titanlite_kernels.swiglu import swiglu
from torch import Tensor, nn

from titanlite.models.layers import GatedProduct, RMSNorm, Rotate, Rotation


def _rotate(q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    return rope(q, k, rotation.cos, rotation.sin)


RMS_NORM = rms_norm, add_rms_norm  # (x, weight, eps) -> normed, and (x, residual, weight, eps) -> (normed sum, sum)
ROPE = _rotate  # (q, k, rotation) -> q and k turned
SWIGLU = swiglu  # (gate, up) -> silu(gate) * up


class FusedRMSNorm(RMSNorm):
    """An RMSNorm by kernels of the forms above."""

    def __init__(self, whole: RMSNorm, norm: Callable[..., Tensor], add_norm: Callable[..., Any]) -> None:
        super().__init__(0, whole.eps)
        self.weight, self.norm, self.add_norm = whole.weight, norm, add_norm

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """`residual`: see `of_sum`."""
        more = (self.weight, self.eps)
        return self.norm(x, *more) if residual is None else self.add_norm(x, residual, *more)

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(self(h), h) for h = x + residual, both at once."""
        normed, h = self(x, residual)  # as a call of the module: hooks see it
        return normed, h


class FusedOperation(nn.Module):
    """In the place of a `Rotate` or `GatedProduct`: a kernel of the same arguments, of the form above."""

    def __init__(self, kernel: Callable[..., Any]) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, *arguments: Any) -> Any:
        return self.kernel(*arguments)

    def extra_repr(self) -> str:
        return getattr(self.kernel, "__name__", type(self.kernel).__name__)


def use_kernels(model: nn.Module, kernels: Mapping[str, Any]) -> None:
    """Replace layers, in place, by kernels of the forms above under keys of the recipe's `[kernels]`.

    What a family derives from these layers computes something else, and stays.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is RMSNorm and "rms_norm" in kernels:
                setattr(parent, name, FusedRMSNorm(child, *kernels["rms_norm"]))
            elif type(child) is Rotate and "rope" in kernels:
                setattr(parent, name, FusedOperation(kernels["rope"]))
            elif type(child) is GatedProduct and "swiglu" in kernels:
                setattr(parent, name, FusedOperation(kernels["swiglu"]))
