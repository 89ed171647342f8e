"""Into how many parts the ranks cut the tensors of a checkpoint, and how many its table has room for."""

from __future__ import annotations

from collections import Counter
from math import prod

from titanlite.models.spec import ModelSpec
from titanlite.optim.base import optimizer_spec
from titanlite.plan.layout import Layout, ceil_div
from titanlite.plan.placement import GroupRank, Placement, find_placements, local_shape
from titanlite.recipe.sections import Recipe

MAX_CHUNKS = 2**23
"""At about 150 bytes each. 405B on 16,384 ranks (tp 8 x pp 16 x 128) make 2.8 million with AdamW's moments; 70B that
4,096 ranks cut make 7.4 million. The rule `layout.parts` refuses a run that would make more."""
SHARED_BYTES = 2**24
"""A box is cut so that the processes that have it share its writing, but not into parts smaller than this."""
FILE_BYTES = 2**29
"""A new file begins when the one before would grow past this. Files are what is read at once, and by whom."""


def part_count(rows: int, nbytes: int, copies: int, file_bytes: int) -> int:
    """Into how many parts the `copies` processes that hold a box of `rows` rows and `nbytes` bytes cut it."""
    return min(rows, max(1, -(-nbytes // file_bytes), min(copies, nbytes // SHARED_BYTES)))


def count_parts(recipe: Recipe, spec: ModelSpec, layout: Layout, file_bytes: int = FILE_BYTES) -> int:
    """How many parts of weights and moments the ranks write: each box that some hold, cut as when saving."""
    config, states = spec.configure(recipe.model), optimizer_spec(recipe.optimizer.name).states
    copies, cut = layout.weights(recipe.parallel.zero_stage)
    width = 8 if recipe.precision.compute == "float64" else 4
    shapes = spec.shapes(config)
    cuts, tied = find_placements(shapes, spec.sharding(config)), spec.tied(config).values()
    alike: Counter[tuple[tuple[int, ...], Placement | None, int]] = Counter()
    for name, shape in shapes.items():
        holders = copies * (1 if name in cuts else layout.tp) * (2 if name in tied and layout.pp > 1 else 1)
        alike[shape, cuts.get(name), holders] += 1 + states(spec.is_block_matrix(name))
    number = 0
    for (shape, placement, holders), tensors in alike.items():
        for rank in range(layout.tp if placement else 1):
            size = local_shape(shape, placement, GroupRank(rank, layout.tp))
            rows = max(1, ceil_div(size[0], cut))
            for height, boxes in ((rows, size[0] // rows), (size[0] % rows, 1)):
                nbytes = width * height * prod(size[1:])
                number += tensors * boxes * part_count(height, nbytes, holders, file_bytes)
    return number
