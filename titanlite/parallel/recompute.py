"""Activations computed a second time in the backward pass, instead of kept (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titanlite.models.spec import ModelSpec, is_named_by
from titanlite.recipe.sections import Recompute

_OPERATIONS = (
    "aten.mm",
    "aten.bmm",
    "aten.addmm",
    "aten._scaled_mm",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    # What another rank took part in would have to be asked of it again.
    "_c10d_functional.all_gather_into_tensor",
    "_c10d_functional.reduce_scatter_tensor",
)
"""What takes long to compute for the memory that its result needs: products, attention, communication."""


def recompute_units(model: nn.Module, spec: ModelSpec, section: Recompute) -> None:
    """Have every `section.every`-th of the submodules that the spec names drop its activations, in place."""
    if section.mode == "none":
        return
    units = [module for name, module in model.named_modules() if is_named_by(spec.recompute_units, name)]
    for module in units[:: section.every]:
        module.forward = _checkpointed(module.forward, selective=section.mode == "selective")


def set_memory_budget(budget: float | None) -> None:
    """Have the compiler keep only this part of the activations' memory, in every graph of this process."""
    if budget is not None:
        torch._functorch.config.activation_memory_budget = budget


def _checkpointed(forward: Callable[..., Any], selective: bool) -> Callable[..., Any]:
    # Training draws no random numbers, so there is no state of generators to keep for the second time.
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if selective:
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def run(*arguments: Any, **named: Any) -> Any:
        return checkpoint(forward, *arguments, **settings, **named)

    return run


def _policy(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    kept = str(getattr(operation, "overloadpacket", operation)) in _OPERATIONS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
