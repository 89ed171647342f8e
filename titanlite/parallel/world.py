"""The processes of a run: who am I, which device is mine, and how a run joins and leaves its process group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from titanlite.errors import UsageError
from titanlite.parallel.host import keep_freed_memory


@dataclass(frozen=True)
class World:
    """One process's place among the others; `size` 1 means that there is no process group."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes for all."""
        return self.rank == 0

    def wait_for_all(self) -> None:
        """Return once every rank has called this."""
        if self.size > 1:
            dist.barrier()

    def all_equal(self, value: int) -> bool:
        """Whether every rank called this with the same value (64 bits); the same answer on all of them."""
        bounds = torch.tensor([value, -value])
        if self.size > 1:
            dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
        return int(bounds[0]) == -int(bounds[1])


@contextmanager
def full_memory_explained() -> Iterator[None]:
    """Turn an allocator's complaint that the device's memory is full into a `UsageError` that says what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # On a GPU it has a type; the CPU's allocator raises a plain RuntimeError with the system's words.
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        # Of torch's message, the sentences between where its allocator is and how to configure it.
        reason = ". ".join(str(error).rpartition("Allocator: ")[2].split(". ")[:3])
        raise UsageError(
            f"the device's memory is full ({reason or 'MemoryError'}). Give a smaller "
            "training.microbatch (the numbers stay the same), a shorter training.sequence_length or a smaller model; "
            "titanlite check says how much the model's states take."
        ) from error


@contextmanager
def joined_world(deterministic: bool) -> Iterator[World]:
    """Pick the device, join torchrun's process group if there is one (nccl on CUDA, gloo on CPU), leave it at the end.

    `deterministic` refuses, by an error of torch, every operation that may give other bits when it is repeated.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when cuBLAS is first used
        torch.use_deterministic_algorithms(True)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        keep_freed_memory()
    if size == 1:
        yield World(rank, size, device)
        return
    # gloo beside nccl: stop requests are agreed on between hosts without touching the GPU's queue.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(rank, size, device)
    finally:
        dist.destroy_process_group()
