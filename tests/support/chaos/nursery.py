"""Real processes that start in milliseconds: they are forked from one that has imported everything.

Each has its own id, environment, folder and files for what it prints; it is killed, and its end is seen, as that of
any other process. What it runs is what its command would run.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from multiprocessing import resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from support.pool import fork_server

PATIENCE_SECONDS = 240.0  # after so long a process counts as hung


class Child:
    """A process that the nursery has started."""

    def __init__(self, process: ForkServerProcess, said: Path) -> None:
        assert process.pid is not None
        self.pid = process.pid
        self._process = process
        self._said = said

    @property
    def said(self) -> str:
        """Everything it has printed so far; nothing, if it was killed before it could open the file."""
        return self._said.read_text(errors="replace") if self._said.exists() else ""

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Its exit code, once it has ended. Raises `AssertionError` with what it said if it does not end."""
        self._process.join(seconds)
        status = self.poll()
        assert status is not None, f"process {self.pid} goes on after {seconds} s:\n{self.said}"
        return status

    def send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """At once, and wait for it to be gone."""
        self.send(signal.SIGKILL)
        self.wait()


class Nursery:
    """Starts `faulty_train.py`'s commands. Clear it to end whatever still runs."""

    def __init__(self) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._context = fork_server()
        self._children: list[Child] = []

    def start(self, command: list[str], folder: Path, said: Path, environment: dict[str, str]) -> Child:
        """Start `command` (see `faulty_train.main`) in `folder`; what it prints goes to the file `said`."""
        process = self._context.Process(target=_become, args=(command, folder, said, environment))
        process.start()
        self._children.append(Child(process, said))
        return self._children[-1]

    def clear(self) -> None:
        """Kill all that still run."""
        for child in self._children:
            child.kill()
        self._children.clear()


def _become(command: list[str], folder: Path, said: Path, environment: dict[str, str]) -> None:
    """The process that was asked for."""
    code = 1
    try:
        from support.chaos import faulty_train

        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.closerange(3, 64)  # the said file itself, and whatever the server had open, multiprocessing's too
        resource_tracker._resource_tracker._fd = None
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this one
        code = faulty_train.main(command)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
