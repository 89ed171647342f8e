"""`titanlite checkpoint export-hf` and `import-hf`: the command lines of `huggingface.py`, which they import late."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from titanlite.checkpoint.examine import newest_at, raise_if_deleted
from titanlite.recipe.paths import path_argument
from titanlite.text import format_bytes

if TYPE_CHECKING:
    from titanlite.checkpoint.huggingface import Written


def add_huggingface_commands(commands: Any) -> None:
    """Add both to the subparsers of `titanlite checkpoint`; each sets `action` to its function of the arguments."""
    line = "write a checkpoint's weights as a folder that Hugging Face's transformers can load"
    command = commands.add_parser("export-hf", help=line, description=line, allow_abbrev=False)
    command.add_argument(
        "checkpoint", type=path_argument, help="run folder (its newest checkpoint), RUN/STEP, or a checkpoint"
    )
    command.add_argument("out", type=path_argument, help="folder to make")
    command.add_argument("--dtype", help="float32 or bfloat16 (default: the weights as they are stored)")
    command.set_defaults(action=_export)
    line = "make a run folder whose one checkpoint holds the weights of a Hugging Face folder"
    command = commands.add_parser("import-hf", help=line, description=line, allow_abbrev=False)
    command.add_argument("folder", type=path_argument, help="folder with config.json and safetensors files")
    command.add_argument("out", type=path_argument, help="run folder to make")
    command.set_defaults(action=_import)


def _export(arguments: argparse.Namespace) -> None:
    from titanlite.checkpoint.huggingface import export_huggingface

    checkpoint = newest_at(arguments.checkpoint)
    with raise_if_deleted(checkpoint):
        written = export_huggingface(checkpoint, arguments.out, arguments.dtype)
    print(f"{checkpoint} -> {_summary(written)}")
    if not written.tokenizer_files:
        print("no tokenizer was exported: the byte tokenizer has no files (ids are byte values, 256 ends a document).")


def _import(arguments: argparse.Namespace) -> None:
    from titanlite.checkpoint.huggingface import import_huggingface

    written = import_huggingface(arguments.folder, arguments.out)
    print(f"{arguments.folder} -> {_summary(written)}")
    if written.tokenizer_files:
        print(f"kept for the next export: {', '.join(written.tokenizer_files)}.")
    if (tokenizer := arguments.out / "tokenizer").is_dir():
        print(f'titanlite generate uses {tokenizer}, and so do recipes by data.tokenizer = "{tokenizer}".')
    if written.without_tokenizer:
        print(
            f"no tokenizer: {written.without_tokenizer}. Text cannot be generated before data.tokenizer in "
            f"{arguments.out / 'recipe.toml'} names one, such as a tokenizer.json of transformers."
        )
    print(f"train on: titanlite train {arguments.out / 'recipe.toml'} --training.steps=N --data.corpus=PATH")


def _summary(written: Written) -> str:
    files = "1 file" if len(written.files) == 1 else f"{len(written.files)} files"
    return f"{written.folder}: {written.tensors} tensors, {format_bytes(written.nbytes)} in {files}"
