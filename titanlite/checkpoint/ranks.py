"""How the processes of a run act as one on their files: what one says all hear, and what fails on one fails on all.

Messages are bytes over a process group of hosts; nothing is pickled. Alone, a process needs no group.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from titanlite.checkpoint.format import DamagedCheckpointError, NewerFormatError
from titanlite.errors import CheckpointError, GuardStop, RunFolderLost, TitanliteError, UsageError
from titanlite.parallel.messages import as_tensor, gathered
from titanlite.text import pluralize

_KINDS: dict[str, type[TitanliteError]] = {
    kind.__name__: kind
    for kind in (GuardStop, UsageError, CheckpointError, RunFolderLost, NewerFormatError, DamagedCheckpointError)
}
"""What a rank may be told of, the gravest first: an older checkpoint mends damage and nothing else."""
_DONE, _FAILED = b"+", b"-"


@dataclass(frozen=True)
class Ranks:
    """This process among those that share files. `first` and `each` are collective when there are several.

    If the action raises anywhere, both raise on every rank, and none is left waiting: the same `UsageError` (or
    `DamagedCheckpointError` …) everywhere, but where an action raised something else, there that itself.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """Theirs, and of nobody else: messages of a save in the background must not meet those of a step. None: the
    default group, for processes that do nothing beside."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def first(self, action: Callable[[], bytes | None]) -> bytes:
        """What `action` returns on the first rank, which alone does it; on every rank."""
        if self.size == 1:
            return action() or b""
        message, error = _attempt(action) if self.is_first else (b"", None)
        return _result(self._broadcast(message), error)

    def each(self, action: Callable[[], bytes | None]) -> list[bytes]:
        """Every rank does `action`; what they return, by rank, on the first rank, and nothing on the others."""
        if self.size == 1:
            return [action() or b""]
        message, error = _attempt(action)
        messages = gathered(message, self.size, self.group, on_first_alone=True)
        _result(self._broadcast(_verdict(messages)), error)
        return [message[1:] for message in messages]

    def send(self, block: torch.Tensor, rank: int) -> None:
        """Send bytes (a CPU tensor) to another rank, which receives as many."""
        dist.send(block, rank, self.group)

    def receive(self, block: torch.Tensor, rank: int) -> None:
        """Fill `block` with what another rank sends."""
        dist.recv(block, rank, self.group)

    def _broadcast(self, message: bytes) -> bytes:
        """The first rank's message; what the others give is ignored."""
        length = torch.tensor([len(message)])
        dist.broadcast(length, 0, self.group)
        data = as_tensor(message) if self.is_first else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, 0, self.group)
        return data.numpy().tobytes()


ALONE = Ranks()
"""A process without others."""


def joined_ranks(rank: int, size: int, timeout_seconds: float) -> Ranks:
    """The processes of the default group, which all call this, with a group of their own for saving and loading."""
    if size == 1:
        return ALONE
    return Ranks(rank, size, dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds)))


def _attempt(action: Callable[[], bytes | None]) -> tuple[bytes, Exception | None]:
    """What to tell the others of an action, and what it raised."""
    try:
        return _DONE + (action() or b""), None
    except Exception as error:  # whatever it is, the others must not wait for a message that never comes
        kind = next((name for name, kind in reversed(_KINDS.items()) if isinstance(error, kind)), None)
        text = str(error) if kind else f"{type(error).__name__}: {error}"
        return _FAILED + json.dumps([kind or CheckpointError.__name__, text]).encode(), error


def _verdict(messages: list[bytes]) -> bytes:
    """One message for all: done, or the gravest failure, of the lowest rank that met it."""
    failures = [(rank, *json.loads(text[1:])) for rank, text in enumerate(messages) if text[:1] == _FAILED]
    if not failures:
        return _DONE
    rank, kind, text = min(failures, key=lambda failure: (list(_KINDS).index(failure[1]), failure[0]))
    others = f" ({pluralize(len(failures) - 1, 'other rank')} failed too)" if len(failures) > 1 else ""
    return _FAILED + json.dumps([kind, f"rank {rank}: {text}{others}"]).encode()


def _result(message: bytes, own: Exception | None) -> bytes:
    """What a message of success holds. Raises the error that another tells of, or `own` if that is no user's error."""
    if message[:1] == _DONE:
        return message[1:]
    if own is not None and not isinstance(own, tuple(_KINDS.values())):
        raise own
    kind, text = json.loads(message[1:])
    error = _KINDS[kind](text)
    error.on_all_ranks = True
    raise error from own
