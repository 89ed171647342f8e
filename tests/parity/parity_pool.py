"""Worker processes that import torch once and then form gloo groups of any size, one task after the other."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT_SECONDS = 240


class Pool:
    """`size` workers; `run` gives the first few of them a task, as the ranks of one process group."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
        """Call `function(rank, world, *arguments)` on `world` ranks; their results, by rank.

        `function` must be a module's own, and arguments and results plain values. The first rank's error is raised
        with its traceback as text.
        """
        with tempfile.TemporaryDirectory() as folder:
            target = f"{function.__module__}:{function.__qualname__}"
            for rank, pipe in enumerate(self._pipes[:world]):
                pipe.send((target, rank, world, os.path.join(folder, "store"), arguments))
            answers = [self._answer(pipe) for pipe in self._pipes[:world]]
        for rank, (error, _) in enumerate(answers):
            if error is not None:
                raise AssertionError(f"rank {rank} of {world}:\n{error}")
        return [result for _, result in answers]

    def _answer(self, pipe: Connection) -> tuple[str | None, Any]:
        return pipe.recv() if pipe.poll(TIMEOUT_SECONDS) else (f"no answer in {TIMEOUT_SECONDS} s", None)

    def close(self) -> None:
        """End the workers."""
        for process in self._processes:
            process.kill()


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
            result = getattr(importlib.import_module(module), name)(rank, world, *arguments)
            pipe.send((None, result))
        except Exception:
            pipe.send((traceback.format_exc(), None))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
