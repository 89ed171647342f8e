"""A model that is whole on one rank, as the rest of the program sees it."""

from __future__ import annotations

from torch import nn

from titanlite.parallel.shards import Shards
from titanlite.plan.placement import Mesh, Placement


def shards_of(model: nn.Module) -> Shards:
    parameters = dict(model.named_parameters())
    mesh = Mesh((("pp", 1),))
    return Shards(parameters, {name: Placement(tuple(p.shape), mesh, (), (0,)) for name, p in parameters.items()}, {})
