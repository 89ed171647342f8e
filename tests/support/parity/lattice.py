"""The points of the parity lattice: layouts and what multiplies them, each a recipe and a number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Sections = dict[str, dict[str, Any]]

SCHEDULES = (
    "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
)  # fmt: skip
CHUNKS = {"kernels": {"linear_cross_entropy": "torch"}}
FOUR_LAYERS = {"dim": 32, "layers": 4, "heads": 8, "kv_heads": 4, "ffn_dim": 48, "vocab_size": 264}


@dataclass(frozen=True)
class Point:
    """One run that must equal the single process's."""

    ranks: int
    parallel: dict[str, Any]
    others: Sections = field(default_factory=dict)  # sections beside `parallel`
    default: bool = True  # whether every test run has it; the others run with --all

    @property
    def sections(self) -> Sections:
        return {**self.others, "parallel": self.parallel}

    @property
    def name(self) -> str:
        """Short and unique: `8 ranks: dp_replicate 2, tp 2, zero 3; recompute full`."""
        values = dict(self.parallel)
        pipeline = values.pop("pipeline", {})
        parts = [f"{key.removesuffix('_stage')} {value}" for key, value in values.items()]
        parts += [str(value) for value in pipeline.values()]
        extras = [
            f"{section}.{key} {value}"
            for section, keys in self.others.items()
            for key, value in (keys.items() if keys is not FOUR_LAYERS else [("", "4 layers, 8 heads")])
        ]
        return f"{self.ranks} ranks: " + ", ".join(parts) + "".join(f"; {extra}" for extra in extras)


def _pipeline(schedule: str, **keys: Any) -> dict[str, Any]:
    return {"schedule": schedule, **keys}


def alone() -> Iterator[Point]:
    """Each axis by itself."""
    for stage in range(4):
        yield Point(2, {"zero_stage": stage}, {"training": {"microbatch": 2}})
        # On three ranks, the last microbatch is partly padding.
        yield Point(3, {"zero_stage": stage}, {"training": {"microbatch": 2}}, default=stage == 3)
        yield Point(4, {"zero_stage": stage, "dp_replicate": 2}, {"training": {"microbatch": 1}}, default=stage == 3)
    for ranks in (5, 7):
        yield Point(ranks, {"zero_stage": 3}, default=False)
    yield Point(2, {"zero_stage": 3, "offload": True})
    yield Point(2, {"zero_stage": 3, "prefetch": 2})
    yield Point(2, {"zero_stage": 2, "prefetch": 0}, default=False)
    for ranks in (2, 3):  # three heads of keys and values over two ranks: two and one
        yield Point(ranks, {"tp": ranks}, default=ranks == 2)
        for method in ("all-gather", "ring"):
            yield Point(ranks, {"cp": ranks, "cp_method": method}, default=(ranks == 2) == (method == "ring"))
    yield Point(4, {"tp": 4}, {"model": FOUR_LAYERS})
    for ranks, method in ((4, "all-gather"), (3, "ring")):
        yield Point(ranks, {"cp": ranks, "cp_method": method}, {"data": {"document_mask": True}})
    for ranks in (2, 3, 4, 5):
        yield Point(ranks, {"pp": ranks}, default=ranks == 3)
    for schedule in SCHEDULES:
        yield Point(2, {"pp": 2, "pipeline": _pipeline(schedule)})


def pairs() -> Iterator[Point]:
    """Two axes, with each ZeRO stage where data ranks are one of them."""
    for stage in range(4):
        for axis in ("tp", "cp"):
            yield Point(4, {axis: 2, "zero_stage": stage}, default=stage == 3 and axis == "cp")
            yield Point(8, {axis: 2, "zero_stage": stage, "dp_replicate": 2}, default=False)
            yield Point(4, {axis: 2, "zero_stage": stage}, {"optimizer": {"name": "muon"}}, default=False)
        for schedule in SCHEDULES:
            ways = {1: ("1F1B",), 2: ("ZBVZeroBubble",), 3: ("Interleaved1F1B",)}
            common = schedule in ways.get(stage, ())
            yield Point(
                4, {"pp": 2, "zero_stage": stage, "pipeline": _pipeline(schedule)}, {"training": {"microbatch": 1}},
                default=common,
            )  # fmt: skip
    for ranks, copies in ((4, 2), (6, 3)):  # copies share Muon's matrices, five of each shape
        layout = {"dp_replicate": copies, "zero_stage": copies}
        yield Point(ranks, layout, {"optimizer": {"name": "muon"}}, default=copies == 2)
    yield Point(4, {"tp": 2, "cp": 2})
    yield Point(4, {"tp": 2, "cp": 2, "cp_method": "ring"}, default=False)
    yield Point(4, {"pp": 2, "cp": 2, "cp_method": "ring"}, {"data": {"document_mask": True}}, default=False)
    yield Point(6, {"tp": 3, "cp": 2}, default=False)
    for axis in ("tp", "cp"):
        for schedule in SCHEDULES:
            common = schedule == "1F1B"
            yield Point(4, {axis: 2, "pp": 2, "pipeline": _pipeline(schedule)}, default=common)
    yield Point(8, {"pp": 2, "dp_replicate": 2, "zero_stage": 2}, default=False)
    yield Point(6, {"pp": 3, "zero_stage": 1, "pipeline": _pipeline("1F1B", microbatches=4)}, default=False)
    yield Point(8, {"pp": 4, "zero_stage": 1}, {"model": FOUR_LAYERS}, default=False)


def triples() -> Iterator[Point]:
    """Three axes over eight ranks."""
    for stage in range(4):
        yield Point(8, {"tp": 2, "pp": 2, "zero_stage": stage}, default=False)
        yield Point(8, {"dp_replicate": 2, "tp": 2, "cp": 2, "zero_stage": stage}, default=stage == 2)
        yield Point(8, {"pp": 2, "cp": 2, "zero_stage": stage}, default=stage == 3)
    for schedule in SCHEDULES:
        yield Point(
            8, {"tp": 2, "pp": 2, "zero_stage": 2, "pipeline": _pipeline(schedule)}, {"optimizer": {"name": "muon"}},
            default=schedule == "InterleavedZeroBubble",
        )  # fmt: skip
    yield Point(8, {"pp": 2, "tp": 2, "cp": 2})
    yield Point(8, {"pp": 2, "tp": 2, "cp": 2}, {"model": FOUR_LAYERS, "data": {"document_mask": True}}, default=False)


def pipelines() -> Iterator[Point]:
    """What only a pipeline has: uneven stages, many of them, shared weights at its ends, microbatches without text."""
    yield Point(3, {"pp": 3, "pipeline": _pipeline("Interleaved1F1B")})  # seven pieces, six stages
    yield Point(3, {"pp": 3, "pipeline": _pipeline("DualPipeV")})
    yield Point(4, {"pp": 4, "pipeline": _pipeline("GPipe")}, default=False)
    yield Point(4, {"pp": 4, "pipeline": _pipeline("InterleavedZeroBubble")}, {"model": {"layers": 7}}, default=False)
    # The embedding alone, all blocks, the head alone.
    yield Point(3, {"pp": 3, "pipeline": _pipeline("1F1B", blocks_per_stage=(0, 5, 0))})
    # Torch's zero-bubble schedules would release a stage's weights once a fourth is due, with gradients pending.
    yield Point(
        4, {"pp": 2, "pipeline": _pipeline("InterleavedZeroBubble", stages_per_rank=4)}, {"model": {"layers": 8}}
    )
    for schedule in ("1F1B", "InterleavedZeroBubble"):
        # Twelve microbatches are asked for, and there are eight sequences.
        halved = schedule == "InterleavedZeroBubble"
        yield Point(2, {"pp": 2, "pipeline": _pipeline(schedule, microbatches=12)}, default=halved)
        yield Point(4, {"pp": 2, "dp_replicate": 2, "pipeline": _pipeline(schedule)}, default=False)
    for schedule, stage in (("1F1B", 2), ("Interleaved1F1B", 3), ("InterleavedZeroBubble", 1)):
        tied = {"model": {"tie_embeddings": True}}
        yield Point(4, {"pp": 2, "zero_stage": stage, "pipeline": _pipeline(schedule)}, tied, default=stage != 2)
    masked = {"data": {"document_mask": True}, "training": {"microbatch": 2}}
    yield Point(2, {"pp": 2, "pipeline": _pipeline("ZBVZeroBubble")}, masked)


def multiplied() -> Iterator[Point]:
    """What changes how a layout computes: recomputation, accumulation, tied weights, masks, optimizers, compilation."""
    layouts: tuple[tuple[int, dict[str, Any]], ...] = (
        (2, {"zero_stage": 3}),
        (4, {"tp": 2, "zero_stage": 3}),
        (4, {"cp": 2, "zero_stage": 2}),
        (4, {"pp": 2, "zero_stage": 1}),
        (8, {"tp": 2, "pp": 2, "zero_stage": 1}),
        (8, {"tp": 2, "cp": 2, "zero_stage": 3}),
    )
    for index, (ranks, layout) in enumerate(layouts):
        for mode in ("full", "selective"):
            yield Point(
                ranks, layout, {"recompute": {"mode": mode}}, default=ranks == 4 and (mode == "full") == (index < 3)
            )
        yield Point(ranks, layout, {"recompute": {"mode": "full", "every": 2}}, default=False)
        yield Point(ranks, layout, {"training": {"microbatch": 1}}, default=index == 1)
        yield Point(ranks, layout, {"model": {"tie_embeddings": True}}, default=index in (0, 1))
        yield Point(ranks, layout, {"data": {"document_mask": True}}, default=index == 3)
        yield Point(ranks, layout, {"optimizer": {"name": "muon", "clip_norm": 0.05}}, default=index == 3)
        yield Point(ranks, layout, {"model": {"qk_norm": False}}, default=False)
        yield Point(ranks, layout, {"compile": {"enabled": True}}, default=False)
        yield Point(ranks, layout, CHUNKS, default=index < 2)
        yield Point(ranks, layout, {**CHUNKS, "compile": {"enabled": True}}, default=False)
        yield Point(ranks, layout, {**CHUNKS, "model": {"tie_embeddings": True}}, default=False)
    for schedule in SCHEDULES:
        pipe = {"pp": 2, "pipeline": _pipeline(schedule)}
        yield Point(2, pipe, CHUNKS, default=schedule == "ZBVZeroBubble")
        for mode in ("full", "selective"):
            yield Point(2, pipe, {"recompute": {"mode": mode}}, default=False)
        yield Point(2, pipe, {"model": {"tie_embeddings": True}}, default=False)
        yield Point(2, pipe, {"compile": {"enabled": True}}, default=False)
    for mode in ("full", "selective"):
        yield Point(4, {"cp": 2, "cp_method": "ring", "zero_stage": 3}, {"recompute": {"mode": mode}}, default=False)
        yield Point(2, {"tp": 2}, {"recompute": {"mode": mode}, "compile": {"enabled": True}}, default=False)
    yield Point(2, {"cp": 2, "cp_method": "ring"}, {"compile": {"enabled": True}}, default=False)
    yield Point(2, {"zero_stage": 3}, {"recompute": {"budget": 0.5}, "compile": {"enabled": True}}, default=False)


def windows() -> Iterator[Point]:
    """Windows by layer, within documents that are packed by best fit and over whole sequences."""
    model, data = {"window": (5, 0, 3, 14, 1)}, {"document_mask": True, "packing": "best_fit"}
    for ranks, layout, within, over in (
        (2, {"zero_stage": 3}, True, False),
        (2, {"tp": 2}, True, False),
        (2, {"pp": 2}, True, False),
        (2, {"cp": 2}, True, True),
        (2, {"cp": 2, "cp_method": "ring"}, True, True),
        (3, {"cp": 3, "cp_method": "ring"}, False, False),
        (4, {"cp": 4}, False, False),
        (4, {"tp": 2, "cp": 2}, False, False),
        (4, {"tp": 2, "cp": 2, "cp_method": "ring"}, False, False),
        (4, {"pp": 2, "cp": 2, "cp_method": "ring"}, True, False),
        (4, {"pp": 2, "cp": 2}, False, False),
        (4, {"tp": 2, "pp": 2}, False, False),
    ):
        yield Point(ranks, layout, {"model": model, "data": data}, default=within)
        yield Point(ranks, layout, {"model": model}, default=over)
    alike = {"model": {"window": (5, 0, 0, 5, 0)}, "data": data, "compile": {"enabled": True}}  # compiled twice
    for method in ("all-gather", "ring"):
        layout = {"cp": 2, "cp_method": method}
        yield Point(2, layout, {"model": model, "data": data, "recompute": {"mode": "selective"}}, default=False)
        yield Point(2, layout, alike, default=False)
    yield Point(2, {"zero_stage": 3}, alike, default=False)


def mixtures() -> Iterator[Point]:
    """A family whose experts live on a mesh of their own, which trains buffers and has an auxiliary loss."""
    for ranks, layout, default in (
        (2, {"zero_stage": 3}, True),
        (3, {"zero_stage": 1}, False),
        (2, {"tp": 2}, True),
        (2, {"cp": 2}, True),
        (2, {"cp": 2, "cp_method": "ring"}, False),
        (2, {"ep": 2, "zero_stage": 3}, False),
        (3, {"ep": 3, "zero_stage": 2}, True),  # of four experts
        (4, {"ep": 2, "zero_stage": 1}, False),
        (4, {"ep": 2, "zero_stage": 3}, True),
        (4, {"ep": 2, "dp_replicate": 2}, True),
        (4, {"tp": 2, "ep": 2, "zero_stage": 3}, False),
        (4, {"tp": 2, "ep": 4}, True),
        (4, {"cp": 2, "ep": 2}, False),
        (4, {"cp": 2, "ep": 4, "cp_method": "ring"}, False),
        (4, {"pp": 2, "ep": 2}, True),
        (8, {"tp": 2, "cp": 2, "ep": 4, "zero_stage": 3}, True),
        (8, {"tp": 2, "pp": 2, "ep": 4}, False),
        (8, {"dp_replicate": 2, "tp": 2, "ep": 2}, False),
    ):
        yield Point(ranks, layout, {"model": {"preset": "mixture"}}, default=default)
    # The other weights are whole on all data ranks, and the experts are not.
    four_heads = {"preset": "mixture", "dim": 32, "heads": 4, "kv_heads": 4}
    yield Point(4, {"tp": 4, "ep": 2, "zero_stage": 1}, {"model": four_heads})
    for schedule in SCHEDULES:
        pipe = {"pp": 2, "pipeline": _pipeline(schedule)}
        yield Point(2, pipe, {"model": {"preset": "mixture"}}, default=schedule == "ZBVZeroBubble")
    for index, others in enumerate(
        ({"recompute": {"mode": "full"}}, {"optimizer": {"name": "muon"}}, {"compile": {"enabled": True}})
    ):
        layout = {"tp": 2, "ep": 4, "zero_stage": 2}
        yield Point(4, layout, {"model": {"preset": "mixture"}, **others}, default=index == 0)
    masked = {"model": {"preset": "mixture"}, "training": {"microbatch": 1}, "data": {"document_mask": True}}
    yield Point(2, {"ep": 2, "zero_stage": 3}, masked)


def points() -> list[Point]:
    """The whole lattice; points that the recipe check refuses are among them."""
    return [point for part in (alone, pairs, triples, pipelines, multiplied, windows, mixtures) for point in part()]
