"""From the recipe's `[optimizer]` to something that steps and whose state has names.

Whether a step is taken is a tensor on the device, so that a step with a non-finite gradient is passed over without
asking the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titanlite.models.spec import ModelSpec
from titanlite.optim.adamw import AdamW
from titanlite.optim.muon import Exchange, Muon
from titanlite.optim.names import OPTIMIZERS
from titanlite.recipe.sections import Optimizer as Section


class Optimizer:
    """AdamW for some parameters and, if the recipe says so, Muon for others; one state table by parameter name."""

    def __init__(self, section: Section, adamw: Mapping[str, Tensor], muon: Muon | None) -> None:
        self.section = section
        self._adamw = AdamW(adamw, section.betas, section.eps, section.weight_decay)
        self._muon = muon

    def step(self, factor: float, taken: Tensor) -> None:
        """One update at `factor` times the peak learning rates, where `taken` (bool scalar on the device) is true."""
        self._adamw.step(self.section.lr * factor, taken)
        if self._muon is not None:
            self._muon.step(self.section.muon_lr * factor, taken)

    def state(self) -> dict[str, Tensor]:
        """`<parameter>/<kind>` -> tensor, live: copying into these restores the optimizer."""
        return dict([*self._adamw.state(), *(self._muon.state() if self._muon is not None else ())])


@dataclass(frozen=True)
class Weights:
    """What an optimizer updates: what this rank holds of each parameter, and how cut matrices come together."""

    held: Mapping[str, Tensor]
    exchange: Exchange | None = None
    """None where this rank alone holds every matrix whole."""
    device: torch.device | None = None
    """Where matrices are multiplied; None: where they rest."""

    @staticmethod
    def of(model: nn.Module) -> Weights:
        """Those of a model that is whole on its rank."""
        return Weights(dict(model.named_parameters()))


def build_optimizer(section: Section, spec: ModelSpec, weights: Weights, compute: torch.dtype) -> Optimizer:
    """The optimizer that the recipe names, over all of `weights`."""
    optimizer: Optimizer = OPTIMIZERS.get(section.name)(section, spec, weights, compute)
    return optimizer


def build_adamw(section: Section, spec: ModelSpec, weights: Weights, compute: torch.dtype) -> Optimizer:
    """AdamW for everything."""
    return Optimizer(section, weights.held, None)


def build_muon(section: Section, spec: ModelSpec, weights: Weights, compute: torch.dtype) -> Optimizer:
    """Muon for the blocks' matrices, AdamW for embedding, head and norms."""
    matrices = {name: held for name, held in weights.held.items() if spec.is_block_matrix(name)}
    rest = {name: held for name, held in weights.held.items() if name not in matrices}
    momentum, decay = section.muon_momentum, section.weight_decay
    return Optimizer(section, rest, Muon(matrices, momentum, decay, compute, weights.exchange, weights.device))
