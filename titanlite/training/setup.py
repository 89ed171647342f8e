"""What a run is built from, each part by one function: data, run folder, checkpoints, read log, verification."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from titanlite.checkpoint.manager import CheckpointManager
from titanlite.checkpoint.snapshots import Snapshots, forget
from titanlite.corpus.prepare import texts_folder
from titanlite.corpus.tokenizers import describe_separator
from titanlite.corpus.verification import Verification
from titanlite.data.read_log import NO_LOG, ReadLog, last_start, log_path
from titanlite.data.splits import DataSplits, open_data, require_samples
from titanlite.data.survey import find_shared_texts
from titanlite.errors import EXIT_DONE, StoppedEarly, TitanliteError
from titanlite.observe.console import LogFile, open_console
from titanlite.observe.logger import RunLogger
from titanlite.observe.run_folder import GO_ON, RunFolder, Start, open_run_folder
from titanlite.parallel.world import World
from titanlite.plan.launch import launch_environment
from titanlite.plan.layout import BatchPlan, Coordinates, batch_plan, require_layout, sample_schedule, total_steps
from titanlite.plan.memory import checkpoint_bytes
from titanlite.recipe.load import LoadedRecipe
from titanlite.recipe.paths import expand
from titanlite.recipe.sections import Recipe
from titanlite.resilience import crashes
from titanlite.resilience.watchdog import OFF, Watchdog
from titanlite.text import list_some
from titanlite.training.progress import Progress

OpenedData = tuple[DataSplits, list[str]]  # a run's data, and what is to be printed about it


@dataclass
class Run:
    """What one run has on one rank, beside the state that it trains."""

    recipe: Recipe
    recipe_text: str
    world: World
    data: DataSplits
    checkpoints: CheckpointManager
    logger: RunLogger
    start: Start = GO_ON
    attempt: int = 1  # number of this start in the run's life
    progress: Progress = field(default_factory=Progress)
    snapshots: Snapshots | None = None
    watchdog: Watchdog = OFF
    read_log: ReadLog = NO_LOG
    verification: Verification | None = None

    @property
    def path(self) -> Path:
        return self.checkpoints.folder.parent

    @cached_property
    def total_steps(self) -> int:
        return total_steps(self.recipe.training)


def rank_plan(recipe: Recipe, world: World) -> tuple[BatchPlan, Coordinates]:
    """This rank's part of each step, and where in the mesh it is."""
    layout = require_layout(recipe.parallel, world.size)
    coordinates = layout.coordinates(world.rank)
    return batch_plan(recipe, layout, coordinates.data), coordinates


def open_run_data(recipe: Recipe) -> OpenedData:
    """The run's data, and what is to be printed about it. Raises `DataError`, also where it does not suffice."""
    data = open_data(
        recipe.data,
        recipe.training.sequence_length,
        recipe.run.seed,
        validated=recipe.validation.every_steps > 0,
        texts_folder=texts_folder(recipe.run),
    )
    reading = require_samples(data.train, sample_schedule(recipe).end_sample(total_steps(recipe.training)))
    if launch_environment().is_first:
        reading += [f"warning: {finding}" for finding in find_shared_texts(recipe.data)]
    return data, [*reading, f"documents are separated by {describe_separator(data.tokenizer)}"]


def try_to_open_data(recipe: Recipe) -> Future[OpenedData]:
    """`open_run_data`, whose error this rank raises once it has met the others: all end with it, and none waits."""
    opened: Future[OpenedData] = Future()
    try:
        opened.set_result(open_run_data(recipe))
    except TitanliteError as error:
        opened.set_exception(error)
    return opened


def lock_run_folder(
    stack: ExitStack, world: World, loaded: LoadedRecipe, path: Path, start: Start, log: RunLogger, progress: Progress
) -> tuple[RunFolder | None, Start, int]:
    """Lock and clear the run's folder, on the first rank, until `stack` ends, with its console and its `status.json`.

    Returns the folder there (None on other ranks), what is to be done, which the first rank decides (a machine that has
    just come does not know what the job's earlier starts did), and the number of this start.
    """
    folders: list[RunFolder] = []
    job = world.run_on_all_ranks(lambda: start.job, lambda jobs: sorted({name for names in jobs for name in names}))

    def lock() -> list[Any]:
        recipe, steps = loaded.recipe, total_steps(loaded.recipe.training)
        log.consoles.append(open_console(sys.stdout, steps, recipe.run.name))
        folder = open_run_folder(path, recipe, loaded.text, replace(start, job=tuple(job)), log.info)
        folders.append(folder)
        stack.callback(folder.close)
        stack.enter_context(_status(folder, progress))
        log.consoles.append(LogFile(folder.logs / "console.log", steps))
        folder.require_space(checkpoint_bytes(recipe), "a checkpoint of this model")
        attempts = crashes.attempts(path / crashes.FOLDER)
        folder.attempt = max(folder.attempt, 1 + max(attempts, default=0), 1 + last_start(path))
        return [folder.start.mode, folder.start.step, folder.start.restarted, folder.attempt]

    mode, step, restarted, attempt = world.run_on_rank0(lock)
    if start.mode != "auto" and (mode, step) != (start.mode, start.step):
        log.info("--fresh, --resume and --from-step were for the first start of this job; this one goes on.")
    return next(iter(folders), None), replace(start, mode=mode, step=step, restarted=restarted), attempt


def open_checkpoints(
    recipe: Recipe, path: Path, world: World, logger: RunLogger, folder: RunFolder | None
) -> tuple[CheckpointManager, Snapshots | None]:
    """The run's checkpoints, and its snapshots if the recipe asks for any."""
    timeout, background = recipe.parallel.timeout_seconds, recipe.checkpoint.mode == "async"
    require_own = folder.require_own if folder is not None else lambda: None
    ranks = world.apart(timeout)
    checkpoints = CheckpointManager(path / "checkpoints", logger.info, ranks, recipe.checkpoint, require_own)
    if not recipe.resilience.snapshot_every:
        return checkpoints, None
    memory, ranks = expand(recipe.resilience.snapshot_dir), world.apart(timeout)
    return checkpoints, Snapshots(memory, checkpoints.folder, logger.info, ranks, background, require_own)


def find_latest_step(run: Run) -> int:
    """Clear what killed processes left of saves, refuse to crash again and again, and return the newest step or 0."""

    def prepare() -> int:
        run.checkpoints.prepare()
        if run.snapshots is None:
            forget(run.checkpoints.folder)
        latest = max(run.checkpoints.steps(), default=0)
        crashes.refuse_loop(run.path / crashes.FOLDER, run.recipe.resilience.max_crashes, latest, run.recipe_text)
        return latest

    latest: int = run.world.run_on_rank0(prepare)
    return latest


def open_read_log(run: Run) -> ReadLog:
    """This rank's record of the samples that it reads: one rank of each data rank keeps one."""
    plan, coordinates = rank_plan(run.recipe, run.world)
    path = log_path(run.path, plan.data_rank) if coordinates.is_batch_leader else None
    return ReadLog(path, plan, run.attempt, run.logger.info)


def begin_verification(stack: ExitStack, run: Run) -> Verification:
    """Verify this rank's part of the token files in the background, until `stack` ends."""
    world = run.world
    verification = Verification(run.data.token_files, run.path / "logs" / "verified", world.rank, world.size)

    def end() -> None:
        if (left := verification.end()) and verification.failure is None:
            names = list_some([str(file.prefix) for file in left])
            run.logger.info(f"ended before token files were verified ({names}); titanlite data verify does it")

    world.run_on_all_ranks(verification.begin)
    stack.callback(end)
    return verification


@contextmanager
def _status(folder: RunFolder, progress: Progress) -> Iterator[None]:
    """Keep `status.json` true: running now, and at the end how it ended."""
    folder.write_status("running", progress.step)
    try:
        yield
    except BaseException as error:
        code, reason = 1, f"{type(error).__name__}: {error}"
        if isinstance(error, TitanliteError):
            code, reason = error.exit_code, str(error)
        folder.write_status("stopped" if isinstance(error, StoppedEarly) else "failed", progress.step, code, reason)
        raise
    folder.write_status("done", progress.step, EXIT_DONE)
