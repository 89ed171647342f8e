"""Where every parameter is: one table, by arithmetic alone. No torch.

The ranks of a run can be counted through in more than one way: each is a mesh, and a parameter lives on one of them.
Over each dimension of its mesh it is cut or copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from titanlite.models.spec import Style, is_named_by, spec_of
from titanlite.plan.layout import Layout, ceil_div
from titanlite.plan.stages import stages_of
from titanlite.recipe.sections import Recipe

Shape = tuple[int, ...]
Slices = tuple[Shape, Shape]  # offset in the whole tensor, and shape

FSDP = "dp_shard"  # the mesh dimension over which parameters are cut while they are not in use
CUTS: Mapping[Style, tuple[str, int]] = {
    "vocab": ("tp", 0),
    "column": ("tp", 0),
    "row": ("tp", 1),
    "experts": ("ep", 0),
}
"""Over which mesh dimension a style cuts its module's parameters, and along which of theirs; other styles cut none."""


@dataclass(frozen=True)
class Mesh:
    """All ranks, counted through these dimensions, the last one fastest."""

    degrees: tuple[tuple[str, int], ...]

    def degree(self, name: str) -> int:
        return dict(self.degrees).get(name, 1)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank is along each dimension, the fastest first."""
        found = {}
        for name, degree in reversed(self.degrees):
            rank, found[name] = divmod(rank, degree)
        return found


def meshes_of(layout: Layout, zero_stage: int) -> dict[str, Mesh]:
    """`weights`: the mesh of most parameters; `experts`: that of experts where ep > 1, whose ranks are borrowed.

    Ranks that share a sequence (cp) compute with the same weights, so they share in sharding them.
    """
    replicas, shards = layout.weights(zero_stage)
    around = ("pp", layout.pp), ("dp_replicate", replicas)
    meshes = {"weights": Mesh((*around, (FSDP, shards), ("tp", layout.tp)))}
    if layout.ep > 1:
        meshes["experts"] = Mesh((*around, (FSDP, shards * layout.tp // layout.ep), ("ep", layout.ep)))
    return meshes


class Cut(NamedTuple):
    """How the ranks along a mesh dimension divide one dimension of a parameter."""

    over: str  # the mesh dimension
    dimension: int = 0  # the parameter's
    unit: int = 1  # rows (or columns) that stay together; divides the parameter's size

    def part(self, size: int, rank: int, ranks: int) -> tuple[int, int]:
        """(first, size) of a rank's part. As FSDP2 shards, the last ranks may have less than others, or nothing; over
        other mesh dimensions the first ranks may have one unit more.
        """
        units = size // self.unit
        each, more = (ceil_div(units, ranks), 0) if self.over == FSDP else divmod(units, ranks)
        first, last = (min(at * each + min(at, more), units) for at in (rank, rank + 1))
        return first * self.unit, (last - first) * self.unit


@dataclass(frozen=True)
class Placement:
    """Where one parameter is."""

    shape: Shape
    mesh: Mesh
    cuts: tuple[Cut, ...]  # each divides what those before it leave; over the mesh's other dimensions it is copied
    stages: tuple[int, ...]  # ranks along pp that hold it: two for a weight that both ends of a pipeline share

    def on_stage_of(self, rank: int) -> bool:
        """Whether the rank's stages compute with it."""
        return self.mesh.coordinates(rank)["pp"] in self.stages

    def part(self, rank: int, gathered: bool = False) -> Slices:
        """What a rank keeps of it from step to step; `gathered`: what it computes with. May have no rows."""
        at, offset, size = self.mesh.coordinates(rank), [0] * len(self.shape), list(self.shape)
        for cut in self.cuts:
            if not (gathered and cut.over == FSDP):
                first, size[cut.dimension] = cut.part(size[cut.dimension], at[cut.over], self.mesh.degree(cut.over))
                offset[cut.dimension] += first
        return tuple(offset), tuple(size)

    def used_range(self, rank: int) -> tuple[int, int, int]:
        """Along which dimension the ranks that compute with it divide it, and (first, size) of a rank's part there."""
        dimension = self.cuts[0].dimension
        offset, size = self.part(rank, gathered=True)
        return dimension, offset[dimension], size[dimension]

    def copies(self, rank: int) -> tuple[int, int]:
        """How many ranks keep the same part, and which of them this one is."""
        at, number, index, cut = self.mesh.coordinates(rank), 1, 0, {cut.over for cut in self.cuts}
        for name, degree in self.mesh.degrees:
            if name != "pp" and name not in cut:
                number, index = number * degree, index * degree + at[name]
        return number * len(self.stages), index * len(self.stages) + self.stages.index(at["pp"])

    def cut_over(self, name: str) -> Cut | None:
        """How it is cut over a mesh dimension; None where it is copied."""
        return next((cut for cut in self.cuts if cut.over == name), None)


def place(recipe: Recipe, layout: Layout) -> dict[str, Placement]:
    """Where each parameter is, by name, in the model's order; tied ones once."""
    spec, meshes = spec_of(recipe.model.preset), meshes_of(layout, recipe.parallel.zero_stage)
    config = spec.configure(recipe.model)
    rules = [rule for rule in spec.sharding(config) if rule.style in CUTS]
    rank_of = {name: stage.rank for stage in stages_of(recipe, layout) for name in stage.modules}

    @cache
    def cut_of(module: str) -> Cut | None:
        rule = next((rule for rule in rules if is_named_by((rule.pattern,), module)), None)
        return None if rule is None else Cut(*CUTS[rule.style], rule.unit)

    stages: dict[str, set[int]] = {}
    shapes = spec.shapes(config)
    for name, known_by in [*zip(shapes, shapes, strict=True), *spec.tied(config).items()]:
        stages.setdefault(known_by, set()).add(rank_of[module_within(name, rank_of.__contains__)])
    found = {}
    for name, shape in shapes.items():
        cut = cut_of(pattern_of(name).rpartition(".")[0])
        mesh = meshes.get("experts" if cut and cut.over == "ep" else "weights", meshes["weights"])
        cuts = (cut, Cut(FSDP)) if cut and cut.over in dict(mesh.degrees) else (Cut(FSDP),)
        found[name] = Placement(shape, mesh, cuts, tuple(sorted(stages[name])))
    return found


def module_within(parameter: str, is_one: Callable[[str], bool]) -> str:
    """The outermost of the modules around a parameter which `is_one`; empty, the model itself, if none is."""
    parts = parameter.split(".")
    return next((name for end in range(1, len(parts)) if is_one(name := ".".join(parts[:end]))), "")


def pattern_of(name: str) -> str:
    """A name with numbers left open: `layers.3.ffn.up.weight` is `layers.*.ffn.up.weight`."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
