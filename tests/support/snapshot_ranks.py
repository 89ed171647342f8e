"""What a rank does in the tests of snapshots. Machines are folders; which one a rank is on, the test says."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from support.checkpoint_ranks import Ended, part
from titanlite.checkpoint import save, snapshots
from titanlite.checkpoint.format import CheckpointMetadata
from titanlite.checkpoint.manager import CheckpointManager
from titanlite.checkpoint.snapshots import Snapshots
from titanlite.parallel.ranks import Ranks


def kept(rank: int, folder: str, machines: Sequence[int], warnings: list[str], background: bool = False) -> Snapshots:
    memory = Path(folder) / f"machine-{machines[rank]}"
    memory.mkdir(exist_ok=True)
    ranks = Ranks(rank, len(machines)).apart(200) if background else Ranks(rank, len(machines))
    one = Snapshots(memory, Path(folder) / "checkpoints", warnings.append, ranks, background)
    one.prepare()
    return one


def take(rank: int, world: int, folder: str, machines: list[int], steps: list[int], background: bool = False) -> None:
    """Snapshots of the state of each step, one after the other."""
    one, held = kept(rank, folder, machines, [], background), part(rank, world, 0)
    one.begin_generation()
    for step in steps:
        for shard in held.values():
            shard.tensor.fill_(step)
        saved = one.saves.result(wait=True)
        assert saved is None or saved.error is None
        one.begin(held, CheckpointMetadata(step, samples=10 * step))
        for shard in held.values():
            shard.tensor.fill_(-1)
    saved = one.saves.result(wait=True)
    assert saved is not None and saved.error is None and saved.step == steps[-1]


def load(
    rank: int, world: int, folder: str, machines: list[int], newer_than: int = 0, of: int | None = None
) -> tuple[int | None, list[str]]:
    """The step of the snapshot that is loaded, whose values must all be that; and what was warned of. `of`: ranks by
    which the state is cut, if there were others when it was taken.
    """
    warnings: list[str] = []
    held = part(rank, world, -1) if of is None else cut_otherwise(rank, world, of)
    found = [each for each in kept(rank, folder, machines, warnings).find(held) if each[0] > newer_than]
    checkpoints = CheckpointManager(Path(folder) / "checkpoints", warnings.append, Ranks(rank, world))
    manifest = checkpoints.load_latest(held, snapshots=found)
    if manifest is None:
        return None, warnings
    assert manifest.samples == 10 * manifest.step
    for name, shard in held.items():
        assert torch.equal(shard.tensor, torch.full_like(shard.tensor, manifest.step)), name
    return manifest.step, warnings


def cut_otherwise(rank: int, world: int, of: int) -> dict[str, Any]:
    """The state of `of` ranks, by columns and not rows on the first rank, and whole on the others."""
    from titanlite.models.shard import Shard

    state = {name: shard for number in range(of) for name, shard in part(number, of, -1).items()}
    held = {name: Shard.whole(torch.full(shard.shape, -1).to(shard.tensor.dtype)) for name, shard in state.items()}
    if rank == 0:
        held["model.w"] = Shard(torch.full((8, 2), -1.0), (0, 1), (8, 3))
    return held


def take_with_fault(rank: int, world: int, folder: str, machines: list[int], fault: str, faulty: int) -> Ended:
    """A good snapshot of step 1, then one of step 2 with a fault on rank `faulty`: how that ended."""
    take(rank, world, folder, machines, [1])
    one = kept(rank, folder, machines, [])
    one.find(part(rank, world, -1))[0][1]()
    one.begin_generation()
    with pytest.MonkeyPatch.context() as patch:
        if rank == faulty:
            _break(patch, fault)
        one.begin(part(rank, world, 2), CheckpointMetadata(2, samples=20))
        saved = one.saves.result(wait=True)
    assert saved is not None and saved.error is not None
    return type(saved.error).__name__, str(saved.error)


def _break(patch: pytest.MonkeyPatch, fault: str) -> None:
    write, real = save.write_items, open

    def full(path: Path, mode: str, **names: Any) -> Any:
        if mode == "wb":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, mode, **names)

    def lost(folder: Path, *rest: Any) -> Any:
        table = write(folder, *rest)
        for file in folder.glob("tensors-*"):
            file.unlink()
        return table

    def cut(folder: Path, *rest: Any) -> Any:
        table = write(folder, *rest)
        for file in folder.glob(f"tensors-{rest[1]:05d}*"):
            os.truncate(file, 20)
        return table

    if fault == "no memory for a copy":
        patch.setattr(snapshots, "open", full, raising=False)
    else:
        patch.setattr(save, "write_items", lost if fault == "a file is lost" else cut)


def come_back(rank: int, world: int, folder: str, machines: list[int], away: int) -> int | None:
    """Snapshots are taken, one machine goes, the run turns to another line, and that machine comes back."""
    take(rank, world, folder, machines, [5])
    one = kept(rank, folder, machines, [])
    memory, aside = Path(folder) / f"machine-{away}", Path(folder) / "away"
    ranks = Ranks(rank, world)
    ranks.run_on_rank0(lambda: str(shutil.copytree(memory, aside)))
    one.begin_generation()
    assert load(rank, world, folder, machines)[0] is None
    ranks.run_on_all_ranks(lambda: None)
    ranks.run_on_rank0(lambda: str(shutil.copytree(aside, memory, dirs_exist_ok=True)))
    return load(rank, world, folder, machines)[0]
