"""A pipeline schedule as a timetable: what each rank does when, and how long it idles.

Simulated from the action lists that torch's schedules run by; communication takes no time. Torch is imported when
actions are asked for; neither a device nor a process group is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

from titanlite.plan.stages import Stage, stages_per_rank
from titanlite.recipe.sections import Pipeline

_UNITS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
"""Time of each kind of action, in forward passes; I and W are the halves of B."""

_LINE = 120  # Characters in a line of the drawing, beyond the rank's name


class Action(NamedTuple):
    """One pass of one microbatch through one stage."""

    kind: str  # F forward, B backward, I and W its two halves
    stage: int
    microbatch: int


class Slot(NamedTuple):
    """An action and when it runs."""

    action: Action
    start: float
    end: float


Timeline = list[list[Slot]]  # The slots of each rank, in order


@dataclass(frozen=True)
class Timetable:
    """A pipeline's schedule, simulated."""

    even: Timeline  # With stages of equal cost; in forward passes of a stage
    idle_if_even: float
    idle: float  # With each stage's own share of the operations


def timetable(section: Pipeline, stages: Sequence[Stage], pp: int, microbatches: int) -> Timetable:
    actions = schedule_actions(section, pp, microbatches)
    even = simulate(actions, [1.0] * len(stages))
    return Timetable(even, idle_share(even), idle_share(simulate(actions, [float(stage.flops) for stage in stages])))


def schedule_actions(section: Pipeline, pp: int, microbatches: int) -> list[list[Action]]:
    """What each of `pp` ranks does, in order, for a count of microbatches that `stages.takes_microbatches` allows."""
    count = stages_per_rank(section)
    if count == 1:
        return [_one_stage_actions(section.schedule, rank, pp, microbatches) for rank in range(pp)]
    from torch.distributed.pipelining.schedules import get_schedule_class

    stages = [TorchStage(index, count * pp, pp) for index in range(count)]
    kind: Any = get_schedule_class(section.schedule)
    lists = kind(stages, microbatches, loss_fn=lambda output, target: output, scale_grads=False).pipeline_order
    return [[action for entry in lists[rank] for action in _passes(entry)] for rank in range(pp)]


def _one_stage_actions(schedule: str, rank: int, pp: int, microbatches: int) -> list[Action]:
    """GPipe and 1F1B, which torch runs as loops: its lists of these are drawings, and misnumber 1F1B's last rank."""
    ahead = microbatches if schedule == "GPipe" else min(microbatches, pp - rank)
    kinds = ["F"] * ahead + ["B", "F"] * (microbatches - ahead) + ["B"] * ahead
    return [Action(kind, rank, kinds[:index].count(kind)) for index, kind in enumerate(kinds)]


@dataclass
class TorchStage:
    """What of a stage torch's schedules look at to make their lists."""

    stage_index: int
    num_stages: int
    group_size: int
    group_rank: int = 0
    submod: None = None
    is_last: bool = False
    stage_index_to_group_rank: Any = None


def _passes(entry: Any) -> Iterator[Action]:
    """The passes in an entry of torch's list: None is a wait, and one entry may be two passes that overlap."""
    for action in () if entry is None else entry.sub_actions or (entry,):
        if action.computation_type.value in _UNITS:
            yield Action(action.computation_type.value, action.stage_index, action.microbatch_index)


def simulate(actions: Sequence[Sequence[Action]], costs: Sequence[float]) -> Timeline:
    """When each action runs, if a rank takes them in order and begins one as soon as what it needs is there.

    costs: time of a forward pass through each stage.
    """
    timeline: Timeline = [[] for _ in actions]
    ends: dict[Action, float] = {}
    remaining = sum(map(len, actions))
    while remaining:
        before = remaining
        for slots, mine in zip(timeline, actions, strict=True):
            while len(slots) < len(mine):
                action = mine[len(slots)]
                needs = _needs(action, len(costs) - 1)
                if not all(need in ends for need in needs):
                    break
                start = max([slots[-1].end if slots else 0.0, *(ends[need] for need in needs)])
                end = start + _UNITS[action.kind] * costs[action.stage]
                # Others wait for outputs (F) and for gradients of inputs (I, also by B).
                ends[action._replace(kind="I") if action.kind == "B" else action] = end
                slots.append(Slot(action, start, end))
                remaining -= 1
        assert remaining < before, "the schedule waits for itself"
    return timeline


def _needs(action: Action, last: int) -> list[Action]:
    """The actions whose results one begins with; `last`: the last stage."""
    kind, stage, microbatch = action
    if kind == "F":
        return [Action("F", stage - 1, microbatch)] if stage > 0 else []
    if kind == "W":
        return [Action("I", stage, microbatch)]
    return [Action("F", stage, microbatch), *([Action("I", stage + 1, microbatch)] if stage < last else [])]


def idle_share(timeline: Timeline) -> float:
    """The share of the ranks' time in which they do nothing, from the first action of any to the last."""
    end = max(slots[-1].end for slots in timeline)
    busy = sum(slot.end - slot.start for slots in timeline for slot in slots)
    return 1 - busy / (len(timeline) * end)


def draw_timetable(plan: Timetable) -> str:
    """Rows of ranks, columns of time: `F3` is microbatch 3 forward, `2F3` through stage 2 where a rank has several."""
    several = any(len({slot.action.stage for slot in slots}) > 1 for slots in plan.even)
    rows = [_cells(slots, several) for slots in plan.even]
    width = 1 + max(len(cell) for row in rows for cell in row)
    title, shown = len(f"rank {len(rows) - 1}  "), _LINE // width
    columns = list(zip_longest(*rows, fillvalue="."))
    lines = []
    for first in range(0, len(columns), shown):
        for rank, cells in enumerate(zip(*columns[first : first + shown], strict=True)):
            lines.append(f"{f'rank {rank}':<{title}}{''.join(cell.ljust(width) for cell in cells)}".rstrip())
        lines.append("")
    kinds = {slot.action.kind for slots in plan.even for slot in slots}
    backward = ", B backward (=: goes on)" * ("B" in kinds)
    halves = ", I and W backward for inputs and for weights" * ("I" in kinds)
    around = "before it the stage, behind it the microbatch" if several else "behind it the microbatch"
    lines += [
        f"F forward{backward}{halves}; {around}; . idle; a column is as long as a stage's forward pass.",
        f"Ranks idle {plan.idle_if_even:.1%} of the time if all stages take as long,"
        f" {plan.idle:.1%} by the stages' own operations; communication not counted.",
    ]
    return "\n".join(lines)


def _cells(slots: Sequence[Slot], several: bool) -> list[str]:
    """What to print in each column of one rank."""
    cells: list[str] = []
    for (kind, stage, microbatch), start, end in slots:
        cells += ["."] * (round(start) - len(cells))
        cells.append(f"{stage if several else ''}{kind}{microbatch}")
        cells += ["="] * (round(end) - len(cells))
    return cells


def timetable_values(plan: Timetable) -> dict[str, Any]:
    """As plain numbers: for each rank, [kind, stage, microbatch, start, end] of what it does."""
    ranks = [[[*slot.action, slot.start, slot.end] for slot in slots] for slots in plan.even]
    return {"ranks": ranks, "idle_share_if_even": plan.idle_if_even, "idle_share": plan.idle}
