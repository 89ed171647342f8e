"""A dry run for people and for programs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import count, groupby
from typing import Any

from titanlite.dryrun.collectives import sum_traffic
from titanlite.dryrun.step import DryRun, dry_run
from titanlite.plan.layout import require_layout
from titanlite.plan.memory import local_parameters, state_bytes
from titanlite.plan.placement import Shape, place
from titanlite.recipe.sections import Recipe
from titanlite.text import format_bytes, format_shape, format_table

_NUMBER = re.compile(r"\.(\d+)(?=\.|$)")


def describe_dry_run(recipe: Recipe, size: int, rank: int) -> dict[str, Any]:
    """A dry run as rank `rank` of `size`, in plain values. Raises `UsageError` if there is no such rank."""
    run, compiled = dry_run(recipe, size, rank), recipe.compile.enabled
    layout = require_layout(recipe.parallel, size)
    needs_a_device = {
        "compile.enabled": compiled,
        "recompute.budget": compiled and recipe.recompute.budget is not None,
        "parallel.async_tp": recipe.parallel.async_tp,
    }
    return {
        "rank": rank,
        "place": asdict(run.coordinates),
        "collectives": [asdict(each) for each in sum_traffic(run.collectives)],
        "sequence": [
            {"dimension": each.dimension, "operation": each.operation, "dtype": each.dtype,
             "message_bytes": each.message_bytes, "times": len(list(equal))}
            for each, equal in groupby(run.collectives)
        ],
        "memory": {
            "peak": asdict(run.memory.peak),
            **asdict(run.memory),  # most, by phase, and in the host's memory
            "predicted": state_bytes(recipe, layout, local_parameters(place(recipe, layout), rank)),
        },
        "parameters": list(_group_blocks(run)),
        "left_out": [key for key, is_used in needs_a_device.items() if is_used],
    }  # fmt: skip


def report(recipe: Recipe, size: int, rank: int) -> str:
    """`describe_dry_run`, in tables."""
    run = describe_dry_run(recipe, size, rank)
    place = ", ".join(f"{dimension} {index}" for dimension, index in run["place"].items())
    messages = [
        (each["dimension"], str(each["ranks"]), each["operation"], each["dtype"], str(each["count"]),
         format_bytes(each["message_bytes"]), format_bytes(each["sent_bytes"]))
        for each in run["collectives"]
    ]  # fmt: skip
    parameters = [
        (each["name"], format_shape(each["shape"]), format_shape(each["whole"]), each["blocks"])
        for each in run["parameters"]
    ]
    columns = ("over", "ranks", "operation", "dtype", "count", "messages", "sent")
    return "\n".join(
        [
            f"dry run of rank {rank} of {size} ({place}): one step",
            *(f"  not followed: {key}, which needs a device" for key in run["left_out"]),
            "",
            *(_table(columns, messages, right={1, 4, 5, 6}) if messages else ["  no messages"]),
            "",
            *_memory(run["memory"]),
            "",
            *_table(("parameter", "here", "of", "blocks"), parameters, right={1, 2}),
        ]
    )


def _memory(memory: dict[str, Any]) -> Iterator[str]:
    peak, most = memory["peak"], memory["most"]
    phases = (f"{phase} {format_bytes(moment['total'])}" for phase, moment in memory["by_phase"].items())
    yield f"  peak {format_bytes(peak['total'])} with activations and temporaries, in {peak['where']}"
    yield f"  most in each phase: {', '.join(phases)}"
    by_check = {name: format_bytes(size) for name, size in memory["predicted"].items()}
    rows = [
        (name, format_bytes(peak["by_purpose"][name]), format_bytes(size), by_check.get(name, ""))
        for name, size in most.items()
        if size
    ]
    yield from _table(("memory for", "at the peak", "at most", "by titanlite check"), rows, right={1, 2, 3})
    if memory["host_bytes"]:
        yield f"  beside it, {format_bytes(memory['host_bytes'])} in the host's memory"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], right: set[int]) -> list[str]:
    return [f"  {line}" for line in format_table([head, *rows], right)]


def _group_blocks(run: DryRun) -> Iterator[dict[str, Any]]:
    """Parameters of blocks that are alike, as one whose name has `*` for the blocks' numbers."""
    alike: dict[tuple[str, Shape, Shape], list[int]] = {}
    for name, shapes in run.shapes.items():
        key = (_NUMBER.sub(".*", name, count=1), *shapes)
        alike.setdefault(key, []).extend(map(int, _NUMBER.findall(name)[:1]))
    for (name, shape, whole), numbers in alike.items():
        index = count()  # in a run of consecutive numbers, each is as far from its index as the others
        ranges = [[*group] for _, group in groupby(sorted(numbers), key=lambda number: number - next(index))]
        blocks = ", ".join(str(each[0]) if len(each) == 1 else f"{each[0]}-{each[-1]}" for each in ranges)
        yield {"name": name, "shape": list(shape), "whole": list(whole), "blocks": blocks}
