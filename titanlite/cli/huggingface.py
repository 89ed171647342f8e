"""`titanlite checkpoint export-hf` and `import-hf`. Torch is imported by these alone."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from titanlite.checkpoint.examine import newest_at, raise_if_deleted
from titanlite.text import format_bytes, pluralize

if TYPE_CHECKING:
    from titanlite.checkpoint.huggingface import Written


def export(arguments: argparse.Namespace) -> None:
    """Of a checkpoint, `--dtype` of its weights, to a new folder."""
    from titanlite.checkpoint.huggingface import export_huggingface

    checkpoint = newest_at(arguments.checkpoint)
    with raise_if_deleted(checkpoint):
        written = export_huggingface(checkpoint, arguments.out, arguments.dtype)
    print(f"{checkpoint} -> {_summary(written)}")
    if not written.tokenizer_files:
        print("no tokenizer was exported: the byte tokenizer has no files (ids are byte values, 256 ends a document).")


def import_(arguments: argparse.Namespace) -> None:
    """Of a Hugging Face folder, to a new run folder."""
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
    files = pluralize(len(written.files), "file")
    return f"{written.folder}: {written.tensors} tensors, {format_bytes(written.nbytes)} in {files}"
