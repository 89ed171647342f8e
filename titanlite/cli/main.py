"""The `titanlite` command: a table of subcommands, each imported when it is called.

Also the one place where an error becomes a paragraph, and an exit code that the process's launcher understands.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from errno import EACCES, ENAMETOOLONG
from typing import NoReturn

from titanlite import __version__, errors
from titanlite.errors import EXIT_DONE, CommandLineError, StoppedEarly, TitanliteError
from titanlite.plan import launch
from titanlite.registry import Registry, did_you_mean, import_plugin
from titanlite.text import format_table

Command = Callable[[list[str]], int]

_AGENT_SECONDS = 3.0  # well above the interval at which torchrun's agents look for new ones (0.1 s)
HELP = {
    "train": "train a recipe (RECIPE [--section.key=value ...])",
    "check": "describe a run, and what is wrong with its recipe; explain a key",
    "verify": "prove that a layout computes what one process does, on your machines",
    "data": "tokenize texts into token files, and look after these",
    "checkpoint": "inspect, verify, compare, prune checkpoints; to and from Hugging Face",
    "generate": "continue a prompt with a trained model",
    "schema": "print the JSON schema of recipes, for editors",
}

COMMANDS = Registry("command", {name: f"titanlite.cli.{name}:main" for name in HELP})
ON_ALL_RANKS = ("train", "verify")  # of the others, the first process of a job runs the command


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `titanlite`; returns the exit code."""
    return run_command(dispatch, sys.argv[1:] if argv is None else argv)


def run_command(command: Command, argv: Sequence[str]) -> int:
    """Run `command(argv)`; an error that a user can cause becomes a paragraph on stderr and its exit code, other ones
    pass through. `--traceback` (taken out of `argv`) shows where it was raised."""
    return _run(command, argv)[0]


def _run(command: Command, argv: Sequence[str]) -> tuple[int, Exception | None]:
    """As `run_command`, with the error."""
    _let_printing_succeed()
    arguments = [word for word in argv if word != "--traceback"]
    try:
        code = command(arguments)
        sys.stdout.flush()
    except TitanliteError as error:
        if error.on_all_ranks and not launch.prints_for_all():
            return error.exit_code, error
        with suppress(OSError):  # the terminal may have gone: the exit code stays
            if len(arguments) < len(argv):
                traceback.print_exc()
            print(_paragraph(error), file=sys.stderr, flush=True)
        launch.mark_printed()
        return error.exit_code, error
    except SystemExit as exit_:  # how argparse ends --help and wrong usage
        return int(exit_.code or 0), None
    except KeyboardInterrupt:
        return 128 + 2, None  # as shells report a process ended by SIGINT
    except BrokenPipeError as error:
        # The interpreter flushes stdout once more at exit; let that go nowhere instead of failing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13, error  # as by SIGPIPE: who read our output has gone
    except OSError as error:
        if error.errno not in (EACCES, ENAMETOOLONG) or not error.filename:
            raise
        path = os.fsdecode(error.filename)[:200]
        print(f"error: {path}: {error.strerror}; give another path, or mend its permissions.", file=sys.stderr)
        return errors.UsageError.exit_code, error
    return code, None


def end_as_launched(command: Command, argv: list[str]) -> NoReturn:
    """Run `command(argv)`, and end this process with the exit code that torchrun, srun or a shell should see."""
    codes = os.environ.get("TITANLITE_EXIT_CODE_FILE")
    if codes and launch.torchrun_environment_or_none() and launch.launch_environment_or_default().local_rank == 0:
        open(codes, "w").close()  # what an earlier start left there is not how the run ended
    try:
        code, error = _run(command, argv)
    except Exception as mistake:  # ours: in one piece, for other ranks write here too
        sys.stderr.write(traceback.format_exc())
        code, error = 1, mistake
    launch.end_process(_launcher_exit_code(code, error))


def _launcher_exit_code(code: int, error: Exception | None) -> int:
    """The exit code for whoever started this process; torchrun takes anything but 0 for a failure to restart from."""
    codes = os.environ.get("TITANLITE_EXIT_CODE_FILE")
    if codes:
        with open(codes, "a") as file:  # one short line of each rank, in the order they end: see scripts/torchrun.sh
            file.write(f"{code}\n")
    under = launch.torchrun_environment_or_none()
    if under is None:
        return code
    if isinstance(error, StoppedEarly):
        left_alone = error.signalled and not error.received and under.agents > 1
        if left_alone:
            # The agent is about to signal its processes for a restart; if they end before, it takes the job for done.
            time.sleep(_AGENT_SECONDS)
        return code if left_alone and under.elastic else EXIT_DONE
    alike = error is None or (isinstance(error, TitanliteError) and error.on_all_ranks)
    if code in (errors.EXIT_RECIPE, errors.EXIT_GUARD) and alike and (codes or under.restarts_left > 0):
        if launch.launch_environment_or_default().is_first and under.restarts_left > 0:
            print(f"exit code {code}: a restart would not mend this, so torchrun makes none.", file=sys.stderr)
        return EXIT_DONE
    return code


def _let_printing_succeed() -> None:
    """A character that the terminal's encoding lacks is escaped, and a stream that is closed takes what it is given."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process lives
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _paragraph(error: TitanliteError) -> str:
    if isinstance(error, StoppedEarly):
        return str(error)
    if isinstance(error, errors.RecipeError) and len(error.findings) > 1:
        return f"error: {len(error.findings)} things are wrong with the recipe:\n{error}"
    return f"error: {error}"


def dispatch(argv: list[str]) -> int:
    """Run the command that `argv` names; its exit code. Raises `TitanliteError`."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else errors.UsageError.exit_code
    name, *arguments = argv
    if name == "--version":
        print(f"titanlite {__version__}")
        return 0
    if name not in COMMANDS:
        hint = did_you_mean(name, list(COMMANDS)) or f"the commands are {', '.join(COMMANDS)}."
        raise CommandLineError(f"titanlite has no command '{name}'; {hint}")
    if name not in ON_ALL_RANKS and not launch.launch_environment_or_default().is_first:
        return EXIT_DONE
    command: Command = COMMANDS.get(name)
    return command(_import_plugins(arguments))


def _import_plugins(arguments: list[str]) -> list[str]:
    """Import what `--plugins MODULES` names; the arguments without it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--plugins", action="append", default=[])
    try:
        found, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise CommandLineError(str(error)) from None
    for module in (name for names in found.plugins for name in names.split(",") if name):
        import_plugin(module)
    return rest


def _help() -> str:
    commands = "\n".join(f"  {line}" for line in format_table([*HELP.items()]))
    return f"""\
usage: titanlite COMMAND ... [--traceback]

LLM pre-training whose runs can be trusted.

{commands}

  titanlite COMMAND --help    the command's own arguments
  titanlite --version
  --plugins MODULE,...        import modules of yours first (docs/extend.md)
  --traceback                 show where an error was raised"""
