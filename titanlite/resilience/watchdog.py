"""Ends a rank whose run makes no progress, after it has left what tells why; and names ranks that slow the others down.

A thread beside the trainer, which gives a sign of life after every step and does nothing else for it. What it leaves
is in `evidence.py`; whose fault it is, the ranks find out together (`board.py`, `progress.py`).
"""

from __future__ import annotations

import math
import os
import platform
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from titanlite.errors import TitanliteError
from titanlite.recipe.sections import WATCHDOG_PATIENCE
from titanlite.resilience.board import Board
from titanlite.resilience.evidence import ASKS_FOR_STACKS, Evidence, add_report, log_of
from titanlite.resilience.progress import Progress
from titanlite.resilience.sampling import Sampler

WINDOW_LOOKS = 600
"""Looks at a training rank, about a minute of them, from which its share of waiting is taken and compared."""
_LOOK_SECONDS = 0.1
_MOST_A_LOOK = 1.0
"""Seconds that count as silence between two looks, however many passed: a process that was stopped and goes on, all
ranks of a suspended job for instance, has not been silent meanwhile."""
_LAST_WORDS_SECONDS = 30.0
"""After so long the process ends, whether it could write its evidence or not."""
_TRAINING = "training"


@dataclass(frozen=True)
class Hang:
    """Why a run without progress is ended."""

    step: int
    """The last that this rank has finished."""
    verdict: str
    rank: int
    """One that holds up the run; this one, if that is unknown or none stands out."""
    host: str
    """That rank's."""
    stacks: Path
    """The file that has them, of that rank."""


LastWords = Callable[[Hang], None]


class Beat(NamedTuple):
    """A sign of life; each is an object of its own, which is how the next one is told from it."""

    step: int
    doing: str


class Watchdog:
    """Watches the thread that enters it, on every rank.

    No sign of life for `seconds`: the stacks of all ranks go to their logs, with a verdict on who holds up the run, and
    every rank ends with exit code 1, for its launcher to start again. The first step, saves and validations may take
    `WATCHDOG_PATIENCE` times that. With `seconds` 0 nothing is watched and nobody compared.

    A sign of life is the host's. A GPU that hangs shows once its host waits for it, at the next logged step at the
    latest; one that is slow, while its host waits as long as every other, is not found.
    """

    def __init__(
        self,
        seconds: float,
        logs: Path,
        rank: int = 0,
        ranks: int = 1,
        last_words: LastWords | None = None,
    ) -> None:
        """`last_words` is called before the process ends, in the watching thread, while the watched one hangs."""
        self._seconds = seconds
        self._logs = logs
        self._ranks = ranks
        self._last_words = last_words
        self._beat = Beat(0, "starting")
        self._mine = Progress(rank, platform.node(), _pid_space(), os.getpid(), self._beat.step, self._beat.doing)
        self._board: Board | None = None
        self._left = threading.Event()

    def beat(self, step: int, doing: str = _TRAINING) -> None:
        """A sign of life from the watched thread, which has finished `step` and goes on to what it is `doing`."""
        self._beat = Beat(step, doing)

    @contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """A sign of life before and after something other than a step, which may take longer."""
        step, before = self._beat
        self.beat(step, doing)
        try:
            yield
        finally:
            self.beat(step, before)

    def stragglers(self) -> list[str]:
        """Sentences on ranks that were found to slow the others down since the last call; on the first rank alone."""
        if self._board is None:
            return []
        return [self._board.slow.popleft() for _ in range(len(self._board.slow))]

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._sampler = Sampler(threading.get_ident())
            self._evidence = Evidence(self._logs, self._mine)
            if self._ranks > 1:
                self._board = Board(self._mine, self._ranks, min(self._seconds / 60, 2.0))
                self._exchanging = threading.Thread(target=self._board.run, name="watchdog-board", daemon=True)
                self._exchanging.start()
            self._watching = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._watching.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._seconds:
            self._left.set()
            self._watching.join()
            if self._board is not None:
                self._board.stop()
                self._exchanging.join(timeout=5.0)  # it may be waiting for a machine that is gone
            self._evidence.close()

    def _watch(self) -> None:
        silence = _Silence(self._beat)
        armed_at = -math.inf
        uneven = random.Random(self._mine.rank)  # so as not to look at always the same point of a step
        while not self._left.wait(uneven.uniform(0.5, 1.5) * min(_LOOK_SECONDS, self._seconds / 20)):
            beat, now, seen = self._beat, time.monotonic(), self._sampler.look()
            silent_seconds = silence.after(beat, now)
            if now - armed_at >= self._seconds / 4:
                armed_at = now
                self._evidence.write_later(2 * self._seconds)
            if beat.doing == _TRAINING:
                self._sampler.count(seen)
            if self._sampler.looks >= WINDOW_LOOKS:
                self._mine = replace(self._mine, shares=self._sampler.window())
            self._mine = replace(
                self._mine, step=beat.step, doing=beat.doing, silent_seconds=silent_seconds, waits=seen.waits,
                place=seen.place,
            )  # fmt: skip
            if self._board is not None:
                self._board.mine = self._mine
            late = silent_seconds >= self._seconds * (1 if beat.doing == _TRAINING else WATCHDOG_PATIENCE)
            if late or (self._board is not None and self._board.ending):
                self._end(late)

    def _end(self, late: bool) -> None:
        """Leave the evidence, find or hear the verdict, end the process. Nothing here may keep it from ending."""
        timer = threading.Timer(_LAST_WORDS_SECONDS, os._exit, (TitanliteError.exit_code,))
        timer.daemon = True
        timer.start()
        mine, board = self._mine, self._board
        if board is not None:
            board.ending = True
        why = f"no sign of life for {mine.silent_seconds:.0f} s" if late else "another rank gives no sign of life"
        self._evidence.write_all(f"{why}; stacks {mine.stage}:")
        verdict = board.heard() if board is not None else None
        if verdict is not None:
            text, everyone = verdict.text, verdict.table
        elif board is not None:
            text, everyone = "who is to blame is unknown: the store, at the first rank or its launcher, is silent", ""
        else:
            text, everyone = f"{mine.name} is in {mine.place} {mine.stage}", ""
        text = f"no progress (resilience.watchdog_seconds = {self._seconds:g}): {text}"
        if verdict is None or (board is not None and board.reports):
            add_report(self._logs, f"{text}\n{everyone}".rstrip())
        self._evidence.write(text)
        if self._last_words is not None:
            rank, host = verdict.blamed[0] if verdict is not None and verdict.blamed else (mine.rank, mine.host)
            self._last_words(Hang(mine.step, text, rank, host, log_of(self._logs, rank)))
        if board is not None and verdict is not None:
            _wake([pid for rank, pid in verdict.wakers if rank == mine.rank])  # from now on trainers may go on
            board.part()
        os._exit(TitanliteError.exit_code)


class _Silence:
    """How long there has been no new sign of life, while this process ran."""

    def __init__(self, beat: Beat) -> None:
        self._beat = beat
        self._seconds = 0.0
        self._at = time.monotonic()

    def after(self, beat: Beat, now: float) -> float:
        """Seconds of silence as of `now`, `beat` being the last sign."""
        passed, self._at = now - self._at, now
        self._seconds = self._seconds + min(passed, _MOST_A_LOOK) if beat is self._beat else 0.0
        self._beat = beat
        return self._seconds


def _pid_space() -> str:
    """A name that processes share if they know each other by the same number: containers of one machine do not."""
    with suppress(OSError):
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    return platform.node()


def _wake(pids: list[int]) -> None:
    """Have processes of this machine that do not run write their stacks. One that is stopped goes on, to end as all."""
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, ASKS_FOR_STACKS)
            os.kill(pid, signal.SIGCONT)


OFF = Watchdog(0.0, Path())
"""Watches nothing: for a trainer inside of another program."""
