"""Machines leave a run and join it: 4 -> 3 -> 2 -> 4 -> 3. As a program: what it cost, as a table.

Each machine is a torchrun agent with one process, all on this one. The first to be killed is the first rank's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from support.chaos import elastic_worker
from support.runs import rows
from support.tiny import write_tiny

ROOT = Path(__file__).parents[3]
STEPS, BATCH, EVERY = 240, 12, 10
_SECTIONS: dict[str, dict[str, Any]] = {
    "run": {"name": "elastic"}, "training": {"steps": STEPS, "global_batch": BATCH},
    "precision": {"compute": "float64"}, "checkpoint": {"every_steps": EVERY},
}  # fmt: skip
PATIENCE_SECONDS = 600

Note = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """What it cost that machines left or came. Times in seconds."""

    what: str
    lost_steps: int
    detect: float  # until the last process of the start before has ended
    rendezvous: float  # until the first process of the new start begins
    load: float  # until the last of them has its state
    first_step: float

    @property
    def total(self) -> float:
        return self.detect + self.rendezvous + self.load + self.first_step


class Rehearsal:
    """The machines of one run, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self.agents: list[subprocess.Popen[bytes]] = []

    def notes(self) -> list[Note]:
        """All that was noted so far, in the order of time."""
        lines = [line for file in (self.folder / "notes").iterdir() for line in file.read_text().splitlines(True)]
        return sorted((json.loads(line) for line in lines if line.endswith("\n")), key=lambda note: note["time"])

    def add(self, machines: int) -> None:
        words = ["--nnodes=2:4", "--nproc-per-node=1", f"--rdzv-endpoint=localhost:{self.store.port}", "--rdzv-id=run"]
        command = [sys.executable, "-m", "torch.distributed.run", *words, elastic_worker.__file__, "recipe.toml"]
        for _ in range(machines):
            log = (self.folder / f"agent{len(self.agents)}.log").open("wb")
            self.agents.append(
                subprocess.Popen(command, cwd=self.folder, env=environment(), stdout=log, stderr=subprocess.STDOUT)
            )

    def kill(self, rank: int) -> None:
        """The machine of that rank goes, with all that runs on it."""
        here = self.where(rank)
        for process in (here["agent"], here["pid"]):
            os.kill(process, signal.SIGKILL)

    def warn(self, rank: int) -> None:
        """The machine of that rank is to go, and hears of it before."""
        os.kill(self.where(rank)["agent"], signal.SIGTERM)

    def where(self, rank: int) -> Note:
        """What that rank of the newest start noted."""
        loaded = [note for note in self.notes() if note["what"] == "loaded"]
        (here,) = (note for note in loaded if note["start"] == loaded[-1]["start"] and note["rank"] == rank)
        return here

    def wait(self, ranks: int, steps: int = 12) -> str:
        """Until a start with so many ranks has taken some steps; its name."""
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            notes = self.notes()
            loaded = [note for note in notes if note["what"] == "loaded"]
            for note in loaded[-1:]:
                done = sum(other["what"] == "step" and other["start"] == note["start"] for other in notes)
                if note["ranks"] == ranks and done >= steps * ranks:
                    return str(note["start"])
            time.sleep(0.1)
        raise TimeoutError(f"no start with {ranks} ranks; see {self.folder}")

    def change(self, what: str, ranks: int, act: Callable[[], None]) -> Change:
        """Have machines leave or come, and measure what follows until `ranks` train."""
        before = [note for note in self.notes() if note["what"] == "loaded"][-1]["start"]
        at = time.time()
        act()
        start = self.wait(ranks)
        notes = self.notes()

        def times(what: str, of: str) -> list[float]:
            return [note["time"] for note in notes if note["what"] == what and note["start"] == of]

        resumed = next(note["step"] for note in notes if note["what"] == "loaded" and note["start"] == start)
        begun = min(times("process", start))
        reached = max(note["step"] for note in notes if note["what"] == "step" and note["time"] < begun)
        ended, loaded = max(times("end", before)), max(times("loaded", start))
        first_step = min(times("step", start))
        return Change(what, reached - resumed, ended - at, begun - ended, loaded - begun, first_step - loaded)

    def finish(self) -> list[int]:
        """Exit codes of the agents that are left."""
        left = [agent for agent in self.agents if agent.poll() is None]
        (self.folder / elastic_worker.HURRY).touch()
        return [agent.wait(PATIENCE_SECONDS) for agent in left]

    def close(self) -> None:
        """End what is left of a rehearsal that failed."""
        for agent in self.agents:
            if agent.poll() is None:
                agent.terminate()
        for agent in self.agents:
            agent.wait()


def environment() -> dict[str, str]:
    """This one, with what `scripts/elastic.env` sets."""
    lines = (ROOT / "scripts" / "elastic.env").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return {**os.environ, **settings, "OMP_NUM_THREADS": "1"}


def prepare(folder: Path) -> None:
    write_tiny(folder, lines=400, **_SECTIONS)
    (folder / elastic_worker.NOTES).mkdir()


def rehearse(folder: Path) -> tuple[list[Change], Rehearsal]:
    """4 -> 3 -> 2 -> 4 -> 3 machines, and to the end."""
    prepare(folder)
    rehearsal = Rehearsal(folder)
    try:
        rehearsal.add(4)
        rehearsal.wait(4)
        changes = [
            rehearsal.change("4 -> 3, killed", 3, lambda: rehearsal.kill(0)),
            rehearsal.change("3 -> 2, killed", 2, lambda: rehearsal.kill(1)),
            rehearsal.change("2 -> 4, joined", 4, lambda: rehearsal.add(2)),
            rehearsal.change("4 -> 3, signalled", 3, lambda: rehearsal.warn(0)),
        ]
        codes = rehearsal.finish()
        assert codes == [0, 0, 0], codes
    finally:
        rehearsal.close()
    return changes, rehearsal


def trained(notes: list[Note]) -> dict[int, list[int]]:
    """Step -> samples that all ranks together read for it, in the history that counts: without steps taken again."""
    steps: dict[int, list[int]] = {}
    seen = set()
    for note in notes:
        if note["what"] == "loaded" and note["start"] not in seen:
            seen.add(note["start"])
            steps = {step: samples for step, samples in steps.items() if step <= note["step"]}
        if note["what"] == "step":
            steps.setdefault(note["step"], []).extend(note["samples"])
    return steps


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run, key="loss")]


def alone(folder: Path) -> list[float]:
    """Losses of the same run on one process that nothing happens to."""
    command = [sys.executable, "-m", "titanlite.train", "recipe.toml", "--run.name=alone"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return losses(folder / "runs" / "alone")


def table(changes: list[Change]) -> Iterator[str]:
    names = ("detect", "rendezvous", "load", "first_step", "total")
    yield "| machines | steps trained again | " + " | ".join(f"{name.replace('_', ' ')}, s" for name in names) + " |"
    yield "| --- " * (2 + len(names)) + "|"
    for change in changes:
        cells = [change.what, str(change.lost_steps), *(f"{getattr(change, name):.1f}" for name in names)]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        changes, rehearsal = rehearse(folder)
        print("\n".join(table(changes)))
        steps, ours, reference = trained(rehearsal.notes()), losses(folder / "runs/elastic"), alone(folder)
        read = [sample for step in sorted(steps) for sample in steps[step]]
        print(f"\n{len(set(read))} of {STEPS * BATCH} samples read, {len(read) - len(set(read))} of them twice")
        worst = max(abs(a - b) / abs(b) for a, b in zip(ours, reference, strict=True))
        print(f"largest relative difference of {len(ours)} losses from one process: {worst:.1e}")


if __name__ == "__main__":
    main()
