"""Processes that do the work of `titanlite data prepare`, each with one core and none of which outlives it; and
the line that shows how far they are.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import islice
from multiprocessing import active_children, get_context, parent_process
from typing import IO, Any

from titanlite.errors import DataError
from titanlite.registry import PLUGINS, import_plugin
from titanlite.text import format_bytes

# Numpy alone starts a thread for each core when it is imported.
_ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def cores() -> int:
    """Those that this process may use, where the system says which."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerPool:
    """At most `count` processes, spawned as they are needed. Used by `with`, which ends them."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._executor = ProcessPoolExecutor(count, get_context("spawn"), _begin, (tuple(PLUGINS),))

    def __enter__(self) -> WorkerPool:
        self._others, self._environment = {*active_children()}, dict(os.environ)
        os.environ.update(_ONE_THREAD)
        return self

    def __exit__(self, *_: object) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        for process in {*active_children()} - self._others:  # a unit may take a minute, too long after Ctrl-C
            process.kill()
        self._executor.shutdown(cancel_futures=True)

    def run(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Call `function` with the arguments of each task; yields number and result in the order they are done.

        After a failure no further task begins, and those under way are waited for: whatever the number of workers, the
        earliest task's error is raised.
        """
        waiting = iter(enumerate(tasks))
        running: dict[Future[Any], int] = {}
        failures: dict[int, DataError] = {}
        try:
            while True:
                for number, task in islice(waiting, 0 if failures else self._count - len(running)):
                    running[self._executor.submit(function, *task)] = number
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number = running[future]
                    try:
                        yield number, future.result()
                    except DataError as error:
                        failures[number] = error
                    del running[future]
        except BrokenProcessPool as error:
            begun = ", ".join(str(tasks[number][0]) for number in sorted(running.values()))
            fix = "split very long documents, or take fewer --workers. What is done stays done: start it again."
            raise DataError(f"a worker was killed at {begun}; it may have run out of memory: {fix}") from error
        if failures:
            raise failures[min(failures)]


def _begin(plugins: Sequence[str]) -> None:
    """What each process does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too
    os.dup2(2, 1)  # whatever a library prints is not the command's output
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for module in plugins:
        import_plugin(module)


def _end_with_parent() -> None:
    """The executor's own workers wait for tasks for ever if their parent is killed."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


PLAIN_SECONDS, MOVING_SECONDS = 15.0, 0.2  # between two lines, and two states of one that moves


class Progress:
    """Counts bytes that are done, by a line that moves on a terminal, or a plain one now and then."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._moves = stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")

    def close(self) -> None:
        """Clear the line that moves."""
        self.message("", "\r" if self._moves else "")

    def begin(self, what: str, total: int, done: int) -> None:
        """`what` is being done to `total` bytes; `done` of them were done by an earlier start."""
        self._what, self._total, self._done, self._at_start = what, total, done, done
        self._begun = self._printed = time.monotonic()
        if done:
            self.message(f"going on: {format_bytes(done)} of {format_bytes(total)} are done")

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._printed < (MOVING_SECONDS if self._moves else PLAIN_SECONDS):
            return
        self._printed = now
        speed = (self._done - self._at_start) / max(now - self._begun, 1e-3)
        done = f"{self._what}: {format_bytes(self._done)} of {format_bytes(self._total)}"
        left = f"{(self._total - self._done) / max(speed, 1.0) / 60:.0f} min left"
        line = f"{done}, {100 * self._done / max(self._total, 1):.0f} %, {format_bytes(speed)}/s, {left}"
        self.message(line, "\r" if self._moves else "\n")

    def message(self, text: str, end: str = "\n") -> None:
        clear = "\x1b[2K" if self._moves else ""  # the line that moves
        with suppress(OSError):  # the reader has closed the stream
            print(f"{clear}{text}", end=end, file=self._stream, flush=True)
