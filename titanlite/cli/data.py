"""`titanlite data`: texts into token files, and a look at what runs read of them. A table of commands; no torch."""

from __future__ import annotations

import argparse

from titanlite.cli.audit import add_audit_command
from titanlite.cli.prepare import add_prepare_commands
from titanlite.cli.show import add_show_command
from titanlite.corpus.train_tokenizer import add_train_tokenizer_command
from titanlite.errors import EXIT_DONE


def main(argv: list[str]) -> int:
    """The command; see `titanlite data --help`."""
    parser = argparse.ArgumentParser(prog="titanlite data", description="Make token files, and look at what runs read.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_prepare_commands(commands)
    add_train_tokenizer_command(commands)
    add_show_command(commands)
    add_audit_command(commands)
    arguments = parser.parse_args(argv)
    arguments.action(arguments)
    return EXIT_DONE
