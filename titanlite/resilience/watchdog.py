"""Ends a rank whose run makes no progress, after it has left what tells why; and names ranks that slow the others down.

A thread beside the trainer, which gets a beat after every step. It writes stacks (`stacks.py`), and finds out with the
other ranks which of them holds up the run (`coordinator.py`, `rank_table.py`).
"""

from __future__ import annotations

import math
import os
import platform
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from titanlite.errors import TitanliteError
from titanlite.recipe.sections import WATCHDOG_PATIENCE
from titanlite.resilience.coordinator import HangCoordinator
from titanlite.resilience.rank_table import HangReport, RankStatus
from titanlite.resilience.sampling import Location, look_at, summarize
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


class Watchdog:
    """Watches the thread that enters it, on every rank.

    No beat for `seconds`: the stacks of all ranks go to their logs, with a report on who holds up the run, and every
    rank ends with exit code 1, for its launcher to start again. The first step, saves and validations may take
    `WATCHDOG_PATIENCE` times that. With `seconds` 0 nothing is watched or compared.

    A beat is the host's. A GPU that hangs shows once its host waits for it, at the next logged step at the latest; one
    that is slow, while its host waits as long as every other, is not found.
    """

    def __init__(
        self,
        seconds: float,
        logs: Path,
        rank: int = 0,
        ranks: int = 1,
        on_hang: Callable[[int, HangReport], None] | None = None,
    ) -> None:
        """`on_hang` is called with the last step that this rank has finished, before the process ends, in the watching
        thread, while the watched one hangs.
        """
        self._seconds = seconds
        self._logs = logs
        self._ranks = ranks
        self._on_hang = on_hang
        self._beat = Beat(0, "starting")
        self._status = RankStatus(rank, platform.node(), os.getpid(), _pid_namespace())
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
        if self._seconds:
            self._stacks = StackDump(self._logs, self._status.rank, self._status.name)
            if self._ranks > 1:
                self._coordinator = HangCoordinator(self._status, self._ranks, min(self._seconds / 60, 2.0))
                self._coordinator.start()
            arguments = (threading.get_ident(),)
            self._watching = threading.Thread(target=self._watch, args=arguments, name="watchdog", daemon=True)
            self._watching.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._seconds:
            self._left.set()
            self._watching.join()
            if self._coordinator is not None:
                self._coordinator.leave()
            self._stacks.close()

    def _watch(self, trainer: int) -> None:
        beat, silent_seconds, looked_at, armed_at = self._beat, 0.0, time.monotonic(), -math.inf
        jitter = random.Random(self._status.rank)  # not to look at always the same point of a step
        looks: Counter[Location] = Counter()
        while not self._left.wait(jitter.uniform(0.5, 1.5) * min(_LOOK_SECONDS, self._seconds / 20)):
            last, beat, now, seen = beat, self._beat, time.monotonic(), look_at(trainer)
            silent_seconds = silence(silent_seconds, now - looked_at) if beat is last else 0.0
            looked_at = now
            if now - armed_at >= self._seconds / 4:
                armed_at = now
                self._stacks.write_stacks_later(2 * self._seconds)
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
            late = silent_seconds >= self._seconds * (1 if beat.phase == _TRAINING else WATCHDOG_PATIENCE)
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
        reason = f"no progress (resilience.watchdog_seconds = {self._seconds:g}): {report.reason}"
        if coordinator is None or agreed is None or coordinator.is_reporter:
            add_report(self._logs, f"{reason}\n{report.table}".rstrip())
        self._stacks.write(reason)
        if self._on_hang is not None:
            self._on_hang(status.step, replace(report, reason=reason))
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
