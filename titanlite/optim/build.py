"""From the recipe's `[optimizer]` to something that steps and whose state has names.

Weight decay falls on matrices only. Whether a step is taken is a tensor on the device, so that a step with a
non-finite gradient is passed over without asking the host.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from titanlite.models.spec import ModelSpec
from titanlite.optim.muon import Muon
from titanlite.optim.names import OPTIMIZERS
from titanlite.recipe.sections import Optimizer as Section


class Optimizer:
    """AdamW for some parameters and, if the recipe says so, Muon for others; one state table by parameter name."""

    def __init__(self, section: Section, adamw: Mapping[str, nn.Parameter], muon: Muon | None) -> None:
        self.section = section
        self._adamw_parameters = adamw
        self._muon = muon
        self._adamw = _fused_adamw(section, adamw)

    def step(self, factor: float, taken: Tensor) -> None:
        """One update at `factor` times the peak learning rates, where `taken` (bool scalar on the device) is true."""
        for group in self._adamw.param_groups:
            group["lr"] = self.section.lr * factor
        # The fused kernels read this attribute as GradScaler sets it: where it is 1, nothing changes.
        self._adamw.found_inf = (~taken).float()  # type: ignore[attr-defined]
        self._adamw.step()
        if self._muon is not None:
            self._muon.step(self.section.muon_lr * factor, taken)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self._adamw.zero_grad(set_to_none=True)
        if self._muon is not None:
            self._muon.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """`<parameter>/<kind>` -> tensor, live: copying into these restores the optimizer."""
        table = {}
        for name, parameter in self._adamw_parameters.items():
            for kind, tensor in self._adamw.state[parameter].items():
                table[f"{name}/{kind}"] = tensor
        if self._muon is not None:
            table.update({f"{name}/{kind}": tensor for name, kind, tensor in self._muon.state()})
        return table


def build_optimizer(section: Section, spec: ModelSpec, model: nn.Module, compute: torch.dtype) -> Optimizer:
    """The optimizer that the recipe names, over every parameter of `model`."""
    parameters = dict(model.named_parameters())
    optimizer: Optimizer = OPTIMIZERS.get(section.name)(section, spec, parameters, compute)
    return optimizer


def build_adamw(
    section: Section, spec: ModelSpec, parameters: dict[str, nn.Parameter], compute: torch.dtype
) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019) for everything."""
    return Optimizer(section, parameters, None)


def build_muon(
    section: Section, spec: ModelSpec, parameters: dict[str, nn.Parameter], compute: torch.dtype
) -> Optimizer:
    """Muon for the blocks' matrices, AdamW for embedding, head and norms."""
    matrices = {name: p for name, p in parameters.items() if spec.is_block_matrix(name)}
    rest = {name: p for name, p in parameters.items() if name not in matrices}
    return Optimizer(section, rest, Muon(matrices, section.muon_momentum, section.weight_decay, compute))


def _fused_adamw(section: Section, parameters: Mapping[str, nn.Parameter]) -> torch.optim.AdamW:
    decayed = [p for p in parameters.values() if p.dim() >= 2]
    others = [p for p in parameters.values() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": section.weight_decay}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=True)
    for parameter in parameters.values():
        # Made here rather than at the first step, so that a checkpoint has somewhere to load into.
        adamw.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return adamw
