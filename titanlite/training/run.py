"""One run of a checked recipe: process group, run folder, trainer, and the records of how it ended."""

from __future__ import annotations

import platform
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial

from titanlite.corpus.tokenizers import FOLDER
from titanlite.errors import OtherRankFailed, TitanliteError, WorkerKilled
from titanlite.files import cause
from titanlite.models.attention.kernels import attention_kernels, kernel_in_use
from titanlite.models.spec import spec_of
from titanlite.observe.logger import RunLogger
from titanlite.observe.run_folder import GO_ON, RunFolder, Start
from titanlite.parallel.world import explain_full_memory, is_peer_failure, join_world
from titanlite.plan.describe import describe_model, describe_run
from titanlite.plan.kernels import attends_by_lengths, describe_attention
from titanlite.plan.launch import launch_environment, torchrun_environment
from titanlite.plan.layout import active_ranks
from titanlite.precision.casting import compute_dtype
from titanlite.recipe.load import LoadedRecipe
from titanlite.recipe.paths import expand
from titanlite.resilience import crashes
from titanlite.resilience.rank_table import HangReport
from titanlite.resilience.watchdog import Watchdog, log_path
from titanlite.text import format_count, pluralize
from titanlite.training import setup
from titanlite.training.progress import Progress
from titanlite.training.setup import Run
from titanlite.training.trainer import Trainer


def train(loaded: LoadedRecipe, start: Start = GO_ON) -> None:
    """Run a checked recipe to its end. Raises `TitanliteError` of the type that says how else it ended."""
    recipe, timeout = loaded.recipe, loaded.recipe.parallel.timeout_seconds
    path = expand(recipe.run.output_dir) / recipe.run.name
    opened = setup.try_to_open_data(recipe)
    progress = Progress()
    with ExitStack() as stack:
        active = active_ranks(recipe, launch_environment().size)
        world = stack.enter_context(join_world(recipe.run.deterministic, timeout, active))
        world.run_on_all_ranks(partial(_raise, opened.exception()))  # all end with the error of any
        stack.enter_context(attention_kernels(recipe.kernels.attention, world.device))
        data, notes = opened.result()
        logger = stack.enter_context(closing(RunLogger()))
        # No rank looks for checkpoints before the first one has locked and cleared the folder.
        folder, start, attempt = setup.lock_run_folder(stack, world, loaded, path, start, logger, progress)
        checkpoints, snapshots = setup.open_checkpoints(recipe, path, world, logger, folder)
        run = Run(recipe, loaded.text, world, data, checkpoints, logger, start, attempt, progress, snapshots)
        progress.under_way = setup.find_latest_step(run) + 1, None
        watched = recipe.resilience.watchdog_seconds, path / "logs", world
        run.watchdog = Watchdog(*watched, lambda: progress.step, partial(_record_hang, run, folder))
        with _crashes_recorded(run), run.watchdog, explain_full_memory():
            with run.watchdog.during("starting"):
                run.read_log = stack.enter_context(closing(setup.open_read_log(run)))
                run.verification = setup.begin_verification(stack, run)
                trainer = Trainer(run)
                hosts = world.run_on_all_ranks(platform.node)
                if folder is not None:
                    _begin(run, folder, hosts, notes)
            begun_at = progress.step
            trainer.train()
            logger.info(_end_in_words(run, begun_at))


def _raise(error: BaseException | None) -> None:
    if error is not None:
        raise error


def _describe_crash(run: Run, kind: str, message: str, stack: str) -> crashes.Crash:
    """The record of a failure on this rank, in the step that is under way."""
    (step, first), under = run.progress.under_way, torchrun_environment()
    return crashes.Crash(
        attempt=run.attempt,
        restart=under.restarts if under else 0,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        step=step,
        samples=(first, first + run.recipe.training.global_batch - 1) if first is not None else (),
        rank=run.world.rank,
        ranks=run.world.size,
        host=platform.node(),
        kind=kind,
        message=message,
        traceback=stack,
        recipe=crashes.digest(run.recipe_text),
    )


def _record_hang(run: Run, folder: RunFolder | None, step: int, report: HangReport) -> None:
    """What each rank's watchdog does last. The trainer's thread hangs: it does not write meanwhile."""
    if folder is not None:
        folder.write_status("failed", step, TitanliteError.exit_code, report.reason)
        run.logger.event(step, "hung", report.reason)
    stacks = f"the stacks of all threads are in {log_path(run.path / 'logs', report.rank)}"
    hang = _describe_crash(run, "Hang", report.reason, stacks)
    _record_crash(run, replace(hang, rank=report.rank, host=report.host))


def _record_crash(run: Run, crash: crashes.Crash) -> None:
    """Leave a record; what cannot be written is printed, since the disk may be what failed."""
    folder = run.path / crashes.FOLDER
    try:
        crashes.record(folder, crash)
    except OSError as error:
        problem = f"cannot write {folder}: {cause(error, folder)}."
        print(f"{problem} This crash does not count for resilience.max_crashes.", file=sys.stderr)


@contextmanager
def _crashes_recorded(run: Run) -> Iterator[None]:
    """Leave a record of what fails on this rank alone, so that the next start can tell a step that fails again and
    again; what failed because another rank did becomes one line. Raises `OtherRankFailed` for that.
    """
    try:
        yield
    except Exception as error:
        failed = _describe_crash(run, type(error).__name__, str(error), traceback.format_exc())
        # A user's mistake that shows before the first step begins is not a step that fails.
        if isinstance(error, WorkerKilled) or (
            isinstance(error, TitanliteError) and (error.on_all_ranks or not failed.samples)
        ):
            raise
        if failed.ranks > 1 and is_peer_failure(error):
            records = run.path / crashes.FOLDER
            raise OtherRankFailed(crashes.root_cause(records, failed.attempt, failed.rank, error)) from error
        _record_crash(run, failed)
        raise


def _begin(run: Run, folder: RunFolder, hosts: list[str], notes: list[str]) -> None:
    """Open the files that rows go to, and print what starts; `hosts` are the ranks' machines."""
    step, logger, recipe, data = run.progress.step, run.logger, run.recipe, run.data
    logger.open_sinks(recipe, folder.path, step)
    folder.keep(FOLDER, data.tokenizer.files)
    folder.settle(step)
    facts = describe_run(recipe, run.world.size)
    logger.info(
        f"{folder.path}: {describe_model(facts)}, {format_count(facts['parameters'])} parameters, {facts['steps']} "
        f"steps of {facts['global_batch']} x {facts['sequence_length']} tokens, {recipe.precision.compute} on "
        f"{run.world.size} x {run.world.device.type}; trains on {format_count(data.train.tokens)} tokens, "
        f"{data.train.windows} sequences an epoch"
    )
    for line in notes:
        logger.info(line)
    spec, dtype = spec_of(recipe.model.preset), compute_dtype(recipe.precision)
    kernel = kernel_in_use(spec.configure(recipe.model), dtype, run.world.device, attends_by_lengths(recipe))
    logger.info(f"attention: {describe_attention(recipe)}; by {kernel}")
    if facts["float8"] is not None:
        logger.info(f"float8 ({facts['float8']['recipe']}): {facts['float8']['summary']}")
    logger.event(step, "started", _start_in_words(folder, hosts))
    if folder.resumed:
        samples, (old, new) = run.progress.samples, folder.changes.get("data.skip_steps", ((), ()))
        late = [batch for batch in new if batch not in old and batch <= samples // recipe.training.global_batch]
        if late:
            logger.info(f"data.skip_steps: no effect of {late}: the run is past them, at sample {samples}.")
        changed = "".join(f"; {key}: {old!r} -> {new!r}" for key, (old, new) in folder.changes.items())
        logger.event(step, "resumed", f"from {folder.path}{changed}")


def _start_in_words(folder: RunFolder, hosts: list[str]) -> str:
    """Which start of the run this is, on what, after what."""
    under, machines = torchrun_environment(), sorted(set(hosts))
    restart = f" (restart {under.restarts} by torchrun)" if under else ""
    ranks = f"{pluralize(len(hosts), 'rank')} on {', '.join(machines[:8])}{' …' if len(machines) > 8 else ''}"
    standby = launch_environment().size - len(hosts)
    waiting = f", {standby} standing by" if standby else ""
    last = f"; the last one: {end}" if (end := folder.last_end()) else ""
    return f"start {folder.attempt} of this run{restart}, {ranks}{waiting}{last}"


def _end_in_words(run: Run, begun_at: int) -> str:
    """What is there at the end, and what to do with it."""
    it, steps, loss = shlex.quote(str(run.path)), run.total_steps, run.progress.validation_loss
    if begun_at == steps:
        key = "training.steps" if run.recipe.training.tokens is None else "training.tokens"
        return (
            f"nothing is left to train: {run.path} has taken all of its {pluralize(steps, 'step')}. To train on, raise "
            f"{key} and add --allow-change {key}; or give a new run another run.name and --checkpoint.warm_start={it}"
        )
    validated = "" if loss is None else f", validation loss {loss:.4f}"
    return (
        f"done: {pluralize(steps, 'step')}{validated}; the checkpoint is {run.checkpoints.path(steps)}. Next: "
        f"titanlite generate {it} --prompt TEXT, or titanlite checkpoint export-hf {it} FOLDER"
    )
