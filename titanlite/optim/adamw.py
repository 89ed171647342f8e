"""AdamW (Loshchilov & Hutter 2019) on torch's fused kernel, called directly.

`torch.optim.AdamW` does Python work for every parameter at every step, and constructing it imports the compiler
(1.2 s). The kernel takes the lists as they are, and a flag on the device that says whether to update at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


class AdamW:
    """Two moments of every parameter, one step count for all; weight decay falls on matrices only."""

    def __init__(
        self, parameters: Mapping[str, Tensor], betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        self.betas = betas
        self.eps = eps
        self._names = list(parameters)
        self._parameters = list(parameters.values())
        self._averages = [torch.zeros_like(p.data) for p in self._parameters]
        self._squares = [torch.zeros_like(p.data) for p in self._parameters]
        self._steps = torch.zeros((), dtype=torch.float32, device=self._parameters[0].device)
        held = [(index, p.dim()) for index, p in enumerate(self._parameters) if p.numel()]  # a rank may hold no rows
        matrices = [index for index, dimensions in held if dimensions >= 2]
        vectors = [index for index, dimensions in held if dimensions < 2]
        self._groups = [(group, decay) for group, decay in ((matrices, weight_decay), (vectors, 0.0)) if group]

    def state(self) -> Iterable[tuple[str, Tensor]]:
        """(`<parameter>/<kind>`, live tensor): copying into these restores the optimizer."""
        yield "adamw/steps", self._steps
        for name, average, square in zip(self._names, self._averages, self._squares, strict=True):
            yield f"{name}/average", average
            yield f"{name}/square", square

    @torch.no_grad()
    def step(self, lr: float, taken: Tensor) -> None:
        """One update at learning rate `lr` where `taken` (bool scalar on the device) is true; else nothing changes."""
        self._steps += taken
        for group, weight_decay in self._groups:
            torch._fused_adamw_(
                [self._parameters[index] for index in group],
                [self._parameters[index].grad for index in group],  # type: ignore[misc]
                [self._averages[index] for index in group],
                [self._squares[index] for index in group],
                [],
                [self._steps] * len(group),
                lr=lr,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=weight_decay,
                eps=self.eps,
                amsgrad=False,
                maximize=False,
                found_inf=(~taken).float(),  # where this is 1 the kernel writes nothing
            )
