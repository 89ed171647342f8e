"""How ranks share their table: through the process group's store, for collectives need the very threads that hang."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, replace

from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from titanlite.resilience.rank_table import LEFT, HangReport, RankStatus, find_stragglers

_HANG, _REPORTERS, _REPORT, _DUMPED = "hang", "reporters", "report", "dumped"
_READINGS_APART = 3
"""Periods between two readings that tell who still runs."""
_DUMPING_SECONDS = 10.0
"""A rank that has written its stacks waits this long for the others; one that is stuck in the system never ends."""


class HangCoordinator(threading.Thread):
    """Updates this rank's row of the table. Once a rank finds a hang, all agree on a report, and the thread ends.

    Only this thread waits for the store, whose machine may be dead: the other threads read its attributes.
    """

    def __init__(self, status: RankStatus, ranks: int, period_seconds: float) -> None:
        """Needs the default process group, whose store it gets a client of its own for."""
        super().__init__(name="watchdog-store", daemon=True)
        self.status = status
        """This rank's row; put another in its place whenever something changes."""
        self.hang = False
        """Whether a rank has found that the run stands still; set it to say so."""
        self.report: HangReport | None = None
        """What the ranks agreed on; None while the store does not answer."""
        self.is_reporter = False
        """Whether this rank is the one to print the report."""
        self.stragglers: deque[str] = deque()
        """On rank 0: sentences on stragglers that are not logged yet."""
        self._straggling: set[int] = set()
        self._updates = 0
        self._left = threading.Event()
        self._keys = [f"rank-{rank}" for rank in range(ranks)]
        self._key = self._keys[status.rank]
        self._period = period_seconds
        # Its own connection: the trainer may be blocked within its client. The group's store is new at every start.
        self._store = PrefixStore("watchdog", _get_default_store().clone())  # type: ignore[attr-defined]

    def leave(self) -> None:
        """Say that this rank needs no watching any more, and end the thread."""
        self._left.set()
        self.join(timeout=5.0)  # it may be waiting for a machine that is gone

    def wait_for_report(self) -> HangReport | None:
        """The report, waited for as long as ranks need to agree; None if the store does not answer."""
        self.join(timeout=2 * self._period * _READINGS_APART + 10.0)
        return self.report

    def wait_for_dumps(self, report: HangReport) -> None:
        """Say that this rank has written its stacks, and return once all ranks have, or some seconds later.

        The end of any one ends the others: its launcher kills them, and the store may be gone with it.
        """
        until = time.monotonic() + _DUMPING_SECONDS
        with suppress(RuntimeError):
            dumped = self._store.add(_DUMPED, 1)
            while dumped < report.dumping and time.monotonic() < until:
                time.sleep(self._period / 4)
                dumped = self._store.add(_DUMPED, 0)

    def run(self) -> None:
        with suppress(RuntimeError):  # the store is gone: what is known by now has to do
            compared = None
            while not self._left.wait(self._period):
                self._update()
                if self.hang:
                    self._store.set(_HANG, "1")
                self.hang = self.hang or self._store.check([_HANG])
                if self.hang:
                    self.report = self._agree()
                    return
                if self.status.rank == 0 and self.status.waited is not compared:  # a window has ended
                    compared = self.status.waited
                    self._note_stragglers()
            self.status = replace(self.status, phase=LEFT)
            self._update()

    def _update(self) -> None:
        self._updates += 1
        self._store.set(self._key, json.dumps(asdict(replace(self.status, updates=self._updates))))

    def _table(self) -> list[RankStatus]:
        """Every rank that has a row yet, in order."""
        keys = self._keys if self._store.check(self._keys) else [key for key in self._keys if self._store.check([key])]
        return [RankStatus(**json.loads(text)) for text in self._store.multi_get(keys)]

    def _agree(self) -> HangReport:
        """One rank makes the report, the others read it. Rows are updated meanwhile, which shows who runs."""
        self.is_reporter = self._store.add(_REPORTERS, 1) == 1
        if self.is_reporter:
            before = self._table()
            for _ in range(_READINGS_APART):
                time.sleep(self._period)
                self._update()
            self._store.set(_REPORT, json.dumps(asdict(HangReport.of(before, self._table()))))
        while not self._store.check([_REPORT]):
            time.sleep(self._period)
            self._update()
        return HangReport(**json.loads(self._store.get(_REPORT)))

    def _note_stragglers(self) -> None:
        """Keep what is found of each straggler once, for as long as it lasts."""
        found = find_stragglers(self._table())
        self.stragglers.extend(sentence for rank, sentence in found.items() if rank not in self._straggling)
        self._straggling = set(found)
