"""One run of a checked recipe: process group, run folder, trainer, and the records of how it ended."""

from __future__ import annotations

import platform
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titanlite.errors import (
    EXIT_DONE,
    OtherRankFailed,
    StoppedEarly,
    TitanliteError,
    WorkerKilled,
)
from titanlite.files import cause
from titanlite.observe.run_folder import GO_ON, RunFolder, Start
from titanlite.plan.describe import describe_model, describe_run
from titanlite.plan.launch import launch_environment, torchrun_environment
from titanlite.plan.layout import active_ranks, batch_plan, require_layout, sample_schedule, total_steps
from titanlite.plan.memory import checkpoint_bytes
from titanlite.recipe.load import LoadedRecipe
from titanlite.recipe.paths import expand
from titanlite.recipe.sections import Recipe
from titanlite.resilience import crashes
from titanlite.text import pluralize

if TYPE_CHECKING:
    from titanlite.checkpoint.ranks import Ranks
    from titanlite.corpus.verification import Verification
    from titanlite.data.splits import DataSplits
    from titanlite.observe.logger import RunLogger
    from titanlite.parallel.world import World
    from titanlite.resilience.watchdog import Hang
    from titanlite.training.trainer import Trainer


def train(loaded: LoadedRecipe, start: Start = GO_ON) -> None:
    """Run a checked recipe to its end. Raises `TitanliteError` of the type that says how else it ended."""
    from titanlite.checkpoint.manager import CheckpointManager, Retention
    from titanlite.checkpoint.ranks import Ranks, new_ranks
    from titanlite.checkpoint.snapshots import Snapshots, forget
    from titanlite.data.read_log import ReadLog, last_start, log_path
    from titanlite.observe.logger import RunLogger
    from titanlite.parallel.world import explain_full_memory, join_world
    from titanlite.resilience.watchdog import Watchdog
    from titanlite.training.trainer import Trainer

    recipe = loaded.recipe
    path = expand(recipe.run.output_dir) / recipe.run.name
    records = path / "logs" / "crashes"
    opened_data = _open_data_or_error(recipe)
    with ExitStack() as stack:
        active = active_ranks(recipe, launch_environment().size)
        world = stack.enter_context(join_world(recipe.run.deterministic, recipe.parallel.timeout_seconds, active))
        ranks = Ranks(world.rank, world.size)
        data, reading = _agreed(ranks, opened_data)
        logger = RunLogger()
        stack.callback(logger.close)

        def require_own() -> None:
            if folder is not None:
                folder.require_own()

        section = recipe.checkpoint
        checkpoints = CheckpointManager(
            path / "checkpoints",
            logger.info,
            new_ranks(world.rank, world.size, recipe.parallel.timeout_seconds),
            Retention(section.keep_last, section.keep_every, section.keep_best),
            background=section.mode == "async",
            max_failures=section.max_failures,
            require_own=require_own,
        )
        every = recipe.resilience.snapshot_every
        snapshots = (
            Snapshots(
                expand(recipe.resilience.snapshot_dir),
                checkpoints.folder,
                logger.info,
                new_ranks(world.rank, world.size, recipe.parallel.timeout_seconds),
                background=section.mode == "async",
                require_own=require_own,
            )
            if every
            else None
        )
        trainer: Trainer | None = None
        folder: RunFolder | None = None

        job = ranks.run_on_all_ranks(lambda: start.job, lambda jobs: sorted({name for names in jobs for name in names}))

        def opened() -> list[Any]:
            nonlocal folder
            asked = replace(start, job=tuple(job))
            folder = _opened(stack, loaded, path, asked, logger, lambda: 0 if trainer is None else trainer.step)
            folder.attempt = max(folder.attempt, 1 + max(crashes.attempts(records), default=0), 1 + last_start(path))
            checkpoints.prepare()
            if snapshots is None:
                forget(checkpoints.folder)
            crashes.refuse_loop(records, recipe.resilience.max_crashes, checkpoints.latest() or 0, loaded.text)
            begun = folder.start
            return [folder.attempt, begun.mode, begun.step, begun.restarted]

        # Nobody looks for checkpoints before the first rank has locked and cleared the folder. It also says what is to
        # be done: a machine that has just come does not know what the job's earlier starts did.
        attempt, mode, step, restarted = ranks.run_on_rank0(opened)

        def under_way() -> tuple[int, int | None]:
            return trainer.under_way if trainer else ((checkpoints.latest() or 0) + 1, None)

        crash = partial(_crash, attempt, world, loaded, under_way)
        on_hang = partial(_record_hang, logger, folder, records, crash)
        watchdog = Watchdog(recipe.resilience.watchdog_seconds, path / "logs", world.rank, world.size, on_hang)
        with _failures_recorded(records, crash), watchdog, explain_full_memory():
            own = replace(start, mode=mode, step=step, restarted=restarted)
            if start.mode != "auto" and (mode, step) != (start.mode, start.step):
                logger.info("--fresh, --resume and --from-step were for the first start of this job; this one goes on.")
            layout = require_layout(recipe.parallel, world.size)
            coordinates = layout.coordinates(world.rank)
            plan = batch_plan(recipe, layout, coordinates.data)
            own_log = log_path(path, plan.data_rank) if coordinates.is_batch_leader else None
            read_log = ReadLog(own_log, plan, attempt, logger.info)
            stack.callback(read_log.close)
            trainer = Trainer(
                recipe, loaded.text, world, data, checkpoints, logger, own, watchdog, snapshots, read_log,
                _verification(stack, data, path, ranks, logger),
            )  # fmt: skip
            hosts = ranks.run_on_all_ranks(platform.node, lambda hosts: hosts)
            _run(logger, folder, trainer, hosts, reading)


def _run(logger: RunLogger, folder: RunFolder | None, trainer: Trainer, hosts: list[str], reading: list[str]) -> None:
    """Train to the end; the first rank, which has the `folder`, prints how it begins and how it has ended."""
    if folder is not None:
        _begin(logger, folder, trainer, hosts, reading)
    begun_at = trainer.step
    trainer.run()
    if folder is not None:
        logger.info(_end_in_words(folder.path, trainer, begun_at))


def _end_in_words(path: Path, trainer: Trainer, begun_at: int) -> str:
    """What is there at the end, and what to do with it."""
    run, steps = shlex.quote(str(path)), trainer.total_steps
    if begun_at == steps:
        key = "training.steps" if trainer.recipe.training.tokens is None else "training.tokens"
        return (
            f"nothing is left to train: {path} has taken all of its {pluralize(steps, 'step')}. To train on, raise "
            f"{key} and add --allow-change {key}; or give a new run another run.name and --checkpoint.warm_start={run}"
        )
    loss = "" if trainer.validation_loss is None else f", validation loss {trainer.validation_loss:.4f}"
    return (
        f"done: {pluralize(steps, 'step')}{loss}; the checkpoint is {trainer.checkpoints.path(steps)}. Next: "
        f"titanlite generate {run} --prompt TEXT, or titanlite checkpoint export-hf {run} FOLDER"
    )


def _open_data_or_error(recipe: Recipe) -> tuple[DataSplits, list[str]] | TitanliteError:
    try:
        return open_run_data(recipe)
    except TitanliteError as error:
        return error


def _agreed(ranks: Ranks, opened: tuple[DataSplits, list[str]] | TitanliteError) -> tuple[DataSplits, list[str]]:
    """The data, once all ranks have theirs; else all raise the error of one, so that none waits and torchrun does not
    start them again.
    """

    def require() -> None:
        if isinstance(opened, TitanliteError):
            raise opened

    ranks.run_on_all_ranks(require)
    assert not isinstance(opened, TitanliteError)
    return opened


def open_run_data(recipe: Recipe) -> tuple[DataSplits, list[str]]:
    """The run's data, and what is to be said of it. Raises `DataError`, also where it does not suffice."""
    from titanlite.corpus.tokenized import texts_folder
    from titanlite.corpus.tokenizers import describe_separator
    from titanlite.data.splits import open_data, require_samples
    from titanlite.data.survey import shared_texts

    data = open_data(
        recipe.data,
        recipe.training.sequence_length,
        recipe.run.seed,
        validated=recipe.validation.every_steps > 0,
        texts_folder=texts_folder(recipe.run),
    )
    reading = require_samples(data.train, sample_schedule(recipe).end_sample(total_steps(recipe.training)))
    if launch_environment().is_first:
        reading += [f"warning: {finding}" for finding in shared_texts(recipe.data)]
    return data, [*reading, f"documents are separated by {describe_separator(data.tokenizer)}"]


def _verification(stack: ExitStack, data: DataSplits, path: Path, ranks: Ranks, logger: RunLogger) -> Verification:
    """That of this rank's part of the token files, under way until `stack` ends."""
    from titanlite.corpus.verification import Verification
    from titanlite.resilience.corruption import list_some

    verification = Verification(data.token_files, path / "logs" / "verified", ranks.rank, ranks.size)

    def end() -> None:
        if (left := verification.end()) and verification.failure is None:
            names = list_some([str(file.prefix) for file in left])
            logger.info(f"ended before token files were verified ({names}); titanlite data verify does it")

    ranks.run_on_all_ranks(verification.begin)
    stack.callback(end)
    return verification


def _opened(
    stack: ExitStack,
    loaded: LoadedRecipe,
    path: Path,
    start: Start,
    logger: RunLogger,
    step: Callable[[], int],
) -> RunFolder:
    """The run's folder, this process's until `stack` ends, with its console and its `status.json`."""
    from titanlite.observe.console import LogFile, open_console
    from titanlite.observe.run_folder import open_run_folder

    recipe, steps = loaded.recipe, total_steps(loaded.recipe.training)
    logger.add_console(open_console(sys.stdout, steps, recipe.run.name))
    folder = open_run_folder(path, recipe, loaded.text, start, logger.info)
    stack.callback(folder.close)
    stack.enter_context(_status(folder, step))
    logger.add_console(LogFile(folder.logs / "console.log", steps))
    folder.require_space(checkpoint_bytes(recipe), "a checkpoint of this model")
    return folder


def _crash(
    attempt: int,
    world: World,
    loaded: LoadedRecipe,
    under_way: Callable[[], tuple[int, int | None]],
    kind: str,
    message: str,
    traceback: str,
) -> crashes.Crash:
    """What fails on this rank; `under_way`: the step to put it down to, and its first sample if it had begun."""
    (step, first), under = under_way(), torchrun_environment()
    return crashes.Crash(
        attempt=attempt,
        restart=under.restarts if under else 0,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        step=step,
        samples=(first, first + loaded.recipe.training.global_batch - 1) if first is not None else (),
        rank=world.rank,
        ranks=world.size,
        host=platform.node(),
        kind=kind,
        message=message,
        traceback=traceback,
        recipe=crashes.digest(loaded.text),
    )


@contextmanager
def _failures_recorded(records: Path, crash: Callable[[str, str, str], crashes.Crash]) -> Iterator[None]:
    """Leave a record of what fails on this rank alone; what failed because another rank did becomes one line.

    Raises `OtherRankFailed` for the other's failure.
    """
    from titanlite.parallel.world import is_peer_failure

    try:
        yield
    except Exception as error:
        failed = crash(type(error).__name__, str(error), traceback.format_exc())
        # What is wrong before the first step begins is said to who can mend it, and is no step that fails.
        if isinstance(error, WorkerKilled) or (
            isinstance(error, TitanliteError) and (error.on_all_ranks or not failed.samples)
        ):
            raise
        if failed.ranks > 1 and is_peer_failure(error):
            raise OtherRankFailed(crashes.root_cause(records, failed.attempt, failed.rank, error)) from error
        _record(records, failed)
        raise


def _record(records: Path, crash: crashes.Crash) -> None:
    """Leave a record; what cannot be written is printed, since the disk may be what failed."""
    try:
        crashes.record(records, crash)
    except OSError as error:
        said = f"cannot write {records}: {cause(error, records)}. This crash does not count for resilience.max_crashes."
        print(said, file=sys.stderr)


def _begin(logger: RunLogger, folder: RunFolder, trainer: Trainer, hosts: list[str], reading: list[str]) -> None:
    """Open the files that rows go to, and say what starts; `hosts` are the ranks' machines, `reading` says how often
    the data is read.
    """
    from titanlite.corpus.tokenizers import FOLDER
    from titanlite.text import format_count

    logger.open_sinks(trainer.recipe, folder.path, trainer.step)
    folder.keep(FOLDER, trainer.data.tokenizer.files)
    folder.settle(trainer.step)
    run = describe_run(trainer.recipe, trainer.world.size)
    logger.info(
        f"{folder.path}: {describe_model(run)}, {format_count(run['parameters'])} parameters, {run['steps']} steps of "
        f"{run['global_batch']} x {run['sequence_length']} tokens, {trainer.recipe.precision.compute} on "
        f"{trainer.world.size} x {trainer.world.device.type}; trains on {format_count(trainer.data.train.tokens)} "
        f"tokens, {trainer.data.train.windows} sequences an epoch"
    )
    for line in reading:
        logger.info(line)
    if run["float8"] is not None:
        logger.info(f"float8 ({run['float8']['recipe']}): {run['float8']['summary']}")
    logger.event(trainer.step, "started", _start_in_words(folder, hosts))
    if folder.resumed:
        old, new = folder.changes.get("data.skip_steps", ((), ()))
        late = [batch for batch in new if batch not in old and batch <= trainer.samples // trainer.plan.global_batch]
        if late:
            logger.info(f"data.skip_steps: no effect of {late}: the run is past them, at sample {trainer.samples}.")
        changed = "".join(f"; {key}: {old!r} -> {new!r}" for key, (old, new) in folder.changes.items())
        logger.event(trainer.step, "resumed", f"from {folder.path}{changed}")


def _record_hang(
    logger: RunLogger,
    folder: RunFolder | None,
    records: Path,
    crash: Callable[[str, str, str], crashes.Crash],
    hang: Hang,
) -> None:
    """What each rank's watchdog does last. The trainer's thread hangs: it does not write meanwhile."""
    if folder is not None:
        folder.write_status("failed", hang.step, TitanliteError.exit_code, hang.reason)
        logger.event(hang.step, "hung", hang.reason)
    ended = crash("Hang", hang.reason, f"the stacks of all threads are in {hang.stacks}")
    _record(records, replace(ended, rank=hang.rank, host=hang.host))


def _start_in_words(folder: RunFolder, hosts: list[str]) -> str:
    """Which start of the run this is, on what, after what."""
    under, machines = torchrun_environment(), sorted(set(hosts))
    restart = f" (restart {under.restarts} by torchrun)" if under else ""
    ranks = f"{pluralize(len(hosts), 'rank')} on {', '.join(machines[:8])}{' …' if len(machines) > 8 else ''}"
    standby = launch_environment().size - len(hosts)
    waiting = f", {standby} standing by" if standby else ""
    last = folder.last_end()
    return f"start {folder.attempt} of this run{restart}, {ranks}{waiting}" + (
        f"; the last one: {last}" if last else ""
    )


@contextmanager
def _status(folder: RunFolder, step: Callable[[], int]) -> Iterator[None]:
    """Keep `status.json` true: running now, and at the end how it ended."""
    folder.write_status("running", step())
    try:
        yield
    except StoppedEarly as stop:
        folder.write_status("stopped", step(), stop.exit_code, str(stop))
        raise
    except TitanliteError as error:
        folder.write_status("failed", step(), error.exit_code, str(error))
        raise
    except BaseException as error:
        folder.write_status("failed", step(), 1, f"{type(error).__name__}: {error}")
        raise
    folder.write_status("done", step(), EXIT_DONE)
