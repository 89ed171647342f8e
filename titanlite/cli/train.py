"""`titanlite train`: reads the command line, proves the recipe, and only then loads torch and trains."""

from __future__ import annotations

import fnmatch
import sys
from contextlib import suppress

from titanlite.cli.check import check_recipe
from titanlite.errors import EXIT_DONE, CommandLineError, TitanliteError
from titanlite.observe.run_folder import Mode, Start
from titanlite.plan.launch import launch_environment, torchrun_environment
from titanlite.plan.layout import active_ranks
from titanlite.recipe.explain import all_keys, suggest_key
from titanlite.recipe.load import RecipeParser, load_recipe, parse_with_overrides


def main(argv: list[str]) -> int:
    """`titanlite train`. The recipe is proved before torch is imported: a wrong one is refused at once."""
    usage = "[--resume | --fresh [--force] | --from-step N] [--allow-change KEY ...] [--traceback]"
    description = "Train a recipe; goes on from the latest checkpoint if the run folder has one."
    parser = RecipeParser("train", usage, description)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--resume", action="store_true", help="go on with an existing run; fail if there is none")
    modes.add_argument("--fresh", action="store_true", help="start a new run; fail if the folder holds one")
    modes.add_argument("--from-step", type=int, metavar="N", help="go on from the checkpoint of step N, not the latest")
    parser.add_argument("--force", action="store_true", help="with --fresh: delete the run that the folder holds")
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY", help="key that may change")
    arguments, overrides = parse_with_overrides(parser, argv)
    resumes = arguments.resume or arguments.from_step is not None
    mode: Mode = "resume" if resumes else "fresh" if arguments.fresh else "auto"
    under = torchrun_environment()
    restarted, job = (under.restarts > 0, under.names) if under else (False, ())
    may_change = tuple(arguments.allow_change)
    start = Start(mode, arguments.force, may_change, arguments.from_step, restarted=restarted, job=job)
    for pattern in may_change:
        if not fnmatch.filter(all_keys(), pattern):
            hint = suggest_key(pattern) or "give a key such as optimizer.lr, or a pattern such as 'optimizer.*'"
            raise CommandLineError(f"--allow-change {pattern}: there is no such recipe key; {hint}")
    if arguments.force and not arguments.fresh:
        raise CommandLineError("--force does nothing without --fresh, with which it deletes the run in the folder.")
    loaded, launch = load_recipe(arguments.recipe, overrides), launch_environment()
    warnings = check_recipe(loaded, launch.size)
    if launch.is_first:
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
    if launch.rank >= active_ranks(loaded.recipe, launch.size):
        from titanlite.parallel.world import stand_by
        from titanlite.training.setup import open_run_data

        with suppress(TitanliteError):  # the ranks that train fail with it, and end this one
            open_run_data(loaded.recipe)  # texts that one process tokenizes: all wait for them before they form a group
        return stand_by(loaded.recipe.parallel.timeout_seconds)
    from titanlite.training.run import train

    train(loaded, start)
    return EXIT_DONE
