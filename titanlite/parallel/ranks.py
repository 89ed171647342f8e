"""The one way for ranks to talk outside of a step: bytes, actions that they take as one, tensors, and a shared store.

Nothing is pickled: messages are JSON or numbers. A single process needs no process group.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store

from titanlite.errors import MILDEST_FIRST, CheckpointError
from titanlite.text import pluralize

Outcome = tuple[int, Any]  # of an action: -1 and its value, or the place in `MILDEST_FIRST` of its error and the text


@dataclass(frozen=True)
class Ranks:
    """This process among all of a run, which call the same in the same order, but for `send`, `receive` and `store`.

    Tensors are changed in place and returned; those of hosts go through gloo, those of GPUs through NCCL.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None = field(default=None, kw_only=True)  # None: the default one, or none if alone

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes for all."""
        return self.rank == 0

    def apart(self, timeout_seconds: float) -> Ranks:
        """The same ranks with a group of hosts of their own, for a thread beside the trainer's: what it sends must not
        meet the messages of a step."""
        if self.size == 1:
            return ALONE
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        return Ranks(self.rank, self.size, group=group)

    def store(self, prefix: str) -> Store:
        """What the ranks share under `prefix`, empty at each start of the run, through a connection of its own: that of
        the process group may be taken by a thread that waits in it."""
        return PrefixStore(prefix, _get_default_store().clone()) if self.size > 1 else HashStore()  # type: ignore[attr-defined]

    # ---- tensors, and the bytes of one

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of each element over all ranks."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.SUM, self.group)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The largest value of each element over all ranks."""
        return self.begin_max(tensor)()

    def begin_max(self, tensor: Tensor) -> Callable[[], Tensor]:
        """What waits for the `max` of `tensor`, which begins now and runs beside what the caller does meanwhile."""
        work = dist.all_reduce(tensor, dist.ReduceOp.MAX, self.group, async_op=True) if self.size > 1 else None

        def wait() -> Tensor:
            if work is not None:
                work.wait()
            return tensor

        return wait

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The first rank's `tensor`, on every rank."""
        if self.size > 1:
            dist.broadcast(tensor, 0, self.group)
        return tensor

    def all_equal(self, value: int) -> bool:
        """Whether every rank called this with the same value; the same answer on all of them."""
        return len(set(self.run_on_all_ranks(lambda: value))) == 1

    def send(self, block: Tensor, rank: int) -> None:
        """Send bytes (a CPU tensor) to another rank, which receives as many."""
        dist.send(block, rank, self.group)

    def receive(self, block: Tensor, rank: int) -> None:
        """Fill `block` with what another rank sends."""
        dist.recv(block, rank, self.group)

    def gather(self, message: bytes, on_all: bool = False) -> list[bytes]:
        """All ranks' messages, of any length, by rank: `on_all`, or on the first alone; empty on the others."""
        if self.size == 1:
            return [message]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(message)]), self.group)
        padded = torch.frombuffer(bytearray(message.ljust(max(1, int(max(lengths))))), dtype=torch.uint8)
        received = [torch.empty_like(padded) for _ in lengths] if on_all or self.is_first else []
        if on_all:
            dist.all_gather(received, padded, self.group)
        else:
            dist.gather(padded, received or None, group_dst=0, group=self.group)
        return [data[: int(length)].numpy().tobytes() for data, length in zip(received, lengths, strict=False)]

    # ---- actions

    def run_on_rank0(self, action: Callable[[], Any]) -> Any:
        """What `action` returns on rank 0, which alone runs it, once all ranks have come; on every rank."""
        return self.run_on_all_ranks(lambda: None, lambda _: action())

    def run_on_all_ranks(
        self, action: Callable[[], Any], decide: Callable[[list[Any]], Any] = lambda results: results
    ) -> Any:
        """Every rank runs `action`; on every rank, the results (JSON) by rank, or what rank 0's `decide` makes of them.

        If an action raises on any rank, the call raises on every rank, and none is left waiting: the gravest error of
        any, of its kind in `MILDEST_FIRST`; but where a rank's own is of no such kind, there that itself.
        """
        if self.size == 1:
            return decide([action()])
        outcome, error = _attempt(action)
        gathered = self.gather(json.dumps(outcome).encode())
        if self.is_first:
            outcomes: list[Outcome] = [json.loads(text) for text in gathered]
            failed = [rank for rank, (gravity, _) in enumerate(outcomes) if gravity >= 0]
            if failed:
                worst = max(failed, key=lambda rank: outcomes[rank][0])  # the lowest rank of those that met it
                others = f" ({pluralize(len(failed) - 1, 'other rank')} failed too)" if len(failed) > 1 else ""
                outcome = outcomes[worst][0], f"rank {worst}: {outcomes[worst][1]}{others}"
            else:
                outcome, error = _attempt(lambda: decide([value for _, value in outcomes]))
        text = json.dumps(outcome).encode()
        length = int(self.broadcast(torch.tensor([len(text)])))
        data = self.broadcast(torch.frombuffer(bytearray(text.ljust(length)[:length]), dtype=torch.uint8))
        gravity, value = json.loads(data.numpy().tobytes())
        if gravity < 0:
            return value
        if error is not None and not isinstance(error, MILDEST_FIRST):
            raise error
        shared = MILDEST_FIRST[gravity](value)
        shared.on_all_ranks = True
        raise shared from error


ALONE = Ranks(0, 1)  # a process without others


def _attempt(action: Callable[[], Any]) -> tuple[Outcome, Exception | None]:
    """What the other ranks hear of an action, and what it raised."""
    try:
        return (-1, action()), None
    except Exception as error:  # whatever it is, the others must not wait for a message that never comes
        for gravity, kind in enumerate(MILDEST_FIRST):
            if isinstance(error, kind):
                return (gravity, str(error)), error
        return (MILDEST_FIRST.index(CheckpointError), f"{type(error).__name__}: {error}"), error
