"""How DTensor may split an operation: each offers its ways, and DTensor picks the one that moves least.

A way says, for one dimension of the mesh, how each result and each argument lies on it. Arguments that are no tensors
have None. A build of torch without torch.distributed has no DTensor; there the registration does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Way = tuple[list[Any], list[Any]]
"""Placements of the results, placements of the arguments."""


def offers(op: Any) -> Callable[[Callable[..., Sequence[Way]]], Callable[..., Sequence[Way]]]:
    """Decorator for a function of `op`'s arguments (tensors by their DTensor specs) that returns the ways to split."""
    if not torch.distributed.is_available():
        return lambda ways: ways
    from torch.distributed.tensor.experimental import register_sharding

    register: Callable[[Callable[..., Sequence[Way]]], Callable[..., Sequence[Way]]] = register_sharding(op)
    return register
