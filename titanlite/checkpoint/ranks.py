"""How the processes of a run act as one on their files: an error on one rank is raised on all.

Messages are JSON over a process group of hosts; nothing is pickled. A single process needs no group.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from titanlite.checkpoint.format import DamagedCheckpointError, NewerFormatError
from titanlite.errors import CheckpointError, GuardStop, RunFolderLost, TitanliteError, UsageError
from titanlite.parallel.world import as_tensor, gather_bytes
from titanlite.text import pluralize

_KINDS: dict[str, type[TitanliteError]] = {
    kind.__name__: kind
    for kind in (GuardStop, UsageError, CheckpointError, RunFolderLost, NewerFormatError, DamagedCheckpointError)
}
"""Errors that other ranks raise too, the gravest first: an older checkpoint mends damage and nothing else."""
Message = dict[str, Any]  # `{"value": …}` of an action that succeeded, `{"kind": …, "text": …}` of one that failed


@dataclass(frozen=True)
class Ranks:
    """This process among those that share files. Both ways to run an action are collective; results are JSON values.

    If an action raises on any rank, the call raises on every rank, and none is left waiting: the same `UsageError` (or
    `DamagedCheckpointError` …) everywhere, but where an action raised something else, there that itself.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """Theirs alone: messages of a save in the background must not meet those of a step. None: the default group, for
    processes that do nothing beside."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def run_on_rank0(self, action: Callable[[], Any]) -> Any:
        """What `action` returns on rank 0, which alone runs it, once all ranks have come; on every rank."""
        return self.run_on_all_ranks(lambda: None, lambda _: action())

    def run_on_all_ranks(
        self, action: Callable[[], Any], decide: Callable[[list[Any]], Any] = lambda results: results
    ) -> Any:
        """Every rank runs `action`; on every rank, the results by rank, or what rank 0's `decide` makes of them."""
        if self.size == 1:
            return decide([action()])
        message, error = _attempt(action)
        gathered = gather_bytes(json.dumps(message).encode(), self.size, self.group)
        if self.is_first:
            messages = list(map(json.loads, gathered))
            message = _gravest(messages)
            if not message:
                message, error = _attempt(lambda: decide([each["value"] for each in messages]))
        message = self._broadcast(message)
        if "kind" not in message:
            return message["value"]
        if error is not None and not isinstance(error, tuple(_KINDS.values())):
            raise error
        shared = _KINDS[message["kind"]](message["text"])
        shared.on_all_ranks = True
        raise shared from error

    def send(self, block: torch.Tensor, rank: int) -> None:
        """Send bytes (a CPU tensor) to another rank, which receives as many."""
        dist.send(block, rank, self.group)

    def receive(self, block: torch.Tensor, rank: int) -> None:
        """Fill `block` with what another rank sends."""
        dist.recv(block, rank, self.group)

    def _broadcast(self, message: Message) -> Message:
        """Rank 0's message; what the others give is ignored."""
        text = json.dumps(message).encode()
        length = torch.tensor([len(text)])
        dist.broadcast(length, 0, self.group)
        data = as_tensor(text) if self.is_first else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, 0, self.group)
        received: Message = json.loads(data.numpy().tobytes())
        return received


ALONE = Ranks()  # a process without others


def new_ranks(rank: int, size: int, timeout_seconds: float) -> Ranks:
    """The processes of the default group, which all call this, with a group of their own for saving and loading."""
    if size == 1:
        return ALONE
    return Ranks(rank, size, dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds)))


def _attempt(action: Callable[[], Any]) -> tuple[Message, Exception | None]:
    """The message about an action to the other ranks, and what it raised."""
    try:
        return {"value": action()}, None
    except Exception as error:  # whatever it is, the others must not wait for a message that never comes
        kind = next((name for name, kind in reversed(_KINDS.items()) if isinstance(error, kind)), None)
        text = str(error) if kind else f"{type(error).__name__}: {error}"
        return {"kind": kind or CheckpointError.__name__, "text": text}, error


def _gravest(messages: list[Message]) -> Message:
    """The gravest failure, of the lowest rank that met it; empty without any."""
    kinds, failures = list(_KINDS), [(rank, message) for rank, message in enumerate(messages) if "kind" in message]
    if not failures:
        return {}
    rank, worst = min(failures, key=lambda failure: kinds.index(failure[1]["kind"]))
    others = f" ({pluralize(len(failures) - 1, 'other rank')} failed too)" if len(failures) > 1 else ""
    return {"kind": worst["kind"], "text": f"rank {rank}: {worst['text']}{others}"}
