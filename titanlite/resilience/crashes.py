"""What ended a run unforeseen, written down where the next start finds it, and when to stop starting. No torch.

The first rank of a start to fail leaves a file under that start's number; ranks that fail because it did find the cause
there. A process that was killed leaves nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from titanlite.errors import GuardStop
from titanlite.files import read_file, sync, sync_path
from titanlite.plan.launch import MAX_STARTS

FOLDER = Path("logs") / "crashes"  # of a run


@dataclass(frozen=True)
class Crash:
    """How one start of a run failed."""

    attempt: int  # number of the start in the run's life, from 1
    restart: int  # how often torchrun had started its processes again, 0 without it
    time: str  # ISO 8601, UTC
    step: int  # the step under way, from 1; before the first of this start was, the one that it would have been
    samples: tuple[()] | tuple[int, int]  # first and last of that step, over all ranks; empty if it had not begun
    rank: int
    ranks: int
    host: str
    kind: str  # type of the exception
    message: str
    traceback: str
    recipe: str  # `digest` of the recipe

    @property
    def where(self) -> str:
        """Such as `rank 1 of 4 on node7`."""
        return f"rank {self.rank} of {self.ranks} on {self.host}"

    @property
    def what(self) -> str:
        """Such as `ValueError: no such token`."""
        return f"{self.kind}: {self.message}" if self.message else self.kind


def digest(recipe_text: str) -> str:
    """Tells recipes apart."""
    return hashlib.sha256(recipe_text.encode()).hexdigest()[:16]


def record(folder: Path, crash: Crash) -> None:
    """Write a crash down, unless the same start has another rank's: that one is the cause. Raises `OSError`."""
    folder.mkdir(exist_ok=True)  # not its parents: a run folder that was removed is not begun anew
    with suppress(FileExistsError), open(_path(folder, crash.attempt), "x", encoding="utf-8") as file:
        json.dump(dataclasses.asdict(crash), file, indent=1)
        file.flush()
        sync(file.fileno(), folder)
    sync_path(folder)


def attempts(folder: Path) -> list[int]:
    """Numbers of the starts of which there are records, ascending."""
    names = (re.fullmatch(r"attempt-([0-9]{5,10})\.json", path.name) for path in folder.glob("attempt-*.json"))
    return sorted(number for name in names if name and (number := int(name[1])) < MAX_STARTS)


def history(folder: Path) -> list[Crash]:
    """The crashes of which there are records that can be read, in their order."""
    return [crash for attempt in attempts(folder) if (crash := _read(folder, attempt)) is not None]


def _path(folder: Path, attempt: int) -> Path:
    return folder / f"attempt-{attempt:05d}.json"


def _read(folder: Path, attempt: int) -> Crash | None:
    with suppress(OSError, ValueError):
        return TypeAdapter(Crash).validate_json(read_file(_path(folder, attempt)), strict=True)
    return None


def refuse_loop(folder: Path, limit: int, committed: int, recipe_text: str) -> None:
    """Raise `GuardStop` if a run should not be started again: its last `limit` crashes (0: no limit) were at one step
    that no checkpoint is past, under this recipe. `committed` is the step of its newest checkpoint (0: none).
    """
    last = history(folder)[-limit:] if limit else []
    if not last or len(last) < limit:
        return
    crash = last[-1]
    same = {(each.step, each.recipe) for each in last} == {(crash.step, digest(recipe_text))}
    if not same or crash.step <= committed:
        return
    step = f"step {crash.step}"
    what = f"{step} (samples {crash.samples[0]} to {crash.samples[1]})" if crash.samples else f"starting with {step}"
    times = "once" if limit == 1 else f"{limit} times in a row"
    raise GuardStop(
        f"{what} has failed {times}, with no checkpoint past it; the last time on {crash.where}: {crash.what}\n"
        f"The run is not started again (resilience.max_crashes = {limit}). Once the cause is mended, delete {folder}, "
        "where the tracebacks are; a changed recipe is tried in any case."
    )


def root_cause(folder: Path, attempt: int, rank: int, error: Exception) -> str:
    """Why `rank` ends with an `error` that another rank's end has caused."""
    cause = _read(folder, attempt)
    if cause is not None:
        return f"rank {rank} ends because {cause.where} failed in step {cause.step}: {cause.what}"
    text = str(error).partition("\n")[0].partition(". ")[0]
    return (
        f"rank {rank} has lost another rank, which left no record in {folder}: it was killed (by the system, if memory "
        f"ran out), or its machine or the network went. {type(error).__name__}: {text}"
    )
