"""Ends a rank whose run makes no progress, after it has left what tells why; and names ranks that slow the others down.

A thread beside the trainer, which reads how many steps are taken. It finds out with the other ranks which of them
holds up the run (`rank_table.py`). They share their table through the process group's store: collectives need the very
threads that hang.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import platform
import random
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from titanlite.errors import TitanliteError
from titanlite.files import APPEND, open_file
from titanlite.parallel.ranks import ALONE, Ranks
from titanlite.recipe.sections import WATCHDOG_PATIENCE
from titanlite.resilience.rank_table import LEFT, HangReport, Location, RankStatus, find_stragglers, look_at, summarize

WINDOW_LOOKS = 600  # at a training rank, about a minute of them, of which its share of waiting is compared
_LOOK_SECONDS = 0.1
_MOST_A_LOOK = 1.0
"""Seconds that count as silence between two looks, however many passed: a process that was stopped and goes on, all
ranks of a suspended job for instance, has not been silent meanwhile."""
_ENDING_SECONDS = 30.0  # after which the process ends, whether it could write all that it should or not
_OTHERS_SECONDS = 5.0  # from what a rank writes to its end, at which its launcher kills the others
_TRAINING = "training"
_STACKS_SIGNAL = signal.SIGUSR2  # upon which a rank writes its stacks to its log and goes on
_RECORDERS = {"nccl": "_dump_nccl_trace_json", "fr": "_dump_fr_trace_json"}
"""In `torch._C._distributed_c10d`, as far as this build of torch has them: NCCL's collectives, and all others. Their
other form is a pickle, which would run code in whoever opens it."""
_FOUND, _REPORT = "found", "report"  # keys of the store: how many ranks have found a hang, and what follows
_READINGS_APART = 3  # periods between two readings that tell who still runs


def log_path(logs: Path, rank: int) -> Path:
    """The file that has a rank's stacks."""
    return logs / f"rank-{rank:05d}.log"


class StackLog:
    """`RUN/logs/rank-00003.log`, which every start of the run adds to; where it cannot be opened, standard error.

    It takes the stacks of all threads, without a lock and without reading another file.
    """

    def __init__(self, logs: Path, rank: int, name: str) -> None:
        """`name` of the process stands before each paragraph."""
        self._logs, self._rank, self._name = logs, rank, name
        try:
            self.file = open_file(log_path(logs, rank), APPEND)
        except OSError:
            self.file = os.dup(2)  # a folder that cannot be used stops the run elsewhere, with a clearer error
        self.write(f"watched from now on; {_STACKS_SIGNAL.name} has it write its stacks here")
        # A handler that is there already is the user's, or that of the program around the run.
        self._handles_faults = not faulthandler.is_enabled()
        if self._handles_faults:
            faulthandler.enable(self.file)
        faulthandler.register(_STACKS_SIGNAL, self.file)

    def close(self) -> None:
        """Put the signals back, and close the file."""
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(_STACKS_SIGNAL)
        if self._handles_faults:
            faulthandler.disable()
        os.close(self.file)

    def write(self, text: str) -> None:
        """Add a paragraph with the time. A full disk loses it."""
        with suppress(OSError):
            os.write(self.file, f"{_now()} {self._name}: {text}\n".encode())

    def write_stacks(self, why: str) -> None:
        """Write the stacks of all threads now, and what the flight recorder holds in a file beside them."""
        self.write(why)
        with suppress(OSError):
            faulthandler.dump_traceback(self.file)
        for kind, function in _RECORDERS.items():
            dump = getattr(getattr(torch._C, "_distributed_c10d", None), function, None)
            text = dump() if dump is not None else b"{}"
            with suppress(OSError, ValueError):
                if json.loads(text).get("entries"):
                    stamp = _now().replace(":", "")
                    (self._logs / f"flight-{kind}-{self._rank:05d}-{stamp}.json").write_bytes(text)


class HangCoordinator(threading.Thread):
    """Updates this rank's row of the table. Once a rank finds a hang, all agree on a report, and the thread ends.

    Only this thread waits for the store, whose machine may be dead: the other threads read its attributes.
    """

    def __init__(self, status: RankStatus, ranks: Ranks, period_seconds: float) -> None:
        super().__init__(name="watchdog-store", daemon=True)
        self.status = status  # this rank's row; put another in its place whenever something changes
        self.hang = False  # whether a rank has found that the run stands still; set it to say so
        self.report: HangReport | None = None  # what the ranks agreed on; None while the store does not answer
        self.is_reporter = False  # whether this rank is the one to print the report
        self.stragglers: deque[str] = deque()  # on rank 0: sentences on stragglers that are not logged yet
        self._straggling: set[int] = set()
        self._updates = 0
        self._left = threading.Event()
        self._keys = [f"rank-{rank}" for rank in range(ranks.size)]
        self._period = period_seconds
        self._store = ranks.store("watchdog")

    def leave(self) -> None:
        """Say that this rank needs no watching any more, and end the thread."""
        self._left.set()
        self.join(timeout=5.0)  # it may be waiting for a machine that is gone

    def wait_for_report(self) -> HangReport | None:
        """The report, waited for as long as ranks need to agree; None if the store does not answer."""
        self.join(timeout=2 * self._period * _READINGS_APART + 10.0)
        return self.report

    def run(self) -> None:
        with suppress(RuntimeError):  # the store is gone: what is known by now has to do
            compared = None
            while not self._left.wait(self._period):
                self._update()
                finds = self.hang
                found = self._store.add(_FOUND, int(finds))
                if found:
                    self.is_reporter, self.hang = finds and found == 1, True
                    self.report = self._agree()
                    return
                if self.status.rank == 0 and self.status.waited is not compared:  # a window has ended
                    compared = self.status.waited
                    slow = find_stragglers(self._table())
                    # Each once, for as long as it lasts.
                    self.stragglers.extend(sentence for rank, sentence in slow.items() if rank not in self._straggling)
                    self._straggling = set(slow)
            self.status = replace(self.status, phase=LEFT)
            self._update()

    def _update(self) -> None:
        self._updates += 1
        row = asdict(replace(self.status, updates=self._updates))
        self._store.set(self._keys[self.status.rank], json.dumps(row))

    def _table(self) -> list[RankStatus]:
        """Every rank that has a row yet, in order."""
        keys = self._keys if self._store.check(self._keys) else [key for key in self._keys if self._store.check([key])]
        return [RankStatus(**json.loads(text)) for text in self._store.multi_get(keys)]

    def _agree(self) -> HangReport:
        """One rank makes the report, the others read it. Rows are updated meanwhile, which shows who runs."""
        before, readings = self._table() if self.is_reporter else [], 0
        while not self._store.check([_REPORT]):
            time.sleep(self._period)
            self._update()
            readings += 1
            if self.is_reporter and readings == _READINGS_APART:
                self._store.set(_REPORT, json.dumps(asdict(HangReport.of(before, self._table()))))
        return HangReport(**json.loads(self._store.get(_REPORT)))


@dataclass(eq=False)
class Watchdog:
    """Watches the thread that enters it, on every rank.

    No step for `seconds`: the stacks of all ranks go to their logs, with a report on who holds up the run, and every
    rank ends with exit code 1, for its launcher to start again. The first step, saves and validations may take
    `WATCHDOG_PATIENCE` times that. With `seconds` 0 nothing is watched or compared.

    Steps are the host's. A GPU that hangs shows once its host waits for it, at the next logged step at the latest; one
    that is slow, while its host waits as long as every other, is not found.
    """

    seconds: float
    logs: Path
    ranks: Ranks = ALONE
    steps_taken: Callable[[], int] = lambda: 0  # asked by the watching thread at each look
    on_hang: Callable[[int, HangReport], None] = lambda step, report: None
    """Called with the last step that this rank has finished, before the process ends, in the watching thread, while the
    watched one hangs."""

    def __post_init__(self) -> None:
        self._phase = (_TRAINING,)  # each is an object of its own, which tells it from the next
        self._left = threading.Event()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What may take longer than a step does; its beginning and its end are signs of life too."""
        (before,) = self._phase
        self._phase = (phase,)
        try:
            yield
        finally:
            self._phase = (before,)

    def stragglers(self) -> list[str]:
        """Sentences on ranks that were found to slow the others down since the last call; on rank 0 alone."""
        found = self._coordinator.stragglers if self.seconds else ()
        return [found.popleft() for _ in range(len(found))] if found else []

    def __enter__(self) -> Watchdog:
        if self.seconds:
            status = RankStatus(self.ranks.rank, platform.node(), os.getpid(), _pid_namespace())
            self._stacks = StackLog(self.logs, status.rank, status.name)
            self._coordinator = HangCoordinator(status, self.ranks, min(self.seconds / 60, 2.0))
            self._coordinator.start()
            arguments = (threading.get_ident(),)
            self._watching = threading.Thread(target=self._watch, args=arguments, name="watchdog", daemon=True)
            self._watching.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self.seconds:
            self._left.set()
            self._watching.join()
            self._coordinator.leave()
            self._stacks.close()

    def _watch(self, trainer: int) -> None:
        step, current, silent_seconds, looked_at, armed_at = -1, self._phase, 0.0, time.monotonic(), -math.inf
        jitter = random.Random(self.ranks.rank)  # not to look at always the same point of a step
        coordinator, looks = self._coordinator, Counter[Location]()
        while not self._left.wait(jitter.uniform(0.5, 1.5) * min(_LOOK_SECONDS, self.seconds / 20)):
            last, before, now, seen = step, current, time.monotonic(), look_at(trainer)
            step, current = self.steps_taken(), self._phase
            still = step == last and current is before
            silent_seconds, looked_at = silence(silent_seconds, now - looked_at) if still else 0.0, now
            if now - armed_at >= self.seconds / 4:
                armed_at = now  # for a call that keeps the interpreter, in which this thread cannot write them
                faulthandler.dump_traceback_later(2 * self.seconds, file=self._stacks.file)
            (phase,) = current
            changes = {"step": step, "phase": phase, "silent_seconds": silent_seconds, **seen._asdict()}
            looks[seen] += phase == _TRAINING
            if looks.total() >= WINDOW_LOOKS:
                changes["waited"], changes["busiest"] = summarize(looks)
                looks.clear()
            coordinator.status = replace(coordinator.status, **changes)
            late = silent_seconds >= self.seconds * (1 if phase == _TRAINING else WATCHDOG_PATIENCE)
            if late or coordinator.hang:
                self._end(late)

    def _end(self, late: bool) -> None:
        """Write the stacks, agree on the report, end the process. Nothing here may keep it from ending."""
        timer = threading.Timer(_ENDING_SECONDS, os._exit, (TitanliteError.exit_code,))
        timer.daemon = True
        timer.start()
        coordinator, status = self._coordinator, self._coordinator.status
        coordinator.hang = True
        why = f"no sign of life for {status.silent_seconds:.0f} s" if late else "another rank gives no sign of life"
        self._stacks.write_stacks(f"{why}; stacks {status.stage}:")
        agreed = coordinator.wait_for_report()
        unknown = "who holds it up is unknown: the store, at rank 0 or its launcher, does not answer"
        report = agreed or HangReport(unknown, "", status.rank, status.host, to_signal=[])
        reason = f"no progress (resilience.watchdog_seconds = {self.seconds:g}): {report.reason}"
        if agreed is None or coordinator.is_reporter:
            _print_report(self.logs, f"{reason}\n{report.table}".rstrip())
        self._stacks.write(reason)
        self.on_hang(status.step, replace(report, reason=reason))
        # From now on trainers may go on. A process that was stopped does too, to end as all do.
        for pid in (pid for rank, pid in report.to_signal if rank == status.rank):
            with suppress(OSError):
                os.kill(pid, _STACKS_SIGNAL)
                os.kill(pid, signal.SIGCONT)
        if self.ranks.size > 1:
            time.sleep(_OTHERS_SECONDS)
        os._exit(TitanliteError.exit_code)


def silence(seconds: float, passed: float) -> float:
    """How long there has been no sign of life while this process ran, `passed` seconds after the look before."""
    return seconds + min(passed, _MOST_A_LOOK)


def _print_report(logs: Path, text: str) -> None:
    """Say on standard error and in `RUN/logs/watchdog.log` why the run stands still."""
    data = f"{_now()} {text}\n".encode()
    with suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, data)
    with suppress(OSError), open(open_file(logs / "watchdog.log", APPEND), "ab", buffering=0) as file:
        file.write(data)


def _pid_namespace() -> str:
    """A name that processes share if they know each other by the same number: containers of one machine do not."""
    with suppress(OSError):
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    return platform.node()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


OFF = Watchdog(0.0, Path())  # watches nothing: for a trainer inside of another program
