"""The optimizers a recipe can name."""

from __future__ import annotations

from titanlite.registry import Registry

OPTIMIZERS = Registry(
    "optimizer",
    {
        "adamw": "titanlite.optim.build:build_adamw",
        "muon": "titanlite.optim.build:build_muon",
    },
)
