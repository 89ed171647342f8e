"""What ranks tell each other of their progress, and what follows from it: who holds up a run, and who slows it down.

Pure functions of what was told. Telling is `board.py`, looking is `sampling.py`. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from statistics import median

_NAMED_FROM = 0.2
"""Share of the time that a straggler waits less than the others do: so much of theirs is lost to it."""

LEFT = "left"
"""What a rank is `doing` once it needs no watching any more."""


@dataclass(frozen=True)
class Shares:
    """Where a rank's main thread spent the training time of one window."""

    waiting: float
    """Share of the time in which it waited for other ranks."""
    place: str
    """`file:function` in which it was most often while it did not."""
    place_share: float


@dataclass(frozen=True)
class Progress:
    """One rank as its watchdog tells of it."""

    rank: int
    host: str
    pids: str
    """Names the space in which `pid` has a meaning: equal for processes that can signal each other by it."""
    pid: int
    step: int
    """The last step that it finished."""
    doing: str
    silent_seconds: float = 0.0
    """How long its trainer has given no sign of life."""
    waits: bool = False
    """Whether its main thread waits for other ranks right now."""
    place: str = "?"
    """`file:function` of titanlite or the user in which its main thread is."""
    shares: Shares | None = None
    """Of the last full window; None before the first has ended."""
    count: int = 0
    """Goes up with every telling: who tells nothing new does not run."""

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"

    @property
    def stage(self) -> str:
        """How far it has come."""
        return f"after step {self.step}, {self.doing}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Progress:
        fields = json.loads(text)
        shares = fields.pop("shares")
        return cls(**fields, shares=None if shares is None else Shares(**shares))


def unheard(before: Sequence[Progress], after: Sequence[Progress]) -> set[int]:
    """Ranks that told nothing new from one reading to the next, other than those that left: they do not run."""
    counts = {rank.rank: rank.count for rank in before}
    return {rank.rank for rank in after if rank.doing != LEFT and counts.get(rank.rank) == rank.count}


def laggards(ranks: Sequence[Progress], silent: Collection[int]) -> dict[int, str]:
    """The ranks that the others wait for, each with the reason to think so; none where all wait for each other.

    `silent`: those that do not run (see `unheard`). Short of these it is whoever waits for nobody while others wait,
    and short of them whoever has finished fewer steps.
    """
    if silent:
        return {rank.rank: f"{_DEAD}; last heard of {rank.stage}" for rank in ranks if rank.rank in silent}
    busy = [rank for rank in ranks if not rank.waits]
    if 0 < len(busy) < len(ranks):
        return {rank.rank: _busy_with(rank) for rank in busy}
    foremost = max((rank.step for rank in ranks), default=0)
    return {
        rank.rank: f"it waits {rank.stage}, and others have finished step {foremost}"
        for rank in ranks
        if rank.step < foremost
    }


_DEAD = "it does not run at all (stopped, dead, or in a call that lets no other thread of the process run)"


def _busy_with(rank: Progress) -> str:
    if rank.doing == LEFT:
        return "it has left the run"
    return f"it waits for no other rank, and is in {rank.place} {rank.stage} for {rank.silent_seconds:.0f} s"


def accusation(ranks: Sequence[Progress], named: dict[int, str]) -> str:
    """For people: who holds up the run and why, a line each; `named` as `laggards` gives it."""
    lines = [f"{rank.name} holds up the run: {named[rank.rank]}" for rank in ranks if rank.rank in named]
    return "\n".join(lines or ["no rank stands out: all wait for each other (a lost message, or unlike collectives)"])


def table(ranks: Sequence[Progress]) -> str:
    """Every rank on a line."""
    return "\n".join(
        f"  {rank.name} {rank.stage} for {rank.silent_seconds:.0f} s, "
        f"{'waits for others in' if rank.waits else 'is in'} {rank.place}"
        for rank in ranks
    )


def wakers(ranks: Sequence[Progress], silent: Collection[int]) -> list[tuple[int, int]]:
    """(rank, pid): which rank is to wake which process, for those that do not run where another rank does."""
    able = {rank.pids: rank.rank for rank in reversed(ranks) if rank.rank not in silent}
    return [(able[rank.pids], rank.pid) for rank in ranks if rank.rank in silent and rank.pids in able]


def stragglers(ranks: Sequence[Progress]) -> dict[int, str]:
    """The ranks that others waited for in their last windows, each with a sentence for the log.

    A straggler waits for others less than these wait: by at least a fifth of the time, compared with their median.
    """
    shares = {rank.rank: rank.shares for rank in ranks if rank.shares is not None}
    sentences = {}
    for rank in ranks:
        others = [other.waiting for number, other in shares.items() if number != rank.rank]
        own = shares.get(rank.rank)
        if own is None or not others or median(others) - own.waiting < _NAMED_FROM:
            continue
        sentences[rank.rank] = (
            f"{rank.name} slows the others down: it waited {own.waiting:.0%} of the time, they {median(others):.0%}; "
            f"it spent {own.place_share:.0%} in {own.place}"
        )
    return sentences
