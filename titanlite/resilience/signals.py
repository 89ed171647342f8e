"""Asking a run to stop or to save: signals, and agreement between ranks on the step after which all of them do.

Signals are received by a thread of their own: Python's handlers wait until the main thread comes back from what it is
in, and out of a collective that another rank has left it never does.
"""

from __future__ import annotations

import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch

from titanlite.errors import StoppedEarly, TitanliteError
from titanlite.parallel.ranks import ALONE, Ranks
from titanlite.plan.launch import STOP_SIGNALS

_ECHO_SECONDS = 1.0  # signals closer together are one: a scheduler signals every process, and torchrun does again
_CLOSE = b"\0"  # what ends the listener; no signal has this number


@dataclass
class StopRequests:
    """The first signal asks for a save and a stop at the step's end; a second one ends the process at once.

    So does the end of `grace_seconds` (0: no limit) after the first, if the run is then still within this context.
    """

    ranks: Ranks = ALONE  # the first prints that it has received a signal
    grace_seconds: float = 0.0
    lost: Callable[[], str] = lambda: "what was not saved is lost"  # describes what an end now costs; empty: nothing

    def __post_init__(self) -> None:
        self.received: signal.Signals | None = None  # the first signal
        self._signalled = False  # whether all ranks stop because of a signal to one of several, and not for a limit
        self._pending: Callable[[], torch.Tensor] = lambda: torch.zeros(3)  # waits for the last exchange

    def __enter__(self) -> StopRequests:
        self._wakeup_read_fd, self._wakeup_write_fd = os.pipe()
        os.set_blocking(self._wakeup_write_fd, False)
        # What the user's shell ignores (nohup: SIGHUP) stays ignored.
        handled = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        # In the main thread too, so that a signal between two steps counts for the next one.
        self._previous = {number: signal.signal(number, self._note) for number in handled}
        # The system's own handler writes the number of each signal here, whatever the main thread is at.
        self._previous_wakeup_fd = signal.set_wakeup_fd(self._wakeup_write_fd, warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> None:
        signal.set_wakeup_fd(self._previous_wakeup_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.write(self._wakeup_write_fd, _CLOSE)
        self._listener.join()
        os.close(self._wakeup_read_fd)
        os.close(self._wakeup_write_fd)
        if isinstance(error, StoppedEarly):
            error.received = self.received is not None
            error.signalled = self._signalled if self.ranks.size > 1 else error.received
        # The last exchange must end before the process group does. After an error that only this rank may have met,
        # the others may never join it: then the process ends as it is, and its launcher ends theirs.
        if error is None or (isinstance(error, TitanliteError) and error.on_all_ranks):
            self._pending()

    def _note(self, number: int, frame: object = None) -> None:
        self.received = self.received or signal.Signals(number)

    def _listen(self) -> None:
        """In the listener's thread: notes the first signal, and ends the process on a second one or for the time."""
        asked_at, deadline, received = math.inf, math.inf, b""
        while _CLOSE not in received:
            seconds = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
            if not select.select([self._wakeup_read_fd], [], [], seconds)[0]:
                lost = self.lost()
                _print(f"resilience.grace_seconds = {self.grace_seconds:g} are over: {lost or 'all is saved'}")
                os._exit(128 + (self.received or 0) if lost else StoppedEarly.exit_code)
            received, now = os.read(self._wakeup_read_fd, 64), time.monotonic()
            for number in self._previous.keys() & set(received):
                if now - asked_at > _ECHO_SECONDS:
                    os._exit(128 + number)
                if asked_at == math.inf:
                    asked_at, deadline = now, now + (self.grace_seconds or math.inf)
                    self._note(number)
                    if self.ranks.is_first:
                        _print("stopping after this step; a second signal ends the run at once, unsaved")

    def agree(self, limit: str | None, save: bool = False) -> tuple[str | None, bool]:
        """Why the run stops after this step (None: it goes on), and whether it saves: the same on each of several
        ranks, but for the text of the reason.

        `limit` is a reason to stop that this rank's own clock may give before another's, `save` whether this rank asks
        for a checkpoint. The answer is that of the step before: the exchange runs on the hosts, beside the step, and is
        not waited for.
        """
        received = self.received.name if self.received is not None else None
        limited, signalled, saved = map(bool, self._pending())
        self._signalled = signalled and not limited
        flags = torch.tensor([limit is not None, received is not None, save], dtype=torch.int64)
        self._pending = self.ranks.begin_max(flags)
        return (limit or received or "another rank was asked to stop") if limited or signalled else None, saved


def _print(text: str) -> None:
    """Not by `print`: another thread may be in the middle of one. A lost terminal (SIGHUP) takes no more text."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())
