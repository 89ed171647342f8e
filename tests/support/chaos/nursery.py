"""Real processes that start in milliseconds: they are forked from one that has imported everything.

Each has its own id, environment, folder and files for what it prints; it is killed, and its end is seen, as that of
any other process. What it runs is what its command would run.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

PATIENCE_SECONDS = 240.0
"""After so long a process counts as hung."""


class Child:
    """A process that the nursery has started."""

    def __init__(self, nursery: Nursery, pid: int, said: Path) -> None:
        self.pid = pid
        self._nursery = nursery
        self._said = said
        self._status: int | None = None

    @property
    def said(self) -> str:
        """Everything it has printed so far."""
        return self._said.read_text(errors="replace")

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        if self._status is None:
            self._status = self._nursery.ask(poll=self.pid)
        return self._status

    def wait(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Its exit code, once it has ended. Raises `AssertionError` with what it said if it does not end."""
        deadline = time.monotonic() + seconds
        while (status := self.poll()) is None:
            assert time.monotonic() < deadline, f"process {self.pid} goes on after {seconds} s:\n{self.said}"
            time.sleep(0.005)
        return status

    def send(self, number: int) -> None:
        if self.poll() is None:  # until it is asked for, its id is nobody else's
            os.kill(self.pid, number)

    def kill(self) -> None:
        """At once, and wait for it to be gone."""
        self.send(signal.SIGKILL)
        self.wait()


class Nursery:
    """Starts `faulty_train.py`'s commands. Close it to end whatever still runs."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def start(self, command: list[str], folder: Path, said: Path, environment: dict[str, str]) -> Child:
        """Start `command` (see `faulty_train.main`) in `folder`; what it prints goes to the file `said`."""
        return Child(self, self.ask(start=command, folder=str(folder), said=str(said), environment=environment), said)

    def ask(self, **words: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def clear(self) -> None:
        """Kill all that still run."""
        self.ask(clear=True)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def _serve() -> None:
    from support.chaos import faulty_train

    faulty_train.import_all()
    gc.collect()
    gc.freeze()  # what is shared with the children stays shared
    running: set[int] = set()
    for line in sys.stdin:
        words = json.loads(line)
        if "poll" in words:
            pid, status = os.waitpid(words["poll"], os.WNOHANG)
            running.discard(pid)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif "clear" in words:
            answer = _kill(running)
        else:
            answer = os.fork()
            if answer == 0:
                _become(words)
            running.add(answer)
        print(json.dumps(answer), flush=True)
    _kill(running)


def _kill(running: set[int]) -> None:
    while running:
        pid = running.pop()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _become(words: dict[str, Any]) -> NoReturn:
    """The process that was asked for."""
    code = 1
    try:
        from support.chaos import faulty_train

        said = os.open(words["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.closerange(3, 64)  # the said file itself, and whatever the server had open
        os.chdir(words["folder"])
        os.environ.clear()
        os.environ.update(words["environment"])
        gc.unfreeze()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this one
        code = faulty_train.main(words["start"])
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
