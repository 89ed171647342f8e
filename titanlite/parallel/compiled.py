"""torch.compile per unit: each block is compiled once and its code reused by all of them, so start-up stays short."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from titanlite.models.spec import ModelSpec


def compile_units(model: nn.Module, spec: ModelSpec) -> None:
    """Compile, in place and at first use, every submodule that the spec names; parameter names do not change."""
    for name, module in model.named_modules():
        if any(fnmatchcase(name, pattern) and name.count(".") == pattern.count(".") for pattern in spec.compile_units):
            module.compile(dynamic=False)
