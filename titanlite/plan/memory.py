"""The bytes that a rank holds from step to step, and gathers for a pass; the parts that a checkpoint is cut into.

By arithmetic; docs/dry_run.md says how far from that a dry run may measure. Activations are known to dry runs only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

from titanlite.models.spec import ModelSpec, is_named_by, spec_of
from titanlite.optim.base import optimizer_spec
from titanlite.plan.float8 import decide_linears
from titanlite.plan.layout import Coordinates, Layout, ceil_div
from titanlite.plan.placement import ALONE, GroupRank, Placement, Shape, find_placements, local_slices
from titanlite.plan.stages import SPLIT_BACKWARD, stages_of
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


def local_parameters(
    recipe: Recipe, layout: Layout, tp_rank: int = 0, shard_rank: int = 0
) -> list[list[LocalParameter]]:
    """For each rank of a pipeline, the parameters that its stages compute with. Ranks 0 of the groups keep the most."""
    spec = spec_of(recipe.model.preset)
    config = spec.configure(recipe.model)
    shapes = spec.shapes(config)
    placements = find_placements(shapes, spec.sharding(config))
    tp, shard = GroupRank(tp_rank, layout.tp), GroupRank(shard_rank, layout.weights(recipe.parallel.zero_stage)[1])
    rank_of = {module: stage.rank for stage in stages_of(recipe, layout) for module in stage.modules}
    ranks: list[dict[str, LocalParameter]] = [{} for _ in range(layout.pp)]
    # Both ends of a pipeline have the weight that they share.
    for name, other in [*zip(shapes, shapes, strict=True), *spec.tied(config).items()]:
        used, kept = (local_slices(shapes[other], placements.get(other), tp, cut)[1] for cut in (ALONE, shard))
        rank = rank_of[module_within(name, rank_of.__contains__)]
        ranks[rank][other] = LocalParameter(other, shapes[other], used, kept)
    return [list(rank.values()) for rank in ranks]


def module_within(parameter: str, is_one: Callable[[str], bool]) -> str:
    """The outermost of the modules around a parameter which `is_one`; empty, the model itself, if none is."""
    parts = parameter.split(".")
    return next((name for end in range(1, len(parts)) if is_one(name := ".".join(parts[:end]))), "")


def count_elements(shapes: Iterable[Shape]) -> int:
    return sum(map(prod, shapes))


def rank_state_bytes(recipe: Recipe, layout: Layout, at: Coordinates) -> dict[str, int]:
    """`state_bytes` of the rank at these coordinates."""
    shard_rank = (at.data * layout.cp + at.cp) % layout.weights(recipe.parallel.zero_stage)[1]
    return state_bytes(recipe, layout, local_parameters(recipe, layout, at.tp, shard_rank)[at.pp])


def state_bytes(recipe: Recipe, layout: Layout, parameters: Sequence[LocalParameter]) -> dict[str, int]:
    """Bytes on one rank of what lives from step to step, and of the weights gathered for a pass.

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
    states = state_bytes(recipe, alone, local_parameters(recipe, alone)[0])
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
    config, states = spec.configure(recipe.model), optimizer_spec(recipe.optimizer.name).states
    copies, cut = layout.weights(recipe.parallel.zero_stage)
    width = max(4, _BYTES[recipe.precision.compute])
    shapes = spec.shapes(config)
    cuts, tied = find_placements(shapes, spec.sharding(config)), spec.tied(config).values()
    alike: Counter[tuple[tuple[int, ...], Placement | None, int]] = Counter()
    for name, shape in shapes.items():
        holders = copies * (1 if name in cuts else layout.tp) * (2 if name in tied and layout.pp > 1 else 1)
        alike[shape, cuts.get(name), holders] += 1 + states(spec.is_block_matrix(name))
    number = 0
    for (shape, placement, holders), tensors in alike.items():
        for rank in range(layout.tp if placement else 1):
            size = local_slices(shape, placement, GroupRank(rank, layout.tp))[1]
            rows = max(1, ceil_div(size[0], cut))
            for height, boxes in ((rows, size[0] // rows), (size[0] % rows, 1)):
                nbytes = width * height * prod(size[1:])
                number += tensors * boxes * part_count(height, nbytes, holders, file_bytes)
    return number
