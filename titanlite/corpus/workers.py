"""Processes that do the work of `titanlite data prepare`, each with one core, and none of which outlives it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from itertools import islice
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

from titanlite.corpus.tokenizers import Tokenizer, open_tokenizer
from titanlite.corpus.units import Settings, Unit, write_part
from titanlite.errors import DataError
from titanlite.files import cause
from titanlite.registry import PLUGINS, import_plugin

_ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Numpy alone starts a thread for each core when it is imported."""


def cores() -> int:
    """Those that this process may use, where the system says which."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerPool:
    """At most `count` processes, spawned as they are needed. Used by `with`, which ends them."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._executor = ProcessPoolExecutor(count, get_context("spawn"), _begin, (tuple(PLUGINS),))

    def __enter__(self) -> WorkerPool:
        self._others = active_children()
        self._environment = dict(os.environ)
        os.environ.update(_ONE_THREAD)
        return self

    def __exit__(self, *_: object) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        for process in active_children():  # a unit may take a minute, too long to wait for after Ctrl-C
            if process not in self._others:
                process.kill()
        self._executor.shutdown(cancel_futures=True)

    def run(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Call `function` with the arguments of each task; yields number and result in the order they are done.

        After a failure no further task begins, and those under way are waited for: which error is raised, the
        `DataError` of the earliest task that has one, does not depend on the number of workers.
        """
        waiting = iter(enumerate(tasks))
        running: dict[Future[Any], int] = {}
        failures: dict[int, DataError] = {}
        free = self._count
        try:
            while True:
                if not failures:
                    for number, task in islice(waiting, free):
                        running[self._executor.submit(function, *task)] = number
                if not running:
                    break
                done = wait(running, return_when=FIRST_COMPLETED).done
                free = len(done)
                for future in done:
                    number = running[future]
                    try:
                        result = future.result()
                    except DataError as error:
                        failures[number] = error
                    else:
                        yield number, result
                    del running[future]
        except BrokenProcessPool as error:
            begun = ", ".join(str(tasks[number][0]) for number in sorted(running.values()))
            raise DataError(
                f"a worker process was killed at {begun}; the machine may have run out of memory: split very long "
                "documents, or prepare them with fewer --workers. What is done stays done: the same command goes on."
            ) from error
        if failures:
            raise failures[min(failures)]


def write_unit(unit: Unit, settings: Settings, folder: Path) -> None:
    """A task: write the unit's part into `folder`. Raises `DataError`."""
    try:
        write_part(unit, settings, _open_tokenizer(settings), folder)
    except MemoryError:
        raise DataError(f"{unit}: does not fit into memory; take fewer --workers, or split it.") from None
    except OSError as error:
        raise DataError(
            f"cannot write to {folder}: {cause(error, folder)}. What is done stays done: make room, and the same "
            "command goes on."
        ) from error


@lru_cache(maxsize=1)
def _open_tokenizer(settings: Settings) -> Tokenizer:
    tokenizer = open_tokenizer(settings.tokenizer, settings.separator, settings.special_tokens)
    if tokenizer.fingerprint != settings.fingerprint:
        raise DataError(f"the tokenizer '{settings.tokenizer}' changed while it was used; start again.")
    return tokenizer


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
