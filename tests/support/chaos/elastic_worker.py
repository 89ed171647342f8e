"""`titanlite train`, slowed down, that notes what it does when: a line of JSON each, in a file of its own."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

NOTES = Path("notes")
HURRY = Path("hurry")
PAUSE_SECONDS = 0.1
LONG_PAUSE_SECONDS = 1.0
"""After `AT_PACE` steps of a start: however long the machines that are to join take to come, there are steps left."""
AT_PACE = 30


def note(what: str, **fields: Any) -> None:
    # A start of the run has a port of its own where its ranks meet.
    start = os.environ.get("MASTER_PORT", "")
    line = {"what": what, "time": time.time(), "start": start, "pid": os.getpid(), "agent": os.getppid(), **fields}
    with (NOTES / str(os.getpid())).open("a") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    note("process")
    from titanlite.cli import main as command
    from titanlite.cli.train import main as train
    from titanlite.training import trainer
    from titanlite.training.train_state import TrainState
    from titanlite.training.trainer import Trainer

    train_run, take_step, taken = Trainer.train, trainer.take_step, itertools.count()

    def noted_run(self: Trainer) -> None:
        note("loaded", step=self.run.progress.step, rank=self.run.world.rank, ranks=self.run.world.size)
        train_run(self)

    def noted_step(self: TrainState, number: int, batch: Any, factor: float) -> Any:
        if not HURRY.exists():
            time.sleep(PAUSE_SECONDS if next(taken) < AT_PACE else LONG_PAUSE_SECONDS)
        result = take_step(self, number, batch, factor)
        result[0].item()  # the step is done, not only queued
        note("step", step=number, samples=batch.samples)
        return result

    Trainer.train, trainer.take_step = noted_run, noted_step  # type: ignore[method-assign]
    end_process = command.launch.end_process

    def noted_end(code: int) -> NoReturn:
        note("end", code=code)
        end_process(code)

    command.launch.end_process = noted_end
    command.end_as_launched(train, sys.argv[1:])


if __name__ == "__main__":
    main()
