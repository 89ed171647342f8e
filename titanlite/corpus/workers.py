"""Processes that do the work of `titanlite data prepare`, one task at a time each, and never outlive it.

Parent and worker talk in lines of JSON, and a worker whose parent's end of the line is gone, however that came about,
ends at once. The worker is a program of its own: nothing of the parent's threads or files is inherited.
"""

from __future__ import annotations

import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import titanlite
from titanlite.corpus.corpora.formats import Part, count_newlines
from titanlite.corpus.tokenizers import Tokenizer, open_tokenizer
from titanlite.corpus.units import Piece, Settings, Unit, write_part
from titanlite.errors import DataError, TitanliteError
from titanlite.files import cause

Task = dict[str, Any]
"""`{"count": [path, first byte, stop]}`, or `{"unit": Unit}`; with `about`, what a reader knows it by."""


def cores() -> int:
    """Those that this process may use, where the system says which."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_task(path: Path, part: Part) -> Task:
    """Count newlines; the answer is their number."""
    return {"count": [str(path), part.first, part.stop], "about": str(path)}


def unit_task(unit: Unit) -> Task:
    """Write the unit's part; the answer is None."""
    first, last = unit.pieces[0], unit.pieces[-1]
    return {"unit": unit, "about": first.path if first is last else f"{first.path} to {last.path}"}


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    task: int | None = None
    """Number of the task it is at."""


class Workers:
    """A pool. Close it, by `with`, to end its processes."""

    def __init__(self, count: int, settings: Settings, folder: Path) -> None:
        """Parts are written into `folder`."""
        self._opening = {"settings": asdict(settings), "folder": str(folder)}
        self._count = count
        self._workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
            for pipe in (worker.process.stdin, worker.process.stdout):
                assert pipe is not None
                try:
                    pipe.close()
                except OSError:  # what was not yet sent has nobody to go to
                    continue

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Any]]:
        """Number and answer of each task, in the order in which they are done.

        At a failure no further task is begun, and those that are under way are waited for: which error is raised, the
        `DataError` of the earliest task that has one, does not depend on the number of workers.
        """
        while len(self._workers) < min(self._count, len(tasks)):
            self._workers.append(_Worker(self._started()))
        waiting = iter(range(len(tasks)))
        failures: dict[int, str] = {}
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                assert worker.process.stdout is not None
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
                self._give(worker, tasks, waiting)
            while any(worker.task is not None for worker in self._workers):
                for event, _ in selector.select():
                    worker, number = event.data, event.data.task
                    answer = _answer(worker, tasks)
                    worker.task = None
                    if "error" in answer:
                        failures[number] = answer["error"]
                    else:
                        yield number, answer["result"]
                    if not failures:
                        self._give(worker, tasks, waiting)
        if failures:
            raise DataError(failures[min(failures)])

    def _give(self, worker: _Worker, tasks: Sequence[Task], waiting: Iterator[int]) -> None:
        worker.task = next(waiting, None)
        if worker.task is not None:
            assert worker.process.stdin is not None
            try:
                worker.process.stdin.write(json.dumps(tasks[worker.task]).encode() + b"\n")
                worker.process.stdin.flush()
            except BrokenPipeError:  # it has ended; why, is seen when its answer is read
                return

    def _started(self) -> subprocess.Popen[bytes]:
        root = str(Path(titanlite.__file__).parents[1])  # which need not be installed, nor be the current folder
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
            # Each process is to keep one core busy, not to start threads for all of them.
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(self._opening).encode() + b"\n")
        return process


def _answer(worker: _Worker, tasks: Sequence[Task]) -> dict[str, Any]:
    """What the worker says of its task. Raises `DataError` if it has ended instead."""
    assert worker.process.stdout is not None
    if line := worker.process.stdout.readline():
        answer: dict[str, Any] = json.loads(line)
        return answer
    code = worker.process.wait()
    about = "before it was given anything" if worker.task is None else f"at {tasks[worker.task]['about']}"
    if code == -signal.SIGKILL:
        raise DataError(
            f"a worker process was killed {about}; the machine may have run out of memory: take fewer --workers, or "
            "split very long documents. What is done stays done: the same command goes on."
        )
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    raise DataError(f"a worker process ended {about} {how}; what it said is above.")


def main() -> int:
    """The worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, whose end is ours
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, lines), daemon=True).start()
    opening = json.loads(lines.get())
    settings = Settings(**{**opening["settings"], "special_tokens": tuple(opening["settings"]["special_tokens"])})
    folder = Path(opening["folder"])
    tokenizer: Tokenizer | None = None
    while True:
        task = json.loads(lines.get())
        try:
            result: int | None = None
            if "count" in task:
                path, first, stop = task["count"]
                result = count_newlines(Path(path), first, stop)
            else:
                tokenizer = tokenizer or _opened(settings)
                write_part(_unit(task["unit"]), settings, tokenizer, folder)
            answer: dict[str, Any] = {"result": result}
        except TitanliteError as error:
            answer = {"error": str(error)}
        except MemoryError:
            answer = {"error": f"{task['about']}: does not fit into memory; take fewer --workers, or split it."}
        except OSError as error:
            answer = {
                "error": f"cannot write to {folder}: {cause(error, folder)}. What is done stays done: make room, and "
                "the same command goes on."
            }
        print(json.dumps(answer), file=answers, flush=True)


def _listen(lines: IO[bytes], into: queue.SimpleQueue[bytes]) -> None:
    for line in lines:
        into.put(line)
    os._exit(1)  # the parent is gone


def _opened(settings: Settings) -> Tokenizer:
    tokenizer = open_tokenizer(settings.tokenizer, settings.separator, settings.special_tokens)
    if tokenizer.fingerprint != settings.fingerprint:
        raise DataError(f"the tokenizer '{settings.tokenizer}' changed while it was used; start again.")
    return tokenizer


def _unit(fields: list[Any]) -> Unit:
    pieces, source, size = fields
    return Unit(tuple(Piece._make([*rest, part and Part._make(part)]) for *rest, part in pieces), source, size)


if __name__ == "__main__":
    sys.exit(main())
