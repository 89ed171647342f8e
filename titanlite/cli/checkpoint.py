"""`titanlite checkpoint`: look at checkpoints, prove them whole, compare two, delete old ones; Hugging Face's.

Only what reads values needs torch. What is printed may come from an untrusted checkpoint: none of it reaches a
terminal raw.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

from titanlite.checkpoint import storage
from titanlite.checkpoint.format import step_of
from titanlite.errors import EXIT_DONE, CheckpointError, UsageError
from titanlite.recipe.paths import path_argument
from titanlite.text import format_bytes, format_count, format_table, pluralize

if TYPE_CHECKING:
    from titanlite.checkpoint.huggingface import Written

_A_PATH = "run folder, its checkpoints folder, or one step's folder"


def main(argv: list[str]) -> int:
    """The command; see `titanlite checkpoint --help`. Raises `CheckpointError` (exit code 4) for damage."""
    parser = argparse.ArgumentParser(prog="titanlite checkpoint", description="Look after checkpoints.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    added = {}
    for name, action, line, paths in (
        ("inspect", _inspect, "what a checkpoint (of a run: the newest) holds, and what wrote it", {"path": _A_PATH}),
        ("verify", _verify, "check that checkpoints are whole; exit code 4 and the damaged files' names if not",
         {"path": _A_PATH}),
        ("diff", _diff, "how far two checkpoints are apart, tensor by tensor",
         {"a": f"{_A_PATH} (of a run: the newest)", "b": "the other one"}),
        ("prune", _prune, "delete old checkpoints of a run; damaged ones neither count nor go",
         {"path": "run or checkpoints folder"}),
        ("export-hf", _export, "write a checkpoint's weights as a folder that transformers can load",
         {"checkpoint": "run folder (its newest checkpoint), RUN/STEP, or a checkpoint", "out": "folder to make"}),
        ("import-hf", _import, "make a run folder whose one checkpoint has a Hugging Face folder's weights",
         {"folder": "folder with config.json and safetensors files", "out": "run folder to make"}),
    ):  # fmt: skip
        added[name] = command = commands.add_parser(name, help=line, description=line, allow_abbrev=False)
        command.set_defaults(action=action)
        for path, text in paths.items():
            command.add_argument(path, type=path_argument, help=text)
        if not name.endswith("-hf"):
            command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    added["verify"].add_argument("--deep", action="store_true", help="read every byte: compare hashes, look for NaN")
    added["diff"].add_argument("--prefix", default="", help="only tensors of such names, such as model.")
    added["prune"].add_argument("--keep-last", type=int, required=True, metavar="K", help="keep the K newest")
    added["prune"].add_argument("--keep-every", type=int, default=0, metavar="N", help="and steps divisible by N")
    added["prune"].add_argument("--dry-run", action="store_true", help="print what would go, and delete nothing")
    added["export-hf"].add_argument("--dtype", help="float32 or bfloat16 (default: the weights as they are stored)")
    arguments = parser.parse_args(argv)
    arguments.action(arguments)
    return EXIT_DONE


def _inspect(arguments: argparse.Namespace) -> None:
    found = storage.checkpoints_at(arguments.path)
    report = {**storage.summary(found[-1]), "steps": [step_of(folder.name) for folder in found]}
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{report['path']}: step {report['step']}, {format_count(report['samples'])} samples, "
          f"{format_count(report['tokens'])} tokens")  # fmt: skip
    if len(found) > 1:
        print(f"steps        {', '.join(map(str, report['steps']))}")
    print(f"run          {_printable(report['run'] or 'unknown')}, {_printable(report['preset'] or 'unknown model')}, "
          f"{format_count(report['parameters'])} parameters")  # fmt: skip
    print(f"layout       {_list_values(report['layout'] or {}) or 'unknown'}")
    print(f"environment  {_list_values(report['environment'])}")
    if report["values"]:
        print(f"values       {_list_values(report['values'])}")
    print(f"size         {format_bytes(report['bytes'])} in {report['files']} files\n")
    rows = [
        (t["name"], t["dtype"], "x".join(map(str, t["shape"])) or "scalar", str(t["chunks"]), format_bytes(t["bytes"]))
        for t in report["tensors"]
    ]
    print("\n".join(format_table([("tensor", "dtype", "shape", "chunks", "size"), *rows])))


def _verify(arguments: argparse.Namespace) -> None:
    reports: list[dict[str, Any]] = []
    for folder in storage.checkpoints_at(arguments.path):
        found = list(storage.find_corruption(folder, arguments.deep))
        extra = [] if found else storage.unlisted_files(folder)
        reports.append({"path": str(folder), "whole": not found, "damages": found, "not_listed": extra})
        if not arguments.json:
            checked = "sizes, headers, hashes and finite numbers" if arguments.deep else "sizes and headers"
            print(f"{folder}: {'damaged' if found else f'whole ({checked})'}")
        for name in extra:
            print(f"warning: {folder / name} is not in the manifest; loading ignores it", file=sys.stderr)
    if arguments.json:
        print(json.dumps(reports, indent=2))
    if lines := [damage for report in reports for damage in report["damages"]]:
        damaged = sum(not report["whole"] for report in reports)
        raise CheckpointError("\n  ".join([f"{damaged} of {len(reports)} damaged:", *lines]))


def _diff(arguments: argparse.Namespace) -> None:
    from titanlite.checkpoint.load import compare_checkpoints

    a, b = storage.newest_at(arguments.a), storage.newest_at(arguments.b)
    with storage.raise_if_deleted(a), storage.raise_if_deleted(b):
        found = list(compare_checkpoints(a, b, arguments.prefix))
    apart = [difference for difference in found if not difference.is_none]
    if arguments.json:
        tensors = [  # JSON has no infinity
            {key: "infinity" if value == math.inf else value for key, value in asdict(each).items()} for each in found
        ]
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
    folders = storage.checkpoints_at(arguments.path)
    if folders == [arguments.path]:
        raise UsageError(f"{arguments.path} is one checkpoint; give the run folder that it belongs to.")
    found = {step: folder for folder in folders if (step := step_of(folder.name)) is not None}
    damaged = {step: first for step, folder in found.items() for first in islice(storage.find_corruption(folder), 1)}
    whole = [step for step in found if step not in damaged]
    if not whole:
        raise CheckpointError(f"no checkpoint in {arguments.path} is whole, so none is deleted.")
    gone = storage.select_superseded(whole, arguments.keep_last, arguments.keep_every)
    for damage in damaged.values():
        print(f"warning: {damage} It is left where it is.", file=sys.stderr)
    for step in gone:
        if not arguments.dry_run:
            with storage.wrap_os_errors(f"cannot delete {found[step]}", found[step]), suppress(FileNotFoundError):
                storage.remove(found[step])  # unless a run that goes on has deleted it too
        if not arguments.json:
            print(f"{'would delete' if arguments.dry_run else 'deleted'} {found[step]}")
    kept = [step for step in whole if step not in gone]
    if arguments.json:
        print(json.dumps({"deleted": gone, "kept": kept, "damaged": list(damaged), "dry_run": arguments.dry_run}))
    else:
        print(f"{'would keep' if arguments.dry_run else 'kept'} {', '.join(map(str, kept))}")


def _export(arguments: argparse.Namespace) -> None:
    from titanlite.checkpoint.huggingface import export_huggingface

    checkpoint = storage.newest_at(arguments.checkpoint)
    with storage.raise_if_deleted(checkpoint):
        written = export_huggingface(checkpoint, arguments.out, arguments.dtype)
    print(f"{checkpoint} -> {_summarize(written)}")
    if not written.tokenizer_files:
        print("no tokenizer was exported: the byte tokenizer has no files (ids are byte values, 256 ends a document).")


def _import(arguments: argparse.Namespace) -> None:
    from titanlite.checkpoint.huggingface import import_huggingface

    written, recipe = import_huggingface(arguments.folder, arguments.out), arguments.out / "recipe.toml"
    print(f"{arguments.folder} -> {_summarize(written)}")
    if written.tokenizer_files:
        print(f"kept for the next export: {', '.join(written.tokenizer_files)}.")
    if (tokenizer := arguments.out / "tokenizer").is_dir():
        print(f'titanlite generate uses {tokenizer}, and so do recipes by data.tokenizer = "{tokenizer}".')
    if written.without_tokenizer:
        print(f"no tokenizer: {written.without_tokenizer}. To generate text, name one as data.tokenizer in {recipe}.")
    print(f"train on: titanlite train {recipe} --training.steps=N --data.corpus=PATH")


def _summarize(written: Written) -> str:
    files = pluralize(len(written.files), "file")
    return f"{written.folder}: {written.tensors} tensors, {format_bytes(written.nbytes)} in {files}"


def _list_values(values: dict[str, Any]) -> str:
    return ", ".join(_printable(f"{key} {value}") for key, value in values.items() if not isinstance(value, dict))


def _printable(value: object) -> str:
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in str(value))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
