"""Runs of a small model whose linears multiply in float8: sizes are multiples of 32, on two ranks of a tp group too."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from support.parity.parity_runs import small_recipe
from titanlite.parallel.tensor import _Gather, _Scatter
from titanlite.plan.float8 import Cast
from titanlite.recipe.sections import Recipe

MODEL = {"dim": 64, "layers": 3, "heads": 4, "kv_heads": 4, "ffn_dim": 128, "vocab_size": 272}


def float8_recipe(corpus: str, recipe: str, **sections: dict[str, Any]) -> Recipe:
    """In float64, but for the factors of products."""
    sections.setdefault("training", {"microbatch": 1})
    section = {"enabled": True, "recipe": recipe, "min_size": 0}
    precision = {"compute": "float64", "float8": section, **sections.pop("precision", {})}
    return small_recipe(corpus, model=MODEL, optimizer={"lr": 1e-3}, precision=precision, **sections)


def whole_sequences() -> torch.Tensor:
    """[batch, sequence, width]; two ranks' messages of it need filling up, to whole multiples of eight bytes."""
    x = torch.randn(3, 4, 19, generator=torch.Generator().manual_seed(0))
    return (x * torch.logspace(-3, 3, 4)[:, None]).bfloat16()


def sequences_gathered(rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a rank's part of them becomes on the way to a matrix, and as the gradient of what a matrix gave."""
    part = whole_sequences().chunk(ranks, 1)[rank]
    group = dist.group.WORLD
    gathered: torch.Tensor = _Gather.apply(part, group, Cast("e4m3", "row"))
    summand = whole_sequences().requires_grad_()
    _Scatter.apply(summand, group, Cast("e5m2", "row")).backward(part)
    assert summand.grad is not None
    return gathered, summand.grad
