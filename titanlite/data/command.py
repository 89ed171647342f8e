"""`titanlite data`: texts into token files, and a look at what is in them. A table of commands; no torch."""

from __future__ import annotations

import argparse

from titanlite.data.prepare_command import add_prepare_commands
from titanlite.data.train_tokenizer import add_train_tokenizer_command
from titanlite.errors import EXIT_DONE


def main(argv: list[str]) -> int:
    """The command; see `titanlite data --help`."""
    parser = argparse.ArgumentParser(prog="titanlite data", description="Make token files, and look after them.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_prepare_commands(commands)
    add_train_tokenizer_command(commands)
    arguments = parser.parse_args(argv)
    arguments.action(arguments)
    return EXIT_DONE
