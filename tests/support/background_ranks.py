"""What a rank does in the tests of saves in the background."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from titanlite.checkpoint.format import CheckpointMetadata
from titanlite.checkpoint.manager import CheckpointManager
from titanlite.models.shard import Shard
from titanlite.parallel.ranks import Ranks
from titanlite.recipe.sections import Checkpoint


def train_while_saving(rank: int, world: int, folder: str, steps: int) -> list[int]:
    """Steps of messages among all ranks, each with a save of its state beside it; the steps that were committed."""
    ranks = Ranks(rank, world).apart(200)
    checkpoints = CheckpointManager(Path(folder), print, ranks, Checkpoint(keep_last=0))
    held, committed = torch.zeros(3), []
    for step in range(1, steps + 1):
        for _ in range(20):
            total = torch.ones(1)
            dist.all_reduce(total)
            assert total == world
        held.fill_(step)
        saved = checkpoints.wait()
        if saved is not None:
            committed.append(saved.step)
        state = {"w": Shard(held, (3 * rank,), (3 * world,))}
        checkpoints.begin(state, CheckpointMetadata(step))
        held.fill_(-1)
    saved = checkpoints.wait()
    assert saved is not None
    return [*committed, saved.step]
