"""`titanlite checkpoint`: look at checkpoints, prove them whole, compare two, delete old ones.

Only comparing and Hugging Face's folders need torch. What is printed may come from anybody's checkpoint: nothing of it
reaches a terminal raw.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from titanlite.checkpoint import storage
from titanlite.checkpoint.examine import (
    checkpoints_at,
    find_corruption,
    newest_at,
    raise_if_deleted,
    summary,
    unlisted_files,
)
from titanlite.checkpoint.format import step_of
from titanlite.cli.huggingface import add_huggingface_commands
from titanlite.errors import EXIT_DONE, CheckpointError, UsageError
from titanlite.files import cause
from titanlite.recipe.paths import path_argument
from titanlite.text import format_bytes, format_count, format_table

_A_PATH = "run folder, its checkpoints folder, or one step's folder"


def main(argv: list[str]) -> int:
    """The command; see `titanlite checkpoint --help`. Raises `CheckpointError` (exit code 4) for damage."""
    parser = argparse.ArgumentParser(prog="titanlite checkpoint", description="Look after checkpoints.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, action, line in (
        ("inspect", _inspect, "what a checkpoint (of a run: the newest) holds, and what wrote it"),
        ("verify", _verify, "check that checkpoints are whole; exit code 4 and the damaged files' names if not"),
        ("diff", _diff, "how far two checkpoints are apart, tensor by tensor"),
        ("prune", _prune, "delete old checkpoints of a run; damaged ones neither count nor go"),
    ):
        command = commands.add_parser(name, help=line, description=line, allow_abbrev=False)
        command.set_defaults(action=action)
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")
        if name == "diff":
            command.add_argument("a", type=path_argument, help=f"{_A_PATH} (of a run: the newest)")
            command.add_argument("b", type=path_argument, help="the other one")
            command.add_argument("--prefix", default="", help="only tensors of such names, such as model.")
        else:
            command.add_argument(
                "path", type=path_argument, help=_A_PATH if name != "prune" else "run or checkpoints folder"
            )
        if name == "verify":
            command.add_argument(
                "--deep", action="store_true", help="read every byte: compare the hashes, look for NaN"
            )
        if name == "prune":
            command.add_argument("--keep-last", type=int, required=True, metavar="K", help="keep the K newest")
            command.add_argument("--keep-every", type=int, default=0, metavar="N", help="and steps divisible by N")
            command.add_argument("--dry-run", action="store_true", help="say what would go, and delete nothing")
    add_huggingface_commands(commands)
    arguments = parser.parse_args(argv)
    arguments.action(arguments)
    return EXIT_DONE


def _inspect(arguments: argparse.Namespace) -> None:
    found = checkpoints_at(arguments.path)
    report = {**summary(found[-1]), "steps": [step_of(folder.name) for folder in found]}
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{report['path']}: step {report['step']}, {format_count(report['samples'])} samples, "
          f"{format_count(report['tokens'])} tokens")  # fmt: skip
    if len(found) > 1:
        print(f"steps        {', '.join(map(str, report['steps']))}")
    print(f"run          {_shown(report['run'] or 'unknown')}, {_shown(report['preset'] or 'unknown model')}, "
          f"{format_count(report['parameters'])} parameters")  # fmt: skip
    print(f"layout       {_in_words(report['layout'] or {}) or 'unknown'}")
    print(f"environment  {_in_words(report['environment'])}")
    if report["values"]:
        print(f"values       {_in_words(report['values'])}")
    print(f"size         {format_bytes(report['bytes'])} in {report['files']} files\n")
    rows = [
        (t["name"], t["dtype"], "x".join(map(str, t["shape"])) or "scalar", str(t["chunks"]), format_bytes(t["bytes"]))
        for t in report["tensors"]
    ]
    print("\n".join(format_table([("tensor", "dtype", "shape", "chunks", "size"), *rows])))


def _verify(arguments: argparse.Namespace) -> None:
    reports: list[dict[str, Any]] = []
    for folder in checkpoints_at(arguments.path):
        found = list(find_corruption(folder, arguments.deep))
        extra = [] if found else unlisted_files(folder)
        reports.append({"path": str(folder), "whole": not found, "damages": found, "not_listed": extra})
        if not arguments.json:
            checked = "sizes, headers, hashes and finite numbers" if arguments.deep else "sizes and headers"
            print(f"{folder}: {'damaged' if found else f'whole ({checked})'}")
        for name in extra:
            print(f"warning: {folder / name} is not in the manifest; loading ignores it", file=sys.stderr)
    if arguments.json:
        print(json.dumps(reports, indent=2))
    lines = [damage for report in reports for damage in report["damages"]]
    if lines:
        raise CheckpointError(
            "\n  ".join([f"{sum(not r['whole'] for r in reports)} of {len(reports)} damaged:", *lines])
        )


def _diff(arguments: argparse.Namespace) -> None:
    from titanlite.checkpoint.compare import differences

    a, b = newest_at(arguments.a), newest_at(arguments.b)
    with raise_if_deleted(a), raise_if_deleted(b):
        found = list(differences(a, b, arguments.prefix))
    apart = [difference for difference in found if not difference.is_none]
    if arguments.json:
        tensors = [{key: _plain(value) for key, value in asdict(difference).items()} for difference in found]
        print(json.dumps({"a": str(a), "b": str(b), "same": not apart, "tensors": tensors}, indent=2, allow_nan=False))
        return
    print(f"{a} and {b}: {len(found) - len(apart)} of {len(found)} tensors are the same")
    if apart:
        print()
        head = ("tensor", "a", "b", "differing", "max |a-b|", "relative")
        rows = [
            (d.name, d.a or "missing", d.b or "missing", *map(_number, (d.differing, d.max_abs, d.max_rel)))
            for d in apart
        ]
        print("\n".join(format_table([head, *rows])))


def _prune(arguments: argparse.Namespace) -> None:
    if arguments.keep_last < 1 or arguments.keep_every < 0:
        raise UsageError("--keep-last must be at least 1, and --keep-every at least 0.")
    folders = checkpoints_at(arguments.path)
    if folders == [arguments.path]:
        raise UsageError(f"{arguments.path} is one checkpoint; give the run folder that it belongs to.")
    found = {step: folder for folder in folders if (step := step_of(folder.name)) is not None}
    damaged = {
        step: first for step, folder in found.items() if (first := next(find_corruption(folder), None)) is not None
    }
    whole = [step for step in found if step not in damaged]
    if not whole:
        raise CheckpointError(f"no checkpoint in {arguments.path} is whole, so none is deleted.")
    gone = storage.superseded(whole, arguments.keep_last, arguments.keep_every)
    for damage in damaged.values():
        print(f"warning: {damage} It is left where it is.", file=sys.stderr)
    for step in gone:
        if not arguments.dry_run:
            _remove(found[step])
        if not arguments.json:
            print(f"{'would delete' if arguments.dry_run else 'deleted'} {found[step]}")
    kept = [step for step in whole if step not in gone]
    if arguments.json:
        print(json.dumps({"deleted": gone, "kept": kept, "damaged": list(damaged), "dry_run": arguments.dry_run}))
    else:
        print(f"{'would keep' if arguments.dry_run else 'kept'} {', '.join(map(str, kept))}")


def _remove(folder: Path) -> None:
    try:
        storage.remove(folder)
    except FileNotFoundError:  # a run that goes on has deleted it too
        return
    except OSError as error:
        raise CheckpointError(f"cannot delete {folder}: {cause(error, folder)}.") from error


def _in_words(values: dict[str, Any]) -> str:
    return ", ".join(_shown(f"{key} {value}") for key, value in values.items() if not isinstance(value, dict))


def _shown(value: object) -> str:
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in str(value))


def _plain(value: Any) -> Any:
    """JSON has no infinity."""
    return "infinity" if value == float("inf") else value


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
