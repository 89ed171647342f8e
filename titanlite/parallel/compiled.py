"""torch.compile per unit: each block is compiled once and its code reused by all of them, so start-up stays short."""

from __future__ import annotations

from torch import nn

from titanlite.models.spec import ModelSpec, is_named_by


def compile_units(model: nn.Module, spec: ModelSpec) -> None:
    """Compile, in place and at first use, every submodule that the spec names; parameter names do not change."""
    for name, module in model.named_modules():
        if is_named_by(spec.compile_units, name):
            module.compile(dynamic=False)
