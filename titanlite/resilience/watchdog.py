"""Ends a rank whose run makes no progress, after it has left what tells why; and names ranks that slow the others down.

A thread beside the trainer, which gets a beat after every step. It writes stacks (`stacks.py`), and finds out with the
other ranks which of them holds up the run (`rank_table.py`). They share their table through the process group's store:
collectives need the very threads that hang.
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from titanlite.errors import TitanliteError
from titanlite.recipe.sections import WATCHDOG_PATIENCE
from titanlite.resilience.rank_table import (
    LEFT,
    HangReport,
    Location,
    RankStatus,
    find_stragglers,
    look_at,
    summarize,
)
from titanlite.resilience.stacks import STACKS_SIGNAL, StackDump, add_report

WINDOW_LOOKS = 600
"""Looks at a training rank, about a minute of them, from which its share of waiting is taken and compared."""
_LOOK_SECONDS = 0.1
_MOST_A_LOOK = 1.0
"""Seconds that count as silence between two looks, however many passed: a process that was stopped and goes on, all
ranks of a suspended job for instance, has not been silent meanwhile."""
_ENDING_SECONDS = 30.0
"""After so long the process ends, whether it could write all that it should or not."""
_TRAINING = "training"


class Beat(NamedTuple):
    """A sign of life; each is an object of its own, which distinguishes it from the next."""

    step: int
    phase: str


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


@dataclass(eq=False)
class Watchdog:
    """Watches the thread that enters it, on every rank.

    No beat for `seconds`: the stacks of all ranks go to their logs, with a report on who holds up the run, and every
    rank ends with exit code 1, for its launcher to start again. The first step, saves and validations may take
    `WATCHDOG_PATIENCE` times that. With `seconds` 0 nothing is watched or compared.

    A beat is the host's. A GPU that hangs shows once its host waits for it, at the next logged step at the latest; one
    that is slow, while its host waits as long as every other, is not found.
    """

    seconds: float
    logs: Path
    rank: int = 0
    ranks: int = 1
    on_hang: Callable[[int, HangReport], None] = lambda step, report: None
    """Called with the last step that this rank has finished, before the process ends, in the watching thread, while the
    watched one hangs."""

    def __post_init__(self) -> None:
        self._beat = Beat(0, "starting")
        self._status = RankStatus(self.rank, platform.node(), os.getpid(), _pid_namespace())
        self._coordinator: HangCoordinator | None = None
        self._left = threading.Event()

    def beat(self, step: int, phase: str = _TRAINING) -> None:
        """A sign of life from the watched thread, which has finished `step` and goes on to this `phase`."""
        self._beat = Beat(step, phase)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A beat before and after something other than a step, which may take longer."""
        step, before = self._beat
        self.beat(step, phase)
        try:
            yield
        finally:
            self.beat(step, before)

    def stragglers(self) -> list[str]:
        """Sentences on ranks that were found to slow the others down since the last call; on rank 0 alone."""
        found = self._coordinator.stragglers if self._coordinator is not None else ()
        return [found.popleft() for _ in range(len(found))] if found else []

    def __enter__(self) -> Watchdog:
        if self.seconds:
            self._stacks = StackDump(self.logs, self.rank, self._status.name)
            if self.ranks > 1:
                self._coordinator = HangCoordinator(self._status, self.ranks, min(self.seconds / 60, 2.0))
                self._coordinator.start()
            arguments = (threading.get_ident(),)
            self._watching = threading.Thread(target=self._watch, args=arguments, name="watchdog", daemon=True)
            self._watching.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self.seconds:
            self._left.set()
            self._watching.join()
            if self._coordinator is not None:
                self._coordinator.leave()
            self._stacks.close()

    def _watch(self, trainer: int) -> None:
        beat, silent_seconds, looked_at, armed_at = self._beat, 0.0, time.monotonic(), -math.inf
        jitter = random.Random(self._status.rank)  # not to look at always the same point of a step
        looks: Counter[Location] = Counter()
        while not self._left.wait(jitter.uniform(0.5, 1.5) * min(_LOOK_SECONDS, self.seconds / 20)):
            last, beat, now, seen = beat, self._beat, time.monotonic(), look_at(trainer)
            silent_seconds = silence(silent_seconds, now - looked_at) if beat is last else 0.0
            looked_at = now
            if now - armed_at >= self.seconds / 4:
                armed_at = now
                self._stacks.write_stacks_later(2 * self.seconds)
            looks[seen] += beat.phase == _TRAINING
            if looks.total() >= WINDOW_LOOKS:
                waited, busiest = summarize(looks)
                self._status = replace(self._status, waited=waited, busiest=busiest)
                looks.clear()
            self._status = replace(
                self._status, step=beat.step, phase=beat.phase, silent_seconds=silent_seconds, **seen._asdict()
            )
            if self._coordinator is not None:
                self._coordinator.status = self._status
            late = silent_seconds >= self.seconds * (1 if beat.phase == _TRAINING else WATCHDOG_PATIENCE)
            if late or (self._coordinator is not None and self._coordinator.hang):
                self._end(late)

    def _end(self, late: bool) -> None:
        """Write the stacks, agree on the report, end the process. Nothing here may keep it from ending."""
        timer = threading.Timer(_ENDING_SECONDS, os._exit, (TitanliteError.exit_code,))
        timer.daemon = True
        timer.start()
        status, coordinator = self._status, self._coordinator
        if coordinator is not None:
            coordinator.hang = True
        why = f"no sign of life for {status.silent_seconds:.0f} s" if late else "another rank gives no sign of life"
        self._stacks.write_stacks(f"{why}; stacks {status.stage}:")
        agreed = coordinator.wait_for_report() if coordinator is not None else None
        unknown = "who holds it up is unknown: the store, at rank 0 or its launcher, does not answer"
        alone = f"{status.name} is in {status.place} {status.stage}"
        reason = alone if coordinator is None else unknown
        report = agreed or HangReport(reason, "", status.rank, status.host, to_signal=[], dumping=1)
        reason = f"no progress (resilience.watchdog_seconds = {self.seconds:g}): {report.reason}"
        if coordinator is None or agreed is None or coordinator.is_reporter:
            add_report(self.logs, f"{reason}\n{report.table}".rstrip())
        self._stacks.write(reason)
        self.on_hang(status.step, replace(report, reason=reason))
        if coordinator is not None and agreed is not None:
            # From now on trainers may go on. A process that was stopped does too, to end as all do.
            for pid in (pid for rank, pid in report.to_signal if rank == status.rank):
                with suppress(OSError):
                    os.kill(pid, STACKS_SIGNAL)
                    os.kill(pid, signal.SIGCONT)
            coordinator.wait_for_dumps(report)
        os._exit(TitanliteError.exit_code)


def silence(seconds: float, passed: float) -> float:
    """How long there has been no beat while this process ran, `passed` seconds after the look before."""
    return seconds + min(passed, _MOST_A_LOOK)


def _pid_namespace() -> str:
    """A name that processes share if they know each other by the same number: containers of one machine do not."""
    with suppress(OSError):
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    return platform.node()


OFF = Watchdog(0.0, Path())
"""Watches nothing: for a trainer inside of another program."""
