"""What torchrun starts: recipe, process group, run folder, trainer, and the exit code that says how it ended.

`python -m titanlite.train RECIPE [--section.key=value …] [--resume|--fresh] [--force]`, alone or under torchrun.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from titanlite.check import checked
from titanlite.cli import run_command
from titanlite.describe import checkpoint_bytes, describe
from titanlite.errors import EXIT_DONE, EXIT_STOPPED_EARLY, StoppedEarly, TitanliteError
from titanlite.launch import end_process, launched
from titanlite.recipe.load import LoadedRecipe, load_recipe, parse_with_overrides

if TYPE_CHECKING:
    from titanlite.observe.journal import Journal
    from titanlite.observe.run_folder import Mode, RunFolder
    from titanlite.trainer import Trainer


def main(argv: list[str]) -> int:
    """`titanlite train`. The recipe is proved before torch is imported: a wrong one is refused at once."""
    parser = argparse.ArgumentParser(
        prog="titanlite train",
        usage="titanlite train RECIPE [--section.key=value ...] [--resume | --fresh [--force]] [--traceback]",
        description="Train a recipe; goes on from the latest checkpoint if the run folder has one.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="recipe file (TOML)")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--resume", action="store_true", help="go on with an existing run; fail if there is none")
    modes.add_argument("--fresh", action="store_true", help="start a new run; fail if the folder holds one")
    parser.add_argument("--force", action="store_true", help="with --fresh: delete the run that the folder holds")
    arguments, overrides = parse_with_overrides(parser, argv)
    loaded = load_recipe(arguments.recipe, overrides)
    warnings = checked(loaded, launched().size)
    if launched().is_first:
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
    train(loaded, "resume" if arguments.resume else "fresh" if arguments.fresh else "auto", arguments.force)
    return EXIT_DONE


def train(loaded: LoadedRecipe, mode: Mode = "auto", force: bool = False) -> None:
    """Run a checked recipe to its end. Raises `TitanliteError` of the type that says how else it ended."""
    from titanlite.checkpoint.manager import CheckpointManager
    from titanlite.data.splits import open_data
    from titanlite.observe.console import LogFile, open_console
    from titanlite.observe.journal import Journal
    from titanlite.observe.run_folder import open_run_folder
    from titanlite.parallel.layout import total_steps
    from titanlite.parallel.world import full_memory_explained, joined_world
    from titanlite.trainer import Trainer

    recipe = loaded.recipe
    path = Path(recipe.run.output_dir) / recipe.run.name
    validated = recipe.validation.every_steps > 0
    data = open_data(recipe.data, recipe.training.sequence_length, recipe.run.seed, validated=validated)
    with ExitStack() as stack:
        world = stack.enter_context(joined_world(recipe.run.deterministic, recipe.parallel.timeout_seconds))
        journal = Journal()
        stack.callback(journal.close)
        steps = total_steps(recipe.training)
        checkpoints = CheckpointManager(
            path / "checkpoints",
            recipe.checkpoint.keep_last or None,
            journal.say,
            world.rank,
            world.size,
            keep_every=recipe.checkpoint.keep_every,
        )
        trainer: Trainer | None = None
        if world.is_first:
            journal.add_console(open_console(sys.stdout, steps, recipe.run.name))
            folder = open_run_folder(path, recipe, loaded.text, mode, force, journal.say)
            stack.callback(folder.close)
            stack.enter_context(_status(folder, lambda: 0 if trainer is None else trainer.step))
            journal.add_console(LogFile(folder.logs / "console.log", steps))
            folder.require_space(checkpoint_bytes(recipe), "a checkpoint of this model")
            checkpoints.prepare()
        world.wait_for_all()  # nobody looks for checkpoints before the first rank has locked and cleared the folder
        with full_memory_explained():
            trainer = Trainer(recipe, loaded.text, world, data, checkpoints, journal)
            if world.is_first:
                _begin(journal, folder, trainer)
            trainer.run()


def _begin(journal: Journal, folder: RunFolder, trainer: Trainer) -> None:
    """Open the files that rows go to, and say what starts."""
    from titanlite.observe.sinks import JsonlSink, TensorBoardSink
    from titanlite.recipe.units import format_count

    journal.add(JsonlSink(folder.metrics, trainer.step, journal.say))
    if trainer.recipe.metrics.tensorboard:
        journal.add(TensorBoardSink(folder.tensorboard, trainer.step, journal.say))
    folder.write_status("running", trainer.step)
    run = describe(trainer.recipe, trainer.world.size)
    journal.say(
        f"{folder.path}: {run['preset']}, {format_count(run['parameters'])} parameters, {run['steps']} steps of "
        f"{run['global_batch']} x {run['sequence_length']} tokens, {trainer.recipe.precision.compute} on "
        f"{trainer.world.size} x {trainer.world.device.type}; trains on {format_count(len(trainer.data.train.stream))} "
        f"tokens, {trainer.data.train.windows} sequences an epoch"
    )
    if folder.resumed:
        changed = "".join(f"; {key}: {old!r} -> {new!r}" for key, (old, new) in folder.changes.items())
        journal.event(trainer.step, "resumed", f"from {folder.path}{changed}")


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


def _told_to_launcher(code: int) -> int:
    """The exit code for whoever started this process; torchrun takes anything but 0 for a failure to restart from."""
    told = os.environ.get("TITANLITE_EXIT_CODE_FILE")
    if told:
        with open(told, "a") as file:  # one short line of each rank, in the order they end: see scripts/train.sh
            file.write(f"{code}\n")
    planned = code == EXIT_STOPPED_EARLY and "TORCHELASTIC_RUN_ID" in os.environ
    return EXIT_DONE if planned else code


if __name__ == "__main__":
    end_process(_told_to_launcher(run_command(main, sys.argv[1:])))
