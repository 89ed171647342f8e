"""The bytes that a rank holds from step to step, and gathers for a pass; the parts that a checkpoint is cut into.

By arithmetic; docs/dry_run.md says how far from that a dry run may measure. Activations are known to dry runs only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

from titanlite.models.spec import ModelSpec, is_named_by, spec_of
from titanlite.optim.base import optimizer_spec
from titanlite.plan.float8 import decide_linears
from titanlite.plan.layout import Layout, ceil_div
from titanlite.plan.placement import FSDP, Placement, Shape, module_within, place
from titanlite.plan.stages import SPLIT_BACKWARD
from titanlite.recipe.sections import Recipe

_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
# At about 150 bytes each. 405B on 16,384 ranks (tp 8 x pp 16 x 128) make 2.8 million with AdamW's moments; 70B that
# 4,096 ranks cut make 7.4 million. The rule `layout.parts` refuses a run that would make more.
MAX_CHUNKS = 2**23
SHARED_BYTES = 2**24  # a box is cut so that the processes that have it share its writing, but into no smaller parts
FILE_BYTES = 2**29  # a new file begins when the one before would grow past this


@dataclass(frozen=True)
class LocalParameter:
    """A parameter on one rank. Shapes may have no rows."""

    name: str
    whole: Shape
    used: Shape  # what it computes with: its tensor parallel part
    kept: Shape  # what it keeps of that from step to step: its rows of it, in ZeRO stages 1 to 3


def local_parameters(table: Mapping[str, Placement], rank: int) -> list[LocalParameter]:
    """The parameters that the stages of a rank compute with. First ranks of a stage keep the most."""
    return [
        LocalParameter(name, each.shape, each.part(rank, gathered=True)[1], each.part(rank)[1])
        for name, each in table.items()
        if each.on_stage_of(rank)
    ]


def count_elements(shapes: Iterable[Shape]) -> int:
    return sum(map(prod, shapes))


def state_bytes(recipe: Recipe, layout: Layout, parameters: Sequence[LocalParameter]) -> dict[str, int]:
    """Bytes on a rank with these parameters of what lives from step to step, and of the weights gathered for a pass.

    What the ZeRO stage does not cut is there in whole: gradients below stage 2, gathered weights below stage 3.
    Schedules that split the backward pass sum gradients once a step in any stage, and have them in whole until then.
    """
    spec, stage = spec_of(recipe.model.preset), recipe.parallel.zero_stage
    states = optimizer_spec(recipe.optimizer.name).states
    width = max(4, _BYTES[recipe.precision.compute])
    kept, used = (count_elements(getattr(each, part) for each in parameters) for part in ("kept", "used"))
    once_a_step = stage < 2 or (layout.pp > 1 and recipe.parallel.pipeline.schedule in SPLIT_BACKWARD)
    parts = {
        "weights": width * kept,
        "gathered": _BYTES[recipe.precision.compute] * _gathered(recipe, layout, parameters),
        "gradients": width * (used if once_a_step else kept),
        "optimizer": width * sum(prod(each.kept) * states(spec.is_block_matrix(each.name)) for each in parameters),
    }
    linears = decide_linears(spec, spec.configure(recipe.model), recipe.precision.float8)
    converted = {f"{each.name}.weight" for each in linears if each.skipped is None}
    casts = 2 * count_elements(each.used for each in parameters if each.name in converted)  # one for each product
    if casts and layout.weights(stage)[1] == 1 and not recipe.parallel.offload:
        parts["float8"] = casts  # once a step, of weights that rest whole
    return {**parts, "total": sum(parts.values())}


def checkpoint_bytes(recipe: Recipe) -> int:
    """Bytes of a checkpoint's tensors: weights and optimizer states in whole, over however many ranks they lie."""
    alone = Layout(dp_replicate=1, dp_shard=1)
    states = state_bytes(recipe, alone, local_parameters(place(recipe, alone), rank=0))
    return states["weights"] + states["optimizer"]


def _gathered(recipe: Recipe, layout: Layout, parameters: Sequence[LocalParameter]) -> int:
    """Parameters that lie gathered, in the compute dtype, at the fullest moment of a pass. In stage 3 they are the ones
    outside the units, the unit at work, those asked for ahead of it (one at least, in backward), and the last unit,
    which backward begins with, where no pipeline comes between; below it, all.
    """
    parallel, spec = recipe.parallel, spec_of(recipe.model.preset)
    if layout.data_ranks * layout.cp == 1 and not parallel.offload:
        return 0
    if parallel.zero_stage < 3:
        return count_elements(each.used for each in parameters)
    tied = set(spec.tied(spec.configure(recipe.model)).values())
    units: dict[str, int] = {"": 0}
    for each in parameters:
        unit = "" if each.name in tied else module_within(each.name, partial(is_named_by, spec.shard_units))
        units[unit] = units.get(unit, 0) + prod(each.used)
    resting = units.pop("")
    if units and layout.pp == 1:
        resting += units.pop(next(reversed(units)))
    sizes, together = list(units.values()), 1 + max(parallel.prefetch, 1)
    return resting + max((sum(sizes[first : first + together]) for first in range(len(sizes))), default=0)


def part_count(rows: int, nbytes: int, copies: int, file_bytes: int) -> int:
    """Into how many parts the `copies` processes that hold a box of `rows` rows and `nbytes` bytes cut it."""
    return min(rows, max(1, ceil_div(nbytes, file_bytes), min(copies, nbytes // SHARED_BYTES)))


def count_parts(recipe: Recipe, spec: ModelSpec, layout: Layout, file_bytes: int = FILE_BYTES) -> int:
    """How many parts of weights and moments the ranks write: each box that some hold, cut as when saving."""
    states, width = optimizer_spec(recipe.optimizer.name).states, max(4, _BYTES[recipe.precision.compute])
    alike: Counter[Placement] = Counter()
    for name, placement in place(recipe, layout).items():
        alike[placement] += 1 + states(spec.is_block_matrix(name))
    number = 0
    for placement, tensors in alike.items():
        first = placement.stages[0] * layout.size // layout.pp  # of the ranks that hold it
        (copies, _), ranks = placement.copies(first), placement.mesh.degree(FSDP)
        others = prod(placement.mesh.degree(cut.over) for cut in placement.cuts if cut.over != FSDP)
        for rank in range(first, first + others):  # neighbours: FSDP's ranks lie further apart
            size = placement.part(rank, gathered=True)[1]
            rows = max(1, ceil_div(size[0], ranks))
            for height, boxes in ((rows, size[0] // rows), (size[0] % rows, 1)):
                nbytes = width * height * prod(size[1:])
                number += tensors * boxes * part_count(height, nbytes, copies, file_bytes)
    return number
