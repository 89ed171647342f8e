"""The processes of a run: their device, how they meet, join the process group, stand by, and leave."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from titanlite.errors import EXIT_DONE, EXIT_STOPPED_EARLY, OtherRankFailed, StoppedEarly, TitanliteError, UsageError
from titanlite.parallel.ranks import Ranks
from titanlite.plan.launch import STOP_SIGNALS, Launch, launch_environment

_ENDED = "ended"  # key under which ranks that stand by read how the run ended


@dataclass(frozen=True)
class World(Ranks):
    """All ranks of the run, and this one's device; `size` 1 means that there is no process group."""

    device: torch.device


@contextmanager
def explain_full_memory() -> Iterator[None]:
    """Turn an allocator's error that the device's memory is full into a `UsageError` that names what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise  # on a GPU it has a type; the CPU's allocator raises a RuntimeError with the system's words
        # Of torch's message, the sentences between where its allocator is and how to configure it.
        reason = ". ".join(str(error).rpartition("Allocator: ")[2].split(". ")[:3])
        raise UsageError(
            f"the device's memory is full ({reason or 'MemoryError'}). Give a smaller "
            "training.microbatch (the numbers stay the same), a shorter training.sequence_length or a smaller model; "
            "titanlite check says how much the model's states take."
        ) from error


def _own_device(local_rank: int) -> torch.device:
    """Raises `UsageError` if there are more ranks than GPUs."""
    if not torch.cuda.is_available():
        # Have malloc keep what a step frees for the next one: to map it anew takes 5 % of a small model's step.
        with suppress(AttributeError, OSError, TypeError):  # macOS, musl, Windows
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        return torch.device("cpu")
    seen = torch.cuda.device_count()
    if seen > 1 and local_rank >= seen:
        raise UsageError(f"{local_rank + 1} or more ranks were started on a machine with {seen} GPUs: start one a GPU.")
    # If one, the launcher shows each process its own: NCCL refuses to share one.
    device = torch.device("cuda", local_rank if seen > 1 else 0)
    torch.cuda.set_device(device)
    return device


@contextmanager
def join_world(deterministic: bool, timeout_seconds: float, size: int | None = None) -> Iterator[World]:
    """Pick the device, join the job's process group if there is one (nccl on CUDA, gloo on CPU), leave it at the end.

    A rank that waits for the others longer than `timeout_seconds` fails. Only the first `size` ranks join, if it is
    given; the others are in `stand_by`. `deterministic` has torch refuse every operation that may give other bits when
    it is repeated. Raises `UsageError` if the ranks cannot meet.
    """
    place = launch_environment()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when cuBLAS is first used
        torch.use_deterministic_algorithms(True)
    world = World(place.rank, size or place.size, _own_device(place.local_rank))
    if place.size == 1:
        yield world
        return
    store = open_store(place, timeout_seconds)
    try:
        if world.size > 1:
            # gloo beside nccl: stop requests are agreed on between hosts without touching the GPU's queue.
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo",
                store=PrefixStore("group", store),
                rank=world.rank,
                world_size=world.size,
                timeout=timedelta(seconds=timeout_seconds),
            )
        yield world
    except TitanliteError as error:
        if error.on_all_ranks:
            _leave(world, store, place.size, error)
        raise  # of any other error, connections hold until the process ends: no rank prints one before this one
    _leave(world, store, place.size, None)


def _leave(world: World, store: Store, launched: int, error: TitanliteError | None) -> None:
    """End the process group; the first rank writes for ranks that stand by how the run ended, and waits for them."""
    if world.size > 1:
        dist.destroy_process_group()
    if world.is_first and launched > world.size:
        store.set(_ENDED, f"{error.exit_code if error else EXIT_DONE} {int(getattr(error, 'signalled', False))}")
        with suppress(dist.DistError):
            store.wait([f"{_ENDED}/{rank}" for rank in range(world.size, launched)], timedelta(seconds=10))


def stand_by(timeout_seconds: float) -> int:
    """Wait, as a rank that the mesh has no place for, until the run ends; returns its exit code, or raises
    `StoppedEarly` as the others do. A stop signal ends this process alone. Raises `OtherRankFailed` if the first rank
    is gone without a record of how the run ended, and `UsageError` if the ranks cannot meet.
    """
    place = launch_environment()
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: os._exit(EXIT_DONE))
    store = open_store(place, timeout_seconds)
    try:
        while not store.check([_ENDED]):
            time.sleep(0.5)
        code, signalled = map(int, store.get(_ENDED).split())
        store.set(f"{_ENDED}/{place.rank}", "")
    except dist.DistError as error:
        raise OtherRankFailed(f"rank {place.rank} stood by, and the run it waited for is gone.") from error
    if code == EXIT_STOPPED_EARLY:
        stop = StoppedEarly("the run was stopped")
        stop.signalled = bool(signalled)
        raise stop
    return code


def open_store(place: Launch, timeout_seconds: float) -> Store:
    """A store that all ranks of the job share, and that no earlier start of it has written to.

    torchrun's agent keeps one store for all restarts, and gloo would find the addresses of dead processes in it. So the
    first rank draws a name for this start, under which all go on; each other rank asks for it under a name of its own,
    which makes sure that the answer is not an old one. Raises `UsageError` if a rank does not come in time.
    """
    url, at = f"tcp://{place.address}:{place.port}", f"{place.address}:{place.port}"
    if place.address is None:
        url, at = "env://", f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store = _connect(url, place, timeout_seconds)
        if place.rank == 0:
            start = uuid4().hex
            _answer(store, start, place.size, time.monotonic() + timeout_seconds)
        else:
            name = uuid4().hex
            store.set(f"asks/{place.rank}", name)
            store.wait([f"answer/{name}"], timedelta(seconds=timeout_seconds))
            start = store.get(f"answer/{name}").decode()
            store.set(f"{start}/{place.rank}", "")
    except (dist.DistError, TimeoutError, futures.TimeoutError) as error:  # two types up to Python 3.10
        reason = str(error).partition("\n")[0] or "there was no answer"
        raise UsageError(
            f"rank {place.rank} of {place.size} could not meet the others at {at} within {timeout_seconds:g} s "
            f"(parallel.timeout_seconds): {reason}. The first rank listens there: see to it that it was started, "
            "that other machines reach it under this name, and that no other program has the port (MASTER_PORT)."
        ) from error
    return PrefixStore(start, store)


def _connect(url: str, place: Launch, seconds: float) -> Store:
    """Raises `TimeoutError` a little after torch should have: for a program that is no store it waits for ever."""
    connected: futures.Future[Store] = futures.Future()

    def run() -> None:
        try:
            connected.set_result(next(rendezvous(url, place.rank, place.size, timeout=timedelta(seconds=seconds)))[0])
        except Exception as error:  # for the thread that waits
            connected.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return connected.result(seconds + 2.0)


def _answer(store: Store, start: str, size: int, until: float) -> None:
    """Give other ranks the name of this start, under every name that they ask under: the first may be an old one."""
    for other in range(1, size):
        while not store.check([f"{start}/{other}"]):
            if store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", start)
            if time.monotonic() > until:
                raise TimeoutError(f"rank {other} did not come")
            time.sleep(0.002)


def is_peer_failure(error: BaseException) -> bool:
    """Whether another rank's end caused `error`: of NCCL and the store known by type, of gloo by where it is raised."""
    causes = [error]
    while (cause := causes[-1].__cause__) and cause not in causes:  # to raise an error from what it caused makes a ring
        causes.append(cause)
    return any(isinstance(e, dist.DistError) or (isinstance(e, RuntimeError) and "/gloo/" in str(e)) for e in causes)
