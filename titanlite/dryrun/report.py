"""A dry run for people and for programs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from typing import Any

from titanlite.dryrun.collectives import in_order, traffic
from titanlite.dryrun.step import DryRun, dry_run
from titanlite.plan.layout import require_layout
from titanlite.plan.memory import rank_state_bytes
from titanlite.plan.sharding_table import shape_text
from titanlite.recipe.sections import Recipe
from titanlite.text import format_bytes, format_table

_NUMBER = re.compile(r"\.(\d+)(?=\.|$)")


def describe_dry_run(recipe: Recipe, size: int, rank: int) -> dict[str, Any]:
    """A dry run as rank `rank` of `size`, in plain values. Raises `UsageError` if there is no such rank."""
    run = dry_run(recipe, size, rank)
    return {
        "rank": rank,
        "place": asdict(run.coordinates),
        "collectives": [asdict(each) for each in traffic(run.collectives)],
        "sequence": [
            {"dimension": each.dimension, "operation": each.operation, "dtype": each.dtype,
             "message_bytes": each.message_bytes, "times": times}
            for each, times in in_order(run.collectives)
        ],
        "memory": {
            "peak": asdict(run.memory.peak),
            "most": dict(run.memory.most),
            "by_phase": {phase: asdict(moment) for phase, moment in run.memory.by_phase.items()},
            "host_bytes": run.memory.host_bytes,
            "predicted": rank_state_bytes(recipe, require_layout(recipe.parallel, size), run.coordinates),
        },
        "parameters": [
            {"name": name, "shape": list(shape), "whole": list(whole), "blocks": blocks}
            for name, shape, whole, blocks in _collapsed(run)
        ],
        "left_out": left_out(recipe),
    }  # fmt: skip


def left_out(recipe: Recipe) -> list[str]:
    """Keys of the recipe that a dry run does not follow."""
    compiled = recipe.compile.enabled
    return [
        key
        for key, differs in (
            ("compile.enabled", compiled),
            ("recompute.budget", compiled and recipe.recompute.budget is not None),
            ("parallel.async_tp", recipe.parallel.async_tp),
        )
        if differs
    ]


def report(recipe: Recipe, size: int, rank: int) -> str:
    """`describe_dry_run`, in tables."""
    run = describe_dry_run(recipe, size, rank)
    place = ", ".join(f"{dimension} {index}" for dimension, index in run["place"].items())
    return "\n".join(
        [
            f"dry run of rank {rank} of {size} ({place}): one step",
            *(f"  not followed: {key}, which needs a device" for key in run["left_out"]),
            "",
            *_messages(run["collectives"]),
            "",
            *_memory(run["memory"]),
            "",
            *_parameters(run["parameters"]),
        ]
    )


def _messages(rows: list[dict[str, Any]]) -> Iterator[str]:
    if not rows:
        yield "  no messages"
        return
    columns = ("over", "ranks", "operation", "dtype", "count", "messages", "sent")
    cells = [
        (row["dimension"], str(row["ranks"]), row["operation"], row["dtype"], str(row["count"]),
         format_bytes(row["message_bytes"]), format_bytes(row["sent_bytes"]))
        for row in rows
    ]  # fmt: skip
    yield from _table([columns, *cells], right={1, 4, 5, 6})


def _memory(memory: dict[str, Any]) -> Iterator[str]:
    peak, most = memory["peak"], memory["most"]
    phases = (f"{phase} {format_bytes(moment['total'])}" for phase, moment in memory["by_phase"].items())
    yield f"  peak {format_bytes(peak['total'])} with activations and temporaries, in {peak['where']}"
    yield f"  most in each phase: {', '.join(phases)}"
    columns = ("memory for", "at the peak", "at most", "by titanlite check")
    predicted = {name: format_bytes(size) for name, size in memory["predicted"].items()}
    held = [
        (name, format_bytes(peak["by_purpose"][name]), format_bytes(most[name]), predicted.get(name, ""))
        for name in most
        if most[name]
    ]
    yield from _table([columns, *held], right={1, 2, 3})
    if memory["host_bytes"]:
        yield f"  beside it, {format_bytes(memory['host_bytes'])} in the host's memory"


def _parameters(rows: list[dict[str, Any]]) -> Iterator[str]:
    columns = ("parameter", "here", "of", "blocks")
    cells = [(row["name"], shape_text(row["shape"]), shape_text(row["whole"]), row["blocks"]) for row in rows]
    yield from _table([columns, *cells], right={1, 2})


def _table(rows: list[tuple[str, ...]], right: set[int]) -> Iterator[str]:
    yield from (f"  {line}" for line in format_table(rows, right))


def _collapsed(run: DryRun) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], str]]:
    """Parameters of blocks that are alike, as one: (name with `*`, shape here, whole shape, which blocks)."""
    alike: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for name, shape in run.shapes.items():
        number = _NUMBER.search(name)
        key = (_NUMBER.sub(".*", name, count=1), shape, run.whole_shapes[name])
        alike.setdefault(key, []).extend([int(number[1])] if number else [])
    for (name, shape, whole), numbers in alike.items():
        yield name, shape, whole, _ranges(numbers)


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 -> `0-2, 5`"""
    # In a run of consecutive numbers, each is as far from its place as the others.
    places = sorted((number - place, number) for place, number in enumerate(sorted(numbers)))
    runs = [[number for _, number in run] for _, run in groupby(places, key=lambda pair: pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
