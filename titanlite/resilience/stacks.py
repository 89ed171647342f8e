"""What a rank leaves behind when it hangs or dies: the Python stacks of its threads, and torch's flight recorder.

One file a rank, which every start of the run adds to. Writing to it takes no lock, and no other file is read.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

import torch

from titanlite.files import APPEND, open_file

STACKS_SIGNAL = signal.SIGUSR2
"""Signal upon which a rank writes its stacks to its log and goes on."""

_RECORDERS = {"nccl": "_dump_nccl_trace_json", "fr": "_dump_fr_trace_json"}
"""In `torch._C._distributed_c10d`, as far as this build of torch has them: NCCL's collectives, and all others. Their
other form is a pickle, which would run code in whoever opens it."""


def log_path(logs: Path, rank: int) -> Path:
    """The file that has a rank's stacks."""
    return logs / f"rank-{rank:05d}.log"


class StackDump:
    """`RUN/logs/rank-00003.log`, open for as long as the run is watched; where it cannot be opened, standard error."""

    def __init__(self, logs: Path, rank: int, name: str) -> None:
        """`name` of the process stands before each paragraph."""
        self._logs, self._rank, self._name = logs, rank, name
        try:
            self._file = open_file(log_path(logs, rank), APPEND)
        except OSError:
            self._file = os.dup(2)  # a folder that cannot be used stops the run elsewhere, with a clearer error
        self.write(f"watched from now on; {STACKS_SIGNAL.name} has it write its stacks here")
        # A handler that is there already is the user's, or that of the program around the run.
        self._handles_faults = not faulthandler.is_enabled()
        if self._handles_faults:
            faulthandler.enable(self._file)
        faulthandler.register(STACKS_SIGNAL, self._file)

    def close(self) -> None:
        """Put the signals back, and close the file."""
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(STACKS_SIGNAL)
        if self._handles_faults:
            faulthandler.disable()
        os.close(self._file)

    def write(self, text: str) -> None:
        """Add a paragraph with the time. A full disk loses it."""
        with suppress(OSError):
            os.write(self._file, f"{_now()} {self._name}: {text}\n".encode())

    def write_stacks_later(self, seconds: float) -> None:
        """Write the stacks after `seconds`, even in a call that keeps the interpreter, unless this is called again."""
        faulthandler.dump_traceback_later(seconds, file=self._file)

    def write_stacks(self, why: str) -> None:
        """Write the stacks of all threads now, and what the flight recorder holds in a file beside them."""
        self.write(why)
        with suppress(OSError):
            faulthandler.dump_traceback(self._file)
        for kind, function in _RECORDERS.items():
            dump = getattr(getattr(torch._C, "_distributed_c10d", None), function, None)
            text = dump() if dump is not None else b"{}"
            with suppress(OSError, ValueError):
                if json.loads(text).get("entries"):
                    stamp = _now().replace(":", "")
                    (self._logs / f"flight-{kind}-{self._rank:05d}-{stamp}.json").write_bytes(text)


def add_report(logs: Path, text: str) -> None:
    """Say on standard error and in `RUN/logs/watchdog.log` why the run stands still."""
    data = f"{_now()} {text}\n".encode()
    with suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, data)
    with suppress(OSError), open(open_file(logs / "watchdog.log", APPEND), "ab", buffering=0) as file:
        file.write(data)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
