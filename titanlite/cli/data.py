"""`titanlite data`: texts into token files, and a look at what runs read of them. No torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from titanlite.cli.reads import add_read_commands
from titanlite.corpus.train_tokenizer import add_train_tokenizer_command
from titanlite.errors import EXIT_DONE, UsageError
from titanlite.recipe.paths import input_argument, path_argument, text_argument
from titanlite.text import format_bytes, format_count

if TYPE_CHECKING:
    from titanlite.corpus.token_file import TokenInfo


def main(argv: list[str]) -> int:
    """The command; see `titanlite data --help`."""
    parser = argparse.ArgumentParser(prog="titanlite data", description="Make token files, and look at what runs read.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add_commands in (_add_prepare_commands, add_train_tokenizer_command, add_read_commands):
        add_commands(commands)
    arguments = parser.parse_args(argv)
    arguments.action(arguments)
    return EXIT_DONE


def _add_prepare_commands(commands: Any) -> None:
    line = "tokenize texts into PREFIX.bin, .idx and .json; started again after a kill, it goes on"
    command = commands.add_parser("prepare", help=line, description=line, allow_abbrev=False)
    command.set_defaults(action=_prepare)
    command.add_argument("inputs", nargs="+", type=input_argument, metavar="INPUT",
                         help="text, .jsonl (both also .gz, .zst), .parquet, .arrow: files, folders, globs; or a "
                              "folder that a Hugging Face dataset was saved to")  # fmt: skip
    command.add_argument("--out", type=path_argument, required=True, metavar="PREFIX", help="where; no suffix")
    command.add_argument("--tokenizer", type=text_argument, default="bytes", help="as data.tokenizer in a recipe")
    command.add_argument("--separator", help="as data.separator in a recipe")
    command.add_argument("--special-token", action="append", default=[], metavar="TOKEN",
                         help="one of data.special_tokens in a recipe; can be given several times")  # fmt: skip
    command.add_argument("--text-key", default="text", help="JSONL field, or column, that holds the text")
    command.add_argument("--workers", type=int, default=0, metavar="N", help="processes; as many as cores if not given")
    command.add_argument("--dedup", action="store_true", help="drop documents that are equal to an earlier one")
    command.add_argument("--bad-lines", choices=("stop", "skip"), default="stop",
                         help="lines and rows without a text: stop at the first, or count them")  # fmt: skip
    command.add_argument("--held-out", type=float, default=0.0, metavar="PERCENT",
                         help="share of the documents for PREFIX-validation, by a hash of their names, as "
                              "data.validation_percent chooses them")  # fmt: skip
    command.add_argument("--force", action="store_true", help="overwrite what PREFIX is now, once the new one is done")
    command.add_argument("--json", action="store_true", help="print the sidecars instead of a table")
    line = "read token files from end to end, and name those that are damaged"
    command = commands.add_parser("verify", help=line, description=line, allow_abbrev=False)
    command.set_defaults(action=_verify)
    command.add_argument("prefixes", nargs="+", type=path_argument, metavar="PREFIX", help="of titanlite data prepare")


def _prepare(arguments: argparse.Namespace) -> None:
    from titanlite.corpus.prepare import find_inputs, prepare
    from titanlite.corpus.token_file import paths_of
    from titanlite.corpus.tokenizers import describe_separator, open_tokenizer, separator_warning
    from titanlite.corpus.units import Request
    from titanlite.corpus.workers import cores

    if not 0 <= arguments.held_out < 100:
        raise UsageError("--held-out must be a percentage from 0 to below 100.")
    if arguments.workers < 0:
        raise UsageError("--workers must be at least 1.")
    paths_of(arguments.out)  # refuses a folder
    special = tuple(arguments.special_token)
    tokenizer = open_tokenizer(arguments.tokenizer, arguments.separator, special)
    print(f"documents are separated by {describe_separator(tokenizer)}", file=sys.stderr)
    if finding := separator_warning(tokenizer, arguments.separator):
        print(f"warning: {finding.problem} give --separator.", file=sys.stderr)
    request = Request(
        inputs=tuple(arguments.inputs),
        out=arguments.out,
        tokenizer=arguments.tokenizer,
        separator=arguments.separator,
        special_tokens=special,
        fingerprint=tokenizer.fingerprint,
        text_key=arguments.text_key,
        held_out_percent=arguments.held_out,
        skip_bad_lines=arguments.bad_lines == "skip",
        drop_duplicates=arguments.dedup,
        workers=arguments.workers or cores(),
        force=arguments.force,
    )
    made = prepare(request, find_inputs(request.inputs, request.text_key), tokenizer)
    if arguments.json:
        print(json.dumps({str(prefix): info.model_dump() for prefix, info in made.items()}, indent=1))
        return
    for prefix, info in made.items():
        print(f"{prefix}: {format_count(info.tokens)} tokens, {format_bytes(info.bin_bytes + info.idx_bytes)}")
        print("\n".join(f"  {line}" for line in describe_token_info(info)))


def _verify(arguments: argparse.Namespace) -> None:
    from titanlite.corpus.token_file import TokenFile

    for prefix in arguments.prefixes:
        file = TokenFile.open(prefix)
        if file.info is None:
            raise UsageError(f"{prefix}.json: missing; without it nothing is known that could be verified.")
        file.verify_hashes()
        print(f"{prefix}: whole: {file.documents:,} documents, {len(file.tokens):,} tokens")


def describe_token_info(info: TokenInfo) -> Iterator[str]:
    """The statistics, for people."""
    yield f"documents        {info.documents:,}"
    yield f"tokens           {info.tokens:,} as {info.dtype}, separators among them"
    yield f"bytes per token  {info.text_bytes / info.tokens:.3f}"
    yield f"lengths          {', '.join(f'{name} {count:,}' for name, count in info.lengths.items())}"
    if info.duplicates:
        yield f"duplicates       {info.duplicates:,} dropped"
    if info.bad_lines:
        yield f"bad lines        {info.bad_lines:,} skipped"
        yield from (f"  {line}" for line in info.bad_line_examples)
    if (more := info.bad_lines - len(info.bad_line_examples)) > 0:
        yield f"  and {more:,} more"
