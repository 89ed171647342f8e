"""The processes of a run: who am I, which device is mine, and how a run joins and leaves its process group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from titanlite.errors import UsageError
from titanlite.launch import launched
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

    def from_first(self, tensor: Tensor) -> Tensor:
        """The first rank's `tensor`, in place, on every rank."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def reduce(self, tensor: Tensor, how: Literal["sum", "max"]) -> Tensor:
        """The sum or the largest value of each element over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
        return tensor

    def all_equal(self, value: int) -> bool:
        """Whether every rank called this with the same value (64 bits); the same answer on all of them."""
        bounds = self.reduce(torch.tensor([value, -value]), "max")
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


def _own_gpu(local_rank: int) -> int:
    """Number of this process's GPU among those that it sees. Raises `UsageError` if there are more ranks than GPUs."""
    seen = torch.cuda.device_count()
    if local_rank < seen:
        return local_rank
    if seen == 1:
        return 0  # the launcher shows each process its own alone; NCCL refuses a GPU that two ranks share
    raise UsageError(f"{local_rank + 1} or more ranks were started on a machine with {seen} GPUs: start one a GPU.")


@contextmanager
def joined_world(deterministic: bool, timeout_seconds: float) -> Iterator[World]:
    """Pick the device, join the job's process group if there is one (nccl on CUDA, gloo on CPU), leave it at the end.

    A rank that waits for the others longer than `timeout_seconds` fails.
    `deterministic` refuses, by an error of torch, every operation that may give other bits when it is repeated.
    """
    place = launched()
    rank, size = place.rank, place.size
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when cuBLAS is first used
        torch.use_deterministic_algorithms(True)
    if torch.cuda.is_available():
        device = torch.device("cuda", _own_gpu(place.local_rank))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        keep_freed_memory()
    if size == 1:
        yield World(rank, size, device)
        return
    # gloo beside nccl: stop requests are agreed on between hosts without touching the GPU's queue.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        init_method="env://" if place.address is None else f"tcp://{place.address}:{place.port}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    try:
        yield World(rank, size, device)
    finally:
        dist.destroy_process_group()
