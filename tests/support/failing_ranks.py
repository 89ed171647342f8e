"""Runs in which something goes wrong. As a program: `titanlite train` with a fault, FAULT@STEP@RANK (or nothing)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SECTIONS: dict[str, dict[str, Any]] = {
    "model": {"kv_heads": 2}, "training": {"steps": 5, "global_batch": 4}, "precision": {"compute": "float64"},
    "checkpoint": {"every_steps": 2, "mode": "sync"},
}  # fmt: skip
"""What the runs train."""
RUN = Path("runs/tiny")


def program(fault: str, *arguments: str) -> list[str]:
    """The command of one process."""
    return [sys.executable, __file__, fault, "recipe.toml", *arguments]


def started(fault: str, *arguments: str, count: int = 2, **environment: str) -> list[subprocess.Popen[str]]:
    """A run's processes, by rank."""
    from support.ports import free_port  # not where this file is a program

    port, processes = str(free_port()), []
    for rank in range(count):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        variables = {**os.environ, **place, **meeting, **environment}
        command = program(fault, *arguments)
        processes.append(subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True))
    return processes


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit codes and stderr, by rank."""
    said = [process.communicate(timeout=240)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def failing(fault: str, step: int, rank: int) -> None:
    """Have the fault happen in that step of that rank."""
    import torch

    from titanlite.plan.launch import launch_environment
    from titanlite.training import trainer
    from titanlite.training.train_state import TrainState

    take_step = trainer.take_step

    def failing_step(self: TrainState, number: int, *rest: Any) -> Any:
        if number == step and launch_environment().rank == rank:
            if fault == "raise":
                raise ValueError("the sample is poisoned")
            if fault == "memory":
                raise torch.OutOfMemoryError("Allocator: tried to allocate 3.00 GiB. Free: 1.00 GiB. Used: 9 GiB. More")
            if fault == "hang":
                Path("hangs").touch()
                time.sleep(1000)
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(self, number, *rest)

    trainer.take_step = failing_step


if __name__ == "__main__":
    from titanlite.cli.main import end_as_launched
    from titanlite.cli.train import main

    if sys.argv[1]:
        what, at_step, on_rank = sys.argv[1].split("@")
        failing(what, int(at_step), int(on_rank))
    end_as_launched(main, sys.argv[2:])
