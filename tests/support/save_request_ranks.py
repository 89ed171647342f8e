"""What a rank does in the tests of agreed saves."""

from __future__ import annotations

from pathlib import Path

import torch

from titanlite.checkpoint.format import CheckpointMetadata
from titanlite.checkpoint.manager import CheckpointManager
from titanlite.models.shard import Shard
from titanlite.parallel.ranks import Ranks
from titanlite.resilience.signals import StopRequests
from titanlite.training.saving import SAVE_NOW, SaveRequests


def asked_after(rank: int, world: int, folder: str, step: int, steps: int) -> list[int]:
    """Steps after which this rank saved, in a run whose first rank meets the file after `step`."""
    checkpoints = CheckpointManager(Path(folder) / "checkpoints", print, Ranks(rank, world))
    asks = SaveRequests(Path(folder) / SAVE_NOW, every_minutes=0, warn=print)
    saved = []
    with StopRequests(Ranks(rank, world)) as requests:
        for now in range(1, steps + 1):
            if now == step and rank == 0:
                (Path(folder) / SAVE_NOW).touch()
            if requests.agree(None, rank == 0 and now >= step and asks.due())[1]:
                state = {"w": Shard(torch.full((3,), float(now)), (3 * rank,), (3 * world,))}
                checkpoints.begin(state, CheckpointMetadata(now))
                checkpoints.wait()
                asks.begun()
                asks.saved()
                saved.append(now)
    return saved


def agreements(rank: int, world: int, steps: int) -> list[tuple[str | None, bool]]:
    """What is agreed after each step if the first rank asks for a save after the first, and the last for a stop after
    the second."""
    with StopRequests(Ranks(rank, world)) as requests:
        said = [
            requests.agree("limit" if step == 2 and rank == world - 1 else None, step == 1 and rank == 0)
            for step in range(1, steps + 1)
        ]
    return said
