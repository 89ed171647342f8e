"""Asking a run to stop or to save: signals, and agreement between ranks on the step after which all of them do."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist

from titanlite.errors import TitanliteError

_GRACEFUL = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_ECHO_SECONDS = 1.0
"""Signals closer together are one request: a scheduler signals every process, and torchrun passes its own on to us."""


@dataclass(frozen=True)
class Agreement:
    """What all ranks do after a step: the same on each, but for the words."""

    stop: str | None
    """Why the run stops here; None: it goes on."""
    save: bool
    """Whether a checkpoint of this step was asked for."""


class StopRequests:
    """The first signal asks for a save and a stop at the step's end; a second one ends the process at once."""

    def __init__(self, ranks: int, speaks: bool) -> None:
        """`speaks`: whether this rank tells the user at once that it has heard."""
        self._signal: int | None = None
        self._asked_at = 0.0
        self._ranks = ranks
        self._speaks = speaks
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def __enter__(self) -> StopRequests:
        # What the user's shell ignores (nohup: SIGHUP) stays ignored.
        heeded = [number for number in _GRACEFUL if signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        # The last exchange must end before the process group does. After an error that only this rank may have met,
        # the others may never join it: then the process ends as it is, and its launcher ends theirs.
        if self._pending is not None and (kind is None or issubclass(kind, TitanliteError)):
            self._pending[0].wait()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._asked_at = number, now
            if self._speaks:
                # Not print: a handler may run in the middle of one. A lost terminal (SIGHUP) takes no more words.
                with suppress(OSError):
                    os.write(2, b"stopping after this step; a second signal ends the run at once, unsaved\n")
        elif now - self._asked_at > _ECHO_SECONDS:
            os._exit(128 + number)

    def agreed(self, limit: str | None, save: bool = False) -> Agreement:
        """What is done after this step; the same on every rank.

        `limit` is a reason to stop that this rank's own clock may give before another's, `save` whether this rank asks
        for a checkpoint. With several ranks the answer is that of the step before: the exchange runs on the hosts,
        beside the step, and is not waited for.
        """
        mine = limit or (signal.Signals(self._signal).name if self._signal is not None else None)
        if self._ranks == 1:
            return Agreement(mine, save)
        stop_asked = save_asked = False
        if self._pending is not None:
            work, flags = self._pending
            work.wait()
            stop_asked, save_asked = map(bool, flags)
        flags = torch.tensor([1 if mine else 0, 1 if save else 0])
        work = dist.all_reduce(flags, op=dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._pending = (work, flags)
        return Agreement((mine or "another rank was asked to stop") if stop_asked else None, save_asked)
