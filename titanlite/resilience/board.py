"""How the watchdogs of a run's ranks talk: through the process group's store, beside whatever their trainers do.

No collectives, which would need the very threads that hang. All waiting for the store is done in a thread of its own:
whoever asks gets what is known, also when the store's machine is dead.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from titanlite.resilience.progress import LEFT, Progress, accusation, laggards, stragglers, table, unheard, wakers

_ENDING, _REPORTERS, _VERDICT, _READY, _PARTING = "ending", "reporters", "verdict", "ready", "parting"
_READINGS_APART = 3
"""Periods between two readings that tell who still runs."""
_PARTING_SECONDS = 10.0
"""So long a rank that is ready to end waits for the others; one that is stuck in the system may never be."""


@dataclass(frozen=True)
class Verdict:
    """Why the run stands still, as one of the ranks found; the same on all."""

    text: str
    table: str
    wakers: list[list[int]]
    """(rank, pid): the rank wakes the process, so that its stacks are written too."""
    blamed: list[tuple[int, str]]
    """(rank, host) of those that hold up the run; empty if all wait for each other."""
    parting: int
    """How many ranks leave evidence: those that run, and those that are woken."""

    @classmethod
    def of(cls, before: list[Progress], after: list[Progress]) -> Verdict:
        """What follows from two readings of all ranks."""
        silent = unheard(before, after)
        named, woken = laggards(after, silent), [list(pair) for pair in wakers(after, silent)]
        blamed = [(rank.rank, rank.host) for rank in after if rank.rank in named]
        running = sum(rank.doing != LEFT and rank.rank not in silent for rank in after)
        return cls(accusation(after, named), table(after), woken, blamed, running + len(woken))


class Board:
    """This rank's word to the others, and what it knows of theirs. `run` is the body of the thread that exchanges."""

    def __init__(self, mine: Progress, ranks: int, period_seconds: float) -> None:
        """Needs the default process group, whose store it gets a client of its own for."""
        self.mine = mine
        """What the others are told; put another in its place whenever something changes."""
        self.ending = False
        """Whether a rank has found that the run stands still; set it to say so. Every rank then ends."""
        self.reports = False
        """Whether it falls to this rank to write the verdict down."""
        self.slow: deque[str] = deque()
        """On the first rank: sentences on stragglers that nobody has taken yet."""
        self._verdict: Verdict | None = None
        self._done = threading.Event()
        """There is a verdict, or there will never be one."""
        self._stopped = threading.Event()
        self._ready = threading.Event()
        self._parted = threading.Event()
        """All ranks are ready to end, or it will never be known."""
        self._keys = [f"rank-{rank}" for rank in range(ranks)]
        self._period = period_seconds
        self._tellings = 0
        self._named: set[int] = set()
        # Its own connection: the trainer may be blocked within its client. The group's store is new at every start.
        self._store = PrefixStore("watchdog", _get_default_store().clone())  # type: ignore[attr-defined]

    def stop(self) -> None:
        """Have the thread say good-bye and end."""
        self._stopped.set()
        self._ready.set()

    def heard(self) -> Verdict | None:
        """What the ranks found, waited for as long as that takes them; None if the store does not answer."""
        self._done.wait(timeout=2 * self._period * _READINGS_APART + 10.0)
        return self._verdict

    def part(self) -> None:
        """Say that this rank has left its evidence, and return once all ranks have, or some seconds later.

        The end of any one ends the others: its launcher kills them, and the store may be gone with it.
        """
        self._ready.set()
        self._parted.wait(timeout=_PARTING_SECONDS)

    def run(self) -> None:
        """The body of the thread."""
        try:
            self._exchange()
        except RuntimeError:
            pass  # the store is gone: what is known by now has to do
        finally:
            self._done.set()
            self._parted.set()

    def _exchange(self) -> None:
        compared = None
        while not self._stopped.wait(self._period):
            self._tell()
            if self.ending:
                self._store.set(_ENDING, "1")
            self.ending = self.ending or self._store.check([_ENDING])
            if self.ending:
                self._verdict = self._agree()
                self._done.set()
                self._part_from(self._verdict.parting)
                return
            if self.mine.rank == 0 and self.mine.shares is not compared:
                compared = self.mine.shares
                self._compare()
        self.mine = replace(self.mine, doing=LEFT)
        self._tell()

    def _tell(self) -> None:
        self._tellings += 1
        self._store.set(self._keys[self.mine.rank], replace(self.mine, count=self._tellings).to_json())

    def _all(self) -> list[Progress]:
        """Every rank that has told anything yet, in order."""
        keys = self._keys if self._store.check(self._keys) else [key for key in self._keys if self._store.check([key])]
        return [Progress.from_json(text) for text in self._store.multi_get(keys)]

    def _agree(self) -> Verdict:
        """One rank reaches the verdict, the others read it."""
        self.reports = self._store.add(_REPORTERS, 1) == 1
        if self.reports:
            before = self._all()
            for _ in range(_READINGS_APART):
                time.sleep(self._period)
                self._tell()
            verdict = Verdict.of(before, self._all())
            self._store.set(_VERDICT, json.dumps(vars(verdict)))
            return verdict
        while not self._store.check([_VERDICT]):
            time.sleep(self._period)
            self._tell()
        return Verdict(**json.loads(self._store.get(_VERDICT)))

    def _part_from(self, ranks: int) -> None:
        """Return when so many are ready. Raises `RuntimeError` when that takes too long."""
        self._ready.wait()
        if self._store.add(_READY, 1) >= ranks:
            self._store.set(_PARTING, "1")
        self._store.wait([_PARTING], timedelta(seconds=_PARTING_SECONDS))

    def _compare(self) -> None:
        """Note who slows the others down, once for as long as it lasts."""
        found = stragglers(self._all())
        self.slow.extend(sentence for rank, sentence in found.items() if rank not in self._named)
        self._named = set(found)
