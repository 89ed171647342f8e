"""What an optimizer is: its facts, without torch, and the builder of its update rule.

An optimizer is one file with an `OptimizerSpec`, and a line in `OPTIMIZERS` (or, in a plugin, `OPTIMIZERS.add`). It
imports torch inside functions only, so that `titanlite check` can read its facts at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from titanlite.models.spec import ModelSpec
from titanlite.recipe.sections import Recipe
from titanlite.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from titanlite.parallel.shards import MatrixExchange


class UpdateRule(Protocol):
    """Updates some parameters in place from their gradients."""

    def step(self, lr: float, taken: Tensor) -> None:
        """One update at learning rate `lr` where `taken` (bool scalar on the device) is true; else nothing changes.

        A tensor, so that a step with a gradient that is not finite is passed over without a host sync.
        """

    def state(self) -> Iterable[tuple[str, Tensor]]:
        """(`<parameter>/<kind>`, live tensor), all zero at first: copying into these restores the rule."""


class Optimizer:
    """Update rules over disjoint parameters, each with its own peak learning rate."""

    def __init__(self, *rules: tuple[float, UpdateRule]) -> None:
        self.rules = rules

    def state(self) -> dict[str, Tensor]:
        """`<parameter>/<kind>` -> tensor, live: copying into these restores the optimizer."""
        return {name: tensor for _, rule in self.rules for name, tensor in rule.state()}


@dataclass(frozen=True)
class Weights:
    """What an optimizer updates: what this rank holds of each parameter, and how cut matrices come together."""

    held: Mapping[str, Tensor]
    exchange: MatrixExchange | None = None
    """None where this rank alone holds every matrix whole."""
    device: torch.device | None = None
    """Where matrices are multiplied; None: where they rest."""


@dataclass(frozen=True)
class OptimizerSpec:
    build: Callable[[Recipe, ModelSpec, Weights, torch.dtype], Optimizer]
    """(recipe, model family, weights, dtype of products) -> the optimizer of all of `weights`."""
    keys: tuple[str, ...]
    """Keys of `[optimizer]` that it reads, besides `name` and `clip_norm`; `check` warns of others that are set."""
    rates: tuple[str, ...]
    """Those of `keys` that are peak learning rates."""
    states: Callable[[bool], int]
    """(whether a parameter is a block's matrix) -> tensors of the parameter's shape and dtype that it keeps for it."""


OPTIMIZERS = Registry("optimizer", {name: f"titanlite.optim.{name}:SPEC" for name in ("adamw", "muon")})
optimizer_spec: Callable[[str], OptimizerSpec] = OPTIMIZERS.get
