"""Liger-Kernel's operations, called with the arguments of ours: a contestant in the benchmark, where it is installed.

Signatures and layouts are those of liger-kernel 0.6.2 and later. Nothing is imported before a call. Its backward passes
write on what they were given, so what is compared with it needs arguments of its own.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any

import torch
from torch import Tensor


def version() -> str | None:
    """The release that is installed, if one is."""
    try:
        return installed_version("liger_kernel")
    except PackageNotFoundError:
        return None


def _function(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """With Llama's roundings, and a gradient that is not written over the one that comes in."""
    return _function("rms_norm", "LigerRMSNormFunction").apply(x, weight, eps, 0.0, "llama", False)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same with the addition before it."""
    function = _function("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
    normed, summed = function.apply(x, residual, weight, eps, 0.0, "llama", False)
    return normed, summed


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """It takes [batch, heads, seq, head_dim] and [1, seq, head_dim], and puts heads and sequence back by itself."""
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    # Some releases hand the angles back too.
    rotated = _function("rope", "LigerRopeFunction").apply(q, k, cos.squeeze(2), sin.squeeze(2))
    return rotated[0].transpose(1, 2), rotated[1].transpose(1, 2)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return _function("swiglu", "LigerSiLUMulFunction").apply(gate, up)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Summed over tokens, and the gradient of the weight summed in float32, as ours is."""
    function = _function("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    bias = class_weight = softcap = None
    ignore_index, z_loss, smoothing, also_z_loss = -100, 0.0, 0.0, False
    returned = function.apply(
        hidden, weight, labels, bias, class_weight, ignore_index, z_loss, smoothing, "sum", softcap, also_z_loss,
        torch.float32,
    )  # fmt: skip
    return returned[0]
