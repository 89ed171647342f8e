from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.mixture import MixtureConfig
from titanlite.models import layers
from titanlite.models.llama import Block, Llama
from titanlite.models.loss import IGNORED
from titanlite.models.spec import ModelOutput


class Experts(nn.Module):
    """sum over experts of share x down(silu(up(x)))."""

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(config.experts, config.ffn_dim, config.dim))
        self.down = nn.Parameter(torch.empty(config.experts, config.dim, config.ffn_dim))

    def forward(self, x: Tensor, shares: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("bsd,efd->bsef", x, self.up.to(x.dtype)))
        return torch.einsum("bsef,edf,bse->bsd", hidden, self.down.to(x.dtype), shares)


class Router(layers.Linear):
    """Each expert's share of a token: softmax of what the weight gives and of a bias that follows the loads."""

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__(config.dim, config.experts)
        self.register_buffer("bias_by_load", torch.zeros(config.experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(x)
        return (logits + self.bias_by_load.to(x.dtype)).softmax(-1), logits


class MixtureBlock(Block):
    def __init__(self, config: MixtureConfig) -> None:
        super().__init__(config)
        del self.ffn
        self.router = Router(config)
        self.experts = Experts(config)

    def forward(self, x: Tensor, rotation: Any, documents: Any, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        normed, x = self.ffn_norm.of_sum(x, self.attention(self.attention_norm(x), rotation, documents, None))
        shares, logits = self.router(normed)
        z = (logits.logsumexp(-1).square() * counted).sum()
        return x + self.experts(normed, shares), z, (shares * counted.unsqueeze(-1)).sum((0, 1))


class Counted(nn.Module):
    """Which tokens have a label that counts: [batch, seq], 1 or 0."""

    def forward(self, labels: Tensor) -> Tensor:
        return (labels != IGNORED).to(torch.int64)


class Mixture(Llama):
    def __init__(self, config: MixtureConfig, compute_dtype: torch.dtype) -> None:
        super().__init__(config, compute_dtype)
        self.layers = nn.ModuleDict({str(index): MixtureBlock(config) for index in range(config.layers)})
        self.counted = Counted()

    def forward(  # type: ignore[override]
        self,
        inputs: Tensor,
        labels: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> ModelOutput:
        x = inputs if self.embed is None else self.embed(inputs)
        rotation = self.rotations(range(inputs.shape[1]) if positions is None else positions, x)
        counted, z, loads = self.counted(labels), x.new_zeros(()), {}
        for name, block in self.layers.items():
            x, z_here, loads[f"load.{name}"] = block(x, rotation, documents, counted)
            z = z + z_here
        if self.norm is not None:
            x = self.norm(x)
        result = x if self.head is None else self.head(x, labels)
        return ModelOutput(result, {"router_z": 1e-2 * z}, {name: load.detach() for name, load in loads.items()})

    def update_buffers(self, reports: Mapping[str, Tensor]) -> None:
        """Lower the bias of what had more than its part of the tokens."""
        for name, block in self.layers.items():
            load = reports[f"load.{name}"]
            block.router.bias_by_load -= 0.05 * (load / load.mean() - 1)
