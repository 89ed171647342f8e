"""Worker processes that form gloo groups of any size, one task after the other; torch is imported once for all."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

TIMEOUT_SECONDS = 240
_SILENT = f"no answer in {TIMEOUT_SECONDS} s"


_MODULES = (
    "titanlite.training.trainer", "titanlite.cli.main", "titanlite.cli.check", "titanlite.plan.describe",
    "titanlite.cli.checkpoint", "titanlite.checkpoint.huggingface", "titanlite.checkpoint.load",
    "titanlite.cli.generate", "titanlite.models.llama", "titanlite.optim.adamw", "titanlite.optim.muon",
    "titanlite.corpus.corpora.files", "titanlite.observe.console", "titanlite.observe.jsonl", "torch.utils._triton",
    "torch.distributed.fsdp", "torch.distributed.pipelining", "torch.distributed.tensor.parallel",
)  # fmt: skip


def fork_server() -> ForkServerContext:
    """Starts processes from one, the same for all of this session, that has imported what any command does, and has no
    threads.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_MODULES))
    return context


class Pool:
    """As many workers as a task has needed so far; `run` gives the first few a task, as ranks of a process group."""

    def __init__(self) -> None:
        self._context = fork_server()
        # Stores' files stay until the end: one that is gone keeps a store that is let go of later waiting for it.
        self._stores = tempfile.TemporaryDirectory()
        self._tasks = 0
        self._pipes: list[Connection] = []
        self._processes: list[ForkServerProcess] = []

    def _grow(self, size: int) -> None:
        while len(self._pipes) < size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
        """Call `function(rank, world, *arguments)` on `world` ranks; their results, by rank.

        `function` must be a module's own, and arguments and results plain values. The first rank's error is raised
        with its traceback as text.
        """
        self._grow(world)
        self._tasks += 1
        store, target = (
            os.path.join(self._stores.name, str(self._tasks)),
            f"{function.__module__}:{function.__qualname__}",
        )
        for rank, pipe in enumerate(self._pipes[:world]):
            pipe.send((target, rank, world, store, arguments))
        answers = [self._answer(pipe) for pipe in self._pipes[:world]]
        if any(error is _SILENT for error, _ in answers):
            self.close()  # whatever it still says would be taken for the answer to the next task
        for rank, (error, _) in enumerate(answers):
            if error is not None:
                raise AssertionError(f"rank {rank} of {world}:\n{error}")
        return [result for _, result in answers]

    def _answer(self, pipe: Connection) -> tuple[str | None, Any]:
        return pipe.recv() if pipe.poll(TIMEOUT_SECONDS) else (_SILENT, None)

    def close(self) -> None:
        """End the workers."""
        for process in self._processes:
            process.kill()
        self._processes.clear()
        self._pipes.clear()


def _work(pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        target, rank, world, store, arguments = pipe.recv()
        module, _, name = target.partition(":")
        try:
            if world > 1:
                dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
            answer = None, getattr(importlib.import_module(module), name)(rank, world, *arguments)
        except Exception:
            answer = traceback.format_exc(), None
        pipe.send(answer)
        del answer
        _let_go_of_groups()
        if dist.is_initialized():
            dist.destroy_process_group()


def _let_go_of_groups() -> None:
    """Drop what refers to process groups: left to live, each keeps threads that wake all the time.

    A model refers to its own, in cycles; and torch remembers, for each mesh that it met, how DTensors on it are cut.
    """
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import debug

        debug._clear_sharding_prop_cache()
    gc.collect()
