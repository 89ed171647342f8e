"""AdamW (Loshchilov & Hutter 2019) on torch's fused kernel, called directly.

`torch.optim.AdamW` does Python work for every parameter at every step, and constructing it imports the compiler
(1.2 s). The kernel takes the lists as they are, and a flag on the device that says whether to update at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class AdamW:
    """First and second moments of every parameter, one step count; weight decay falls on matrices only."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        self.betas = betas
        self.eps = eps
        self._parameters = parameters
        device = next(iter(parameters.values())).device
        self._steps = torch.zeros((), dtype=torch.float32, device=device)
        self._averages = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
        self._squares = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
        matrices = [name for name, p in parameters.items() if p.dim() >= 2]
        vectors = [name for name, p in parameters.items() if p.dim() < 2]
        self._groups = [(names, decay) for names, decay in ((matrices, weight_decay), (vectors, 0.0)) if names]

    def state(self) -> Iterable[tuple[str, Tensor]]:
        """(`<parameter>/<kind>`, live tensor): copying into these restores the optimizer."""
        yield "adamw/steps", self._steps
        for name in self._parameters:
            yield f"{name}/average", self._averages[name]
            yield f"{name}/square", self._squares[name]

    @torch.no_grad()
    def step(self, lr: float, taken: Tensor) -> None:
        """One update at learning rate `lr` where `taken` (bool scalar on the device) is true; else nothing changes."""
        self._steps += taken
        for names, weight_decay in self._groups:
            torch._fused_adamw_(
                [self._parameters[name] for name in names],
                [self._parameters[name].grad for name in names],
                [self._averages[name] for name in names],
                [self._squares[name] for name in names],
                [],
                [self._steps] * len(names),
                lr=lr,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=weight_decay,
                eps=self.eps,
                amsgrad=False,
                maximize=False,
                found_inf=(~taken).float(),  # where this is 1 the kernel writes nothing
            )
