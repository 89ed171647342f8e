"""Looking at checkpoints without loading them: which one a path means, what is in it, whether it is whole. No torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from titanlite.checkpoint.format import (
    DTYPES,
    MANIFEST,
    DamagedCheckpointError,
    Manifest,
    check_table,
    chunks_by_file,
    folder_name,
    read_table,
)
from titanlite.checkpoint.storage import checkpoint_steps, open_regular, read_manifest, verify_file, wrap_os_errors
from titanlite.errors import CheckpointError, UsageError
from titanlite.files import read_json, replace_file
from titanlite.recipe.load import plugin_modules
from titanlite.recipe.sections import Recipe, recipe_class
from titanlite.recipe.toml import TomlSyntaxError, parse_toml
from titanlite.registry import require_plugins

BEGINS_WITH = ".begins-with.json"
"""Beside the checkpoints: which one of another run this run began with, and by what path that was asked for."""


def checkpoints_at(path: Path) -> list[Path]:
    """The checkpoint folders that a path means, by step: of a run, of its `checkpoints`, or this one alone.

    `RUN/500` is the one of that step of the run. Raises `UsageError` if there is nothing like it, and
    `CheckpointError` for a run that has none yet.
    """
    if not path.exists() and re.fullmatch("[0-9]{1,18}", path.name):
        path = path.parent / "checkpoints" / folder_name(int(path.name))
    if not path.is_dir():
        if path.parent.name == "checkpoints" and (steps := checkpoint_steps(path.parent)):
            there = ", ".join(map(str, steps))
            raise UsageError(f"there is no checkpoint '{path}': deleted, or never saved; there are steps {there}.")
        raise UsageError(f"there is no folder '{path}'; give a run folder, its checkpoints folder or one of its steps.")
    if (path / MANIFEST).exists() or path.name.startswith("step-"):
        return [path]
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = [folder / folder_name(step) for step in checkpoint_steps(folder)]
    if found:
        return found
    if folder != path or (path / "recipe.toml").exists() or path.name == "checkpoints":
        raise CheckpointError(f"{path} holds no checkpoint; checkpoint.every_steps says when a run saves one.")
    theirs = " It is a Hugging Face folder: titanlite checkpoint import-hf makes a run of it."
    raise UsageError(
        f"'{path}' is no run folder and no checkpoint: it holds no checkpoints, and no {MANIFEST}."
        f"{theirs if (path / 'config.json').exists() else ''}"
    )


def newest_at(path: Path) -> Path:
    """The newest checkpoint folder that a path means. Raises as `checkpoints_at`."""
    return checkpoints_at(path)[-1]


def newest_at_first(path: Path, record: Path) -> Path:
    """`newest_at` as of the first time that it was asked for, which the file `record` tells of: the run there may have
    saved since. Asked anew for another path, and for a checkpoint that is gone.
    """
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = read_json(record)
        if known["path"] == str(path) and (folder := Path(known["checkpoint"])).is_dir():
            return folder
    folder = newest_at(path)
    with wrap_os_errors(f"cannot write {record}", record):
        replace_file(record, json.dumps({"path": str(path), "checkpoint": str(folder)}).encode())
    return folder


@contextmanager
def raise_if_deleted(folder: Path) -> Iterator[None]:
    """Raise `CheckpointError` where what is missing is the whole checkpoint, which was there a moment ago."""
    try:
        yield
    except (DamagedCheckpointError, FileNotFoundError):
        if folder.exists():
            raise
        raise CheckpointError(f"{folder} was deleted while it was read: a newer one has taken its place.") from None


def summary(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds and what wrote it, in plain values; None for what the recipe in it does not say.

    Raises `CheckpointError` without a valid manifest.
    """
    with raise_if_deleted(folder):
        manifest = read_manifest(folder)
    try:
        recipe = parse_toml(manifest.recipe)
    except ValueError:  # whichever titanlite's it is
        recipe = {}
    sections = {name: section for name, section in recipe.items() if isinstance(section, dict)}
    tensors: list[dict[str, Any]] = [
        {"name": name, "dtype": dtype, "shape": list(shape), "chunks": len(chunks),
         "bytes": math.prod(shape) * DTYPES[dtype][0]}
        for name, (dtype, shape, chunks) in manifest.tensors.items()
    ]  # fmt: skip
    return {
        "path": str(folder),
        "step": manifest.step,
        "samples": manifest.samples,
        "tokens": manifest.tokens,
        "values": manifest.values,
        "parameters": sum(math.prod(tensor["shape"]) for tensor in tensors if tensor["name"].startswith("model.")),
        "files": len(manifest.files),
        "bytes": sum(file.bytes for file in manifest.files.values()),
        "environment": manifest.environment,
        "run": sections.get("run", {}).get("name"),
        "preset": sections.get("model", {}).get("preset"),
        "layout": sections.get("parallel"),
        "tensors": tensors,
    }


def recipe_of(manifest: Manifest, folder: Path) -> Recipe:
    """The recipe that a checkpoint was trained with. Raises `CheckpointError` if this titanlite cannot read it."""
    try:
        values = parse_toml(manifest.recipe)
        require_plugins(plugin_modules(values), str(folder))
        return recipe_class().model_validate(values)
    except TomlSyntaxError as error:
        raise CheckpointError(f"the recipe in {folder / MANIFEST} is not TOML: line {error.line}: {error}.") from None
    except ValidationError as error:
        item = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(map(str, item["loc"]))
        raise CheckpointError(f"the recipe in {folder / MANIFEST} cannot be used: {key}: {item['msg']}.") from None


def find_corruption(folder: Path, deep: bool = False) -> Iterator[str]:
    """Everything wrong with a checkpoint, one sentence a file; `deep` also reads every file, to compare its hash and to
    look for numbers that are not finite. Raises `NewerFormatError`, and `CheckpointError` if it was deleted meanwhile.
    """
    try:
        with raise_if_deleted(folder):
            manifest = read_manifest(folder)
    except DamagedCheckpointError as damage:
        yield str(damage)
        return
    placed = chunks_by_file(manifest.tensors)
    for name, entry in manifest.files.items():
        path, chunks = folder / name, placed.get(name, [])
        try:
            with raise_if_deleted(folder):
                if deep and chunks:
                    from titanlite.checkpoint.load import find_nonfinite  # which needs torch

                    if nonfinite := find_nonfinite(path, chunks, entry):
                        yield f"{path} is of no use: numbers that are not finite are in {', '.join(nonfinite)}."
                elif deep:
                    verify_file(path, entry)
                else:
                    with open_regular(path, entry) as file:
                        if chunks:
                            check_table(path, read_table(path, file)[1], chunks)
        except DamagedCheckpointError as damage:
            yield str(damage)


def unlisted_files(folder: Path) -> list[str]:
    """Names in a checkpoint folder that its manifest does not list; loading ignores them."""
    with raise_if_deleted(folder):
        listed = {MANIFEST, *read_manifest(folder).files}
        return sorted(path.name for path in folder.iterdir() if path.name not in listed)
