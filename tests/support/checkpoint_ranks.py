"""What a rank does in the tests of shared checkpoints, and the faults that it may meet."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from titanlite.checkpoint import load, save
from titanlite.checkpoint.format import MANIFEST, CheckpointMetadata, Manifest, encode
from titanlite.checkpoint.manager import CheckpointManager
from titanlite.models.shard import Shard
from titanlite.parallel.ranks import Ranks
from titanlite.recipe.sections import Checkpoint

Ended = tuple[str, str]  # type of the error that ended a call, or "done", and its text


def part(rank: int, world: int, step: int) -> dict[str, Shard]:
    """This rank's part of a state all of whose values are the step: rows of a matrix (the last rank has none), a
    tensor that only this rank has, as of a pipeline stage, and one that is the same on all.
    """
    each = 8 // (world - 1)
    first = min(8, rank * each)
    rows = 0 if rank == world - 1 else 8 - first if rank == world - 2 else each
    return {
        "model.w": Shard(torch.full((rows, 3), float(step)), (first, 0), (8, 3)),
        f"model.stage-{rank}": Shard.whole(torch.full((5,), float(step))),
        "optimizer.steps": Shard(torch.tensor(step), (), (), world, rank),
    }


def write_parts(
    folder: Path, cut: Sequence[Mapping[str, Shard]], file_bytes: int = 10**9, recipe: str = "", step: int = 1
) -> Manifest:
    """Write a checkpoint as ranks with these shards would, one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "FILE_BYTES", file_bytes)
        tables = [save.write_items(folder, save.plan_local_save(part), rank) for rank, part in enumerate(cut)]
    manifest = save.merge_tables(tables, CheckpointMetadata(step, recipe=recipe))
    (folder / MANIFEST).write_bytes(encode(manifest))
    return manifest


def manager(folder: str, rank: int, world: int, warnings: list[str] | None = None) -> CheckpointManager:
    warn = [].append if warnings is None else warnings.append
    return CheckpointManager(
        Path(folder), warn, Ranks(rank, world), Checkpoint(mode="sync", keep_last=2, max_failures=0)
    )


def commit(checkpoints: CheckpointManager, tensors: dict[str, Shard], step: int) -> Ended:
    try:
        checkpoints.begin(tensors, CheckpointMetadata(step))
        checkpoints.wait()
    except Exception as error:
        return type(error).__name__, str(error)
    return "done", ""


def save_steps(rank: int, world: int, folder: str, steps: list[int]) -> None:
    checkpoints = manager(folder, rank, world)
    for step in steps:
        assert commit(checkpoints, part(rank, world, step), step) == ("done", "")


def save_with_fault(rank: int, world: int, folder: str, fault: str, faulty: int) -> tuple[Ended, Ended, list[str]]:
    """A good checkpoint, one with a fault on rank `faulty`, what the folder then holds, and a good one again."""
    checkpoints = manager(folder, rank, world)
    assert commit(checkpoints, part(rank, world, 1), 1) == ("done", "")
    with pytest.MonkeyPatch.context() as patch:
        if rank == faulty:
            _break(patch, fault)
        ended = commit(checkpoints, part(rank, world, 2), 2)
    names = sorted(os.listdir(folder))
    return ended, commit(checkpoints, part(rank, world, 3), 3), names


def _break(patch: pytest.MonkeyPatch, fault: str) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def mistaken(*_: Any) -> None:
        raise TypeError("a mistake of ours")

    owner, name, broken = {
        "the disk is full": (save, "write_tensors", full),
        "the disk is full at the sync": (os, "fsync", full),
        "the disk is full for the manifest": (Path, "write_bytes", full),
        "the rename is refused": (os, "rename", full),
        "a mistake": (save, "group_by_size", mistaken),
    }[fault]
    patch.setattr(owner, name, broken)


def load_latest(rank: int, world: int, folder: str, strange: str = "") -> tuple[Ended, int | None, list[str], int]:
    """How it ended, the step that all loaded values have, what was warned of, and how many files were hashed here."""
    warnings: list[str] = []
    hashed: list[Path] = []
    tensors = part(rank, world, -1)
    if strange == "shape" and rank == 1:
        tensors["model.stage-1"] = Shard.whole(torch.zeros(6))
    if strange == "fewer" and rank == 1:
        del tensors["model.stage-1"]
    if strange == "more" and rank == 1:
        tensors["model.more"] = Shard.whole(torch.zeros(1))
    if strange == "elsewhere" and rank == 1:
        folder += "-elsewhere"
    read_chunks = load.read_chunks

    def read_and_note(path: Path, *more: Any) -> None:
        if more[-1] is not None:
            hashed.append(path)
        read_chunks(path, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "read_chunks", read_and_note)
        try:
            manifest = manager(folder, rank, world, warnings).load_latest(tensors)
        except Exception as error:
            return (type(error).__name__, str(error)), None, warnings, len(hashed)
    if manifest is None:
        return ("done", ""), None, warnings, len(hashed)
    assert all((shard.tensor == manifest.step).all() for shard in tensors.values())
    return ("done", ""), manifest.step, warnings, len(hashed)
