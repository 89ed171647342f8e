"""One save at a time, in a thread beside training or at once, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from threading import Thread

import torch
from torch import Tensor

from titanlite.checkpoint.save import LocalSavePlan, plan_local_save
from titanlite.errors import CheckpointError
from titanlite.models.shard import Shard

Warn = Callable[[str], None]


@dataclass(frozen=True)
class SaveResult:
    """How a save ended; the same on all ranks."""

    step: int
    error: CheckpointError | None
    """Why there is nothing of this step; None: it is committed."""
    blocked_seconds: float
    """How long training stood still for it."""
    seconds: float
    """From its beginning to its end."""


class BackgroundSaver:
    """Saves of one kind, one after the other. In the background, each is of a copy in the host's memory, which is kept
    from save to save: from the second on its pages are there.
    """

    def __init__(self, warn: Warn, background: bool) -> None:
        """`warn` gets what a save warned of, in the thread that asks how it ended."""
        self._warn = warn
        self._background = background
        self._copies: dict[str, Tensor] = {}
        self._thread: Thread | None = None
        """That of the save whose result was not asked for yet."""
        self._begun = 0, 0.0, 0.0
        """Step of that save, when it began, and how long training stood still for that."""
        self._ended: tuple[Exception | None, list[str], float] | None = None
        """What it raised, what it warned of, and when it ended."""

    def begin(self, step: int, tensors: Mapping[str, Shard], write: Callable[[LocalSavePlan, Warn], None]) -> None:
        """Have `write` save what falls to this rank of a state, which may change once this returns.

        The save before must have ended, and its result been asked for, since its memory is needed.
        """
        assert self._thread is None, "a save that was begun must have ended"
        began, plan = time.monotonic(), plan_local_save(tensors)
        if self._background:
            plan = self._copy(plan)

        def run() -> None:
            error: Exception | None = None
            warnings: list[str] = []
            try:
                write(plan, warnings.append)
            except Exception as met:  # for the thread that asks for the result
                error = met
            self._ended = error, warnings, time.monotonic()

        # A daemon: after an error that only this rank met, the save would wait for ranks that are gone. The watchdog
        # finds the thread by its name.
        self._thread = Thread(target=run, name="checkpoint", daemon=True)
        if self._background:
            self._thread.start()
        else:
            self._thread.run()
        self._begun = step, began, time.monotonic() - began

    def wait(self) -> SaveResult | None:
        """`result`, once the save has ended."""
        self.join()
        return self.result()

    def result(self) -> SaveResult | None:
        """How the save ended; None if there is none, if it goes on, or if this was asked before.

        Raises what was not the disk's fault.
        """
        if self._thread is None or self._thread.is_alive():
            return None
        assert self._ended is not None
        (error, warnings, ended), (step, began, blocked_seconds) = self._ended, self._begun
        self._thread = self._ended = None
        if error is not None and not isinstance(error, CheckpointError):
            raise error
        for text in warnings:
            self._warn(text)
        return SaveResult(step, error, blocked_seconds, ended - began)

    def join(self, seconds: float | None = None) -> None:
        """Return once the save has ended, or after so many seconds."""
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(seconds)

    def _copy(self, plan: LocalSavePlan) -> LocalSavePlan:
        """The same plan, with copies of the values as they are now."""
        values = {key: item.values for key, item in plan.items.items() if isinstance(item.values, Tensor)}
        if self._copies.keys() != values.keys():
            # Pinned: only to such memory does a GPU copy without the host's help.
            self._copies = {
                key: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
                for key, tensor in values.items()
            }
        for key, tensor in values.items():
            self._copies[key].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in values.values()):
            torch.cuda.current_stream().synchronize()
        items = {key: replace(item, values=self._copies[key]) for key, item in plan.items.items()}
        return replace(plan, items=items)
