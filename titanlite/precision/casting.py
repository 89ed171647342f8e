"""Which number format holds what: activations in the compute dtype, everything that sums or persists wider."""

from __future__ import annotations

import torch

from titanlite.recipe.sections import Precision

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def compute_dtype(section: Precision) -> torch.dtype:
    """Dtype of activations and matrix products."""
    return _DTYPES[section.compute]


def master_dtype(section: Precision) -> torch.dtype:
    """Dtype of weights, gradients and optimizer states: float32, or float64 in a float64 run."""
    return torch.float64 if section.compute == "float64" else torch.float32


def reduce_dtype(section: Precision) -> torch.dtype:
    """Dtype in which gradients are summed over ranks."""
    return torch.float64 if section.compute == "float64" else _DTYPES[section.reduce]
