"""A pipeline schedule as a timetable: what each rank does when, and how long it idles.

Simulated from the action lists that torch's schedules run by; communication takes no time. Torch is imported when
actions are asked for; neither a device nor a process group is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from graphlib import TopologicalSorter
from itertools import pairwise, zip_longest
from types import SimpleNamespace
from typing import Any, NamedTuple

from titanlite.plan.stages import Stage, stages_per_rank
from titanlite.recipe.sections import Pipeline

_UNITS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}  # time of each kind of action, in forward passes
_LINE = 120  # characters in a line of the drawing, beyond the rank's name


class Action(NamedTuple):
    """One pass of one microbatch through one stage."""

    kind: str  # F forward, B backward, I and W its two halves: for inputs and for weights
    stage: int
    microbatch: int


class Slot(NamedTuple):
    action: Action
    start: float
    end: float


def timetable(section: Pipeline, stages: Sequence[Stage], pp: int, microbatches: int) -> dict[str, Any]:
    """What each rank does, as [kind, stage, microbatch, start, end], if stages take as long as each other; the share of
    time that ranks idle then, and with each stage's own share of the operations.
    """
    actions = schedule_actions(section, pp, microbatches)
    even, own = (simulate(actions, costs) for costs in ([1.0] * len(stages), [float(each.flops) for each in stages]))
    ranks = [[[*slot.action, slot.start, slot.end] for slot in slots] for slots in even]
    return {"ranks": ranks, "idle_share_if_even": idle_share(even), "idle_share": idle_share(own)}


def schedule_actions(section: Pipeline, pp: int, microbatches: int) -> list[list[Action]]:
    """What each of `pp` ranks does, in order, for a count of microbatches that `stages.takes_microbatches` allows."""
    count = stages_per_rank(section)
    if count == 1:  # torch runs these as loops: its lists of them are drawings, and misnumber 1F1B's last rank
        return [list(_one_stage_actions(section.schedule, rank, pp, microbatches)) for rank in range(pp)]
    from torch.distributed.pipelining.schedules import get_schedule_class

    kind: Any = get_schedule_class(section.schedule)
    made = kind(torch_stages(count, pp), microbatches, loss_fn=max, scale_grads=False)  # no loss is computed
    return [
        [
            Action(each.computation_type.value, each.stage_index, each.microbatch_index)
            for entry in made.pipeline_order[rank]
            if entry is not None  # a wait
            for each in entry.sub_actions or (entry,)  # two passes that overlap
            if each.computation_type.value in _UNITS
        ]
        for rank in range(pp)
    ]


def _one_stage_actions(schedule: str, rank: int, pp: int, microbatches: int) -> Iterator[Action]:
    ahead = microbatches if schedule == "GPipe" else min(microbatches, pp - rank)
    kinds = ["F"] * ahead + ["B", "F"] * (microbatches - ahead) + ["B"] * ahead
    for index, kind in enumerate(kinds):
        yield Action(kind, rank, kinds[:index].count(kind))


def torch_stages(count: int, pp: int) -> list[Any]:
    """What torch's schedules look at of the first of `pp` ranks' stages to make their lists."""
    alike = {"num_stages": count * pp, "group_size": pp, "group_rank": 0, "submod": None, "is_last": False}
    return [SimpleNamespace(stage_index=index, **alike) for index in range(count)]


def simulate(actions: Sequence[Sequence[Action]], costs: Sequence[float]) -> list[list[Slot]]:
    """The slots of each rank, if it takes its actions in order and begins one as soon as what it needs is there.

    costs: time of a forward pass through each stage.
    """
    # Others wait for outputs (F) and for gradients of inputs (I, also by B).
    results = {each: each._replace(kind="I") if each.kind == "B" else each for mine in actions for each in mine}
    makers = {result: action for action, result in results.items()}
    needs = {result: _needs(action, len(costs) - 1) for result, action in makers.items()}
    for mine in actions:
        for before, action in pairwise(mine):
            needs[results[action]].append(results[before])
    slots: dict[Action, Slot] = {}
    for result in TopologicalSorter(needs).static_order():
        action = makers[result]
        start = max((slots[need].end for need in needs[result]), default=0.0)
        slots[action] = slots[result] = Slot(action, start, start + _UNITS[action.kind] * costs[action.stage])
    return [[slots[action] for action in mine] for mine in actions]


def _needs(action: Action, last: int) -> list[Action]:
    """The actions whose results one begins with; `last`: the last stage."""
    kind, stage, microbatch = action
    if kind == "F":
        return [Action("F", stage - 1, microbatch)] if stage > 0 else []
    if kind == "W":
        return [Action("I", stage, microbatch)]
    return [Action("F", stage, microbatch), *([Action("I", stage + 1, microbatch)] if stage < last else [])]


def idle_share(timeline: list[list[Slot]]) -> float:
    """The share of the ranks' time in which they do nothing, from the first action of any to the last."""
    end = max(slots[-1].end for slots in timeline)
    busy = sum(slot.end - slot.start for slots in timeline for slot in slots)
    return 1 - busy / (len(timeline) * end)


def draw_timetable(table: dict[str, Any]) -> str:
    """Rows of ranks, columns of time: `F3` is microbatch 3 forward, `2F3` through stage 2 where a rank has several."""
    ranks = table["ranks"]
    several = any(len({stage for _, stage, *_ in slots}) > 1 for slots in ranks)
    rows = []
    for slots in ranks:
        cells: list[str] = []
        for kind, stage, microbatch, start, end in slots:
            cells += ["."] * (round(start) - len(cells))
            cells.append(f"{stage if several else ''}{kind}{microbatch}")
            cells += ["="] * (round(end) - len(cells))
        rows.append(cells)
    width = 1 + max(len(cell) for row in rows for cell in row)
    title, shown = len(f"rank {len(rows) - 1}  "), _LINE // width
    columns = list(zip_longest(*rows, fillvalue="."))
    lines = []
    for first in range(0, len(columns), shown):
        for rank, row in enumerate(zip(*columns[first : first + shown], strict=True)):
            lines.append(f"{f'rank {rank}':<{title}}{''.join(cell.ljust(width) for cell in row)}".rstrip())
        lines.append("")
    kinds = {kind for slots in ranks for kind, *_ in slots}
    backward = ", B backward (=: goes on)" * ("B" in kinds)
    halves = ", I and W backward for inputs and for weights" * ("I" in kinds)
    around = "before it the stage, behind it the microbatch" if several else "behind it the microbatch"
    lines += [
        f"F forward{backward}{halves}; {around}; . idle; a column is as long as a stage's forward pass.",
        f"Ranks idle {table['idle_share_if_even']:.1%} of the time if all stages take as long,"
        f" {table['idle_share']:.1%} by the stages' own operations; communication not counted.",
    ]
    return "\n".join(lines)
