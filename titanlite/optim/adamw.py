"""AdamW (Loshchilov & Hutter 2019), by torch's fused kernel: one launch for all parameters, no host sync."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from titanlite.models.spec import ModelSpec
from titanlite.optim.base import Optimizer, OptimizerSpec, Weights
from titanlite.recipe import sections

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class AdamW:
    """Two moments of every parameter, one step count for all; weight decay falls on matrices only."""

    def __init__(self, parameters: Mapping[str, Tensor], section: sections.Optimizer) -> None:
        import torch

        self._section = section
        self._moments = {name: (torch.zeros_like(p.data), torch.zeros_like(p.data)) for name, p in parameters.items()}
        self._steps = torch.zeros((), dtype=torch.float32, device=next(iter(parameters.values())).device)
        held = [(p, *self._moments[name]) for name, p in parameters.items() if p.numel()]  # a rank may hold no rows
        matrices = [each for each in held if each[0].dim() >= 2]
        vectors = [each for each in held if each[0].dim() < 2]
        self._groups = [(group, decay) for group, decay in ((matrices, section.weight_decay), (vectors, 0.0)) if group]

    def state(self) -> Iterable[tuple[str, Tensor]]:
        """The moments, and `adamw/steps`, a float32 scalar."""
        yield "adamw/steps", self._steps
        for name, (average, square) in self._moments.items():
            yield f"{name}/average", average
            yield f"{name}/square", square

    def step(self, lr: float, taken: Tensor) -> None:
        import torch

        with torch.no_grad():
            self._steps += taken
            for group, weight_decay in self._groups:
                parameters, averages, squares = map(list, zip(*group, strict=True))
                gradients, (beta1, beta2) = [parameter.grad for parameter in parameters], self._section.betas
                torch._fused_adamw_(
                    parameters, gradients, averages, squares, [], [self._steps] * len(group), amsgrad=False,
                    lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=self._section.eps, maximize=False,
                    found_inf=(~taken).float(),  # where this is 1 the kernel writes nothing
                )  # fmt: skip


def build(recipe: sections.Recipe, model: ModelSpec, weights: Weights, compute: torch.dtype) -> Optimizer:
    """AdamW for everything."""
    return Optimizer((recipe.optimizer.lr, AdamW(weights.held, recipe.optimizer)))


KEYS = ("lr", "betas", "eps", "weight_decay")
SPEC = OptimizerSpec(build, keys=KEYS, rates=("lr",), states=lambda block_matrix: 2)
