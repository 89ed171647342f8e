"""Run on ranks: every way in which titanlite waits for another rank, looked at while it does."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from titanlite.parallel.collectives import gather_sequence
from titanlite.parallel.context import _pass_on, _wait
from titanlite.resilience.rank_table import Location, look_at

_ENOUGH = 5  # looks in a row with the same answer


def _all_reduce() -> None:
    dist.all_reduce(torch.ones(4))


def _work() -> None:
    work = dist.all_reduce(torch.ones(4), async_op=True)
    work.wait()


def _gathering_in_backward() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return gather_sequence(grad, dist.group.WORLD)[:, :2]

    Doubled.apply(torch.ones(1, 2, 3, requires_grad=True)).sum().backward()


def _ring() -> None:
    _wait(_pass_on(torch.ones(4), dist.group.WORLD))


def _sharded() -> None:
    model = nn.Linear(8, 8)
    fully_shard(model)
    model(torch.ones(2, 8)).sum().backward()


def _receiving() -> None:
    if dist.get_rank() == 0:
        dist.recv(torch.ones(4), 1)
    else:
        dist.send(torch.ones(4), 0)


def _in_a_saving_thread() -> None:
    saving = threading.Thread(target=_all_reduce, name="checkpoint")
    saving.start()
    saving.join()


WAYS: dict[str, Callable[[], None]] = {
    "all_reduce": _all_reduce,
    "work": _work,
    "gathering_in_backward": _gathering_in_backward,
    "ring": _ring,
    "sharded": _sharded,
    "receiving": _receiving,
    "in a saving thread": _in_a_saving_thread,
}


def seen(rank: int, world: int, way: str, file: str) -> Location:
    """What each of two ranks is seen to do when the second one comes late: only once the first was seen to wait."""
    answer: list[Location] = []

    def look() -> None:
        last: list[Location] = []
        until = time.monotonic() + 200
        while time.monotonic() < until and len(last) < _ENOUGH:
            time.sleep(0.02)
            now = look_at(trainer)
            wanted = now.waits == (rank == 0) and not now.place.endswith(":seen")
            last = [*last, now] if wanted and last[:1] in ([], [now]) else []
        answer.append(now)
        if rank == 0:
            os.close(os.open(file, os.O_CREAT))

    trainer = threading.get_ident()
    looking = threading.Thread(target=look)
    looking.start()
    if rank == 1:
        held_up(file, looking)
    WAYS[way]()
    looking.join()
    return answer[0]


def held_up(file: str, looking: threading.Thread) -> None:
    """Return once the first rank was seen to wait, and this one to be here."""
    while looking.is_alive() or not os.path.exists(file):
        time.sleep(0.05)
