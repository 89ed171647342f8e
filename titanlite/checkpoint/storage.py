"""Checkpoint folders on a disk: committed by one rename, read with suspicion, removed without a trace of halves.

A folder named `step-…` is whole or was damaged later; what is being written, replaced or deleted has a hidden name
beside it, which the next start clears. At the end, what a path means, and what is in a checkpoint. No torch.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import xxhash
from pydantic import ValidationError

from titanlite import files
from titanlite.checkpoint import format
from titanlite.checkpoint.format import MANIFEST, FileEntry, Manifest, folder_name, step_of
from titanlite.errors import CheckpointError, DamagedCheckpointError, UsageError
from titanlite.files import cause, delete, open_file, sync_path
from titanlite.recipe.load import plugin_modules
from titanlite.recipe.sections import Recipe, recipe_class
from titanlite.recipe.toml import TomlSyntaxError, parse_toml
from titanlite.registry import require_plugins

BEGINS_WITH = ".begins-with.json"  # beside a run's checkpoints: the other run's that it began with, asked for by a path


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint folder, ascending by number; times on disk mean nothing. Empty without a folder."""
    with wrap_os_errors(f"cannot list the checkpoints in {folder}", folder), suppress(FileNotFoundError):
        found = ((step_of(entry.name), entry) for entry in os.scandir(folder))
        return sorted(step for step, entry in found if step is not None and entry.is_dir())
    return []


def select_superseded(steps: Sequence[int], keep_last: int, keep_every: int = 0) -> list[int]:
    """Of ascending `steps`, all but the `keep_last` newest (0: all) and multiples of `keep_every` (0: none)."""
    older = steps[:-keep_last] if keep_last else []
    return [step for step in older if not (keep_every and step % keep_every == 0)]


def pending(final: Path) -> Path:
    """The hidden folder that `final` is written in."""
    return _hidden(final, "writing")


def begin(final: Path) -> None:
    """Make the empty `pending(final)`. Raises `OSError`."""
    delete(pending(final))
    pending(final).mkdir(parents=True)


def commit(final: Path, manifest: bytes) -> str:
    """Make what is pending, its files synced, and this manifest the checkpoint `final`, in place of the one there is.

    Raises `OSError` if `final` is not what was pending; `abandon` then brings back what it was. Once it is, no error
    undoes that: what is returned, if not empty, says why a loss of power might, and that older ones must stay.
    """
    replaced = _hidden(final, "replaced")
    (pending(final) / MANIFEST).write_bytes(manifest)
    sync_path(pending(final) / MANIFEST)
    sync_path(pending(final))
    if os.path.lexists(final):
        delete(replaced)
        os.rename(final, replaced)
    try:
        os.rename(pending(final), final)
    except OSError:  # a file server may have done it, and its answer be lost
        if pending(final).exists() or not final.exists():
            raise
    try:
        sync_path(final.parent)
    except OSError as error:
        return (
            f"the checkpoint {final} is whole, but the disk does not say that it will be found after a loss of power: "
            f"{cause(error, final)}. Older ones stay until a later save."
        )
    with suppress(OSError):  # the next start does it
        delete(replaced)
    return ""


def abandon(final: Path) -> None:
    """Remove what is pending; `final` is as it was before."""
    replaced = _hidden(final, "replaced")
    shutil.rmtree(pending(final), ignore_errors=True)
    if replaced.exists() and not final.exists():
        with suppress(OSError):  # the next start does it
            os.rename(replaced, final)


wrap_os_errors = partial(files.wrap_os_errors, kind=CheckpointError)


def leave_mark(folder: Path) -> str:
    """Make a file of a name that was never there, for other processes to look for; its name. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f".mark-{os.urandom(8).hex()}"
    mark.touch()
    return mark.name


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed writer left in `folder`. Only for the one process that writes there. Raises `OSError`."""
    for path in sorted(folder.iterdir()):
        if re.fullmatch(r"\.mark-[0-9a-f]+", path.name):
            path.unlink()
        elif match := re.fullmatch(r"\.(step-[0-9]+)\.(writing|replaced|deleting)", path.name):
            final = folder / match[1]
            if match[2] == "replaced" and not final.exists():
                os.rename(path, final)  # killed between the two renames of a commit: the old one is still the one
            else:
                delete(path)


def remove(final: Path) -> None:
    """Delete a checkpoint: hidden first, so that no reader meets a half-deleted one. Raises `OSError`."""
    hidden = _hidden(final, "deleting")
    delete(hidden)
    os.rename(final, hidden)
    delete(hidden)


def remove_or_warn(final: Path, warn: Callable[[str], None]) -> None:
    """`remove` what is old, which must not fail what is new."""
    try:
        remove(final)
    except OSError as error:
        warn(f"cannot delete the old {final}: {cause(error, final)}.")


def read_manifest(folder: Path) -> Manifest:
    """The validated manifest of a checkpoint folder. Raises `DamagedCheckpointError` or `NewerFormatError`."""
    return decode_manifest(folder, manifest_text(folder))


def manifest_text(folder: Path) -> str:
    """The manifest's text as it lies on the disk. Raises `DamagedCheckpointError`."""
    path = folder / MANIFEST
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > format.MAX_MANIFEST_BYTES:
            raise DamagedCheckpointError(f"{path} is too large to be a manifest ({size} bytes).")
        return (file.read(size) or b"").decode(errors="replace")  # what is no text does not have the checksum either


def decode_manifest(folder: Path, text: str) -> Manifest:
    """The manifest of a folder from its text. Raises `DamagedCheckpointError` or `NewerFormatError`."""
    path = folder / MANIFEST
    manifest = format.decode(text, str(path))
    step = step_of(folder.name)
    if step is not None and step != manifest.step:
        raise DamagedCheckpointError(f"{path} is of step {manifest.step}, not of the step its folder is named after.")
    return manifest


@contextmanager
def open_regular(path: Path, expected: FileEntry | None = None) -> Iterator[FileIO]:
    """A regular file (no link, pipe or device) for reading, of the expected size if one is.

    Raises `DamagedCheckpointError`, also for an `OSError` in the block.
    """
    try:
        descriptor = open_file(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        why = "is a link, which no checkpoint holds" if path.is_symlink() else f"cannot be opened: {error.strerror}"
        missing = isinstance(error, FileNotFoundError)
        raise DamagedCheckpointError(f"{path} {'is missing' if missing else why}.") from error
    with open(descriptor, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if expected is not None and size != expected.bytes:
            raise DamagedCheckpointError(f"{path} is damaged: it has {size} bytes, not {expected.bytes}.")
        try:
            yield file
        except OSError as error:
            raise DamagedCheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def verify_file(path: Path, expected: FileEntry) -> None:
    """Compare size and content with the manifest's. Raises `DamagedCheckpointError` naming the file."""
    with open_regular(path, expected) as file:
        require_hash(path, _hash(file), expected)


def require_hash(path: Path, found: str, expected: FileEntry) -> None:
    """Raises `DamagedCheckpointError` unless a file has the hash that the manifest says."""
    if found != expected.xxh3_128:
        raise DamagedCheckpointError(f"{path} is damaged: its content does not match its hash in {MANIFEST}.")


def describe_file(path: Path) -> FileEntry:
    """Size and hash of a file that was just written, for the manifest. Raises `OSError`."""
    with open(path, "rb", buffering=0) as file:
        return FileEntry(os.fstat(file.fileno()).st_size, _hash(file))


def _hash(file: FileIO) -> str:
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(2**22))
    while count := file.readinto(block):
        digest.update(block[:count])
    return digest.hexdigest()


def _hidden(final: Path, purpose: str) -> Path:
    return final.with_name(f".{final.name}.{purpose}")


# --- looking at checkpoints without loading them


def checkpoints_at(path: Path) -> list[Path]:
    """The checkpoint folders that a path means, by step: of a run or its `checkpoints`, this one, or `RUN/500`.

    Raises `UsageError` if there is nothing like it, `CheckpointError` for a run without any.
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
    """What a checkpoint holds and what wrote it, in plain values; None for what the recipe in it does not say."""
    with raise_if_deleted(folder):
        manifest = read_manifest(folder)
    try:
        recipe = parse_toml(manifest.recipe)
    except ValueError:  # whichever titanlite's it is
        recipe = {}
    sections = {name: section for name, section in recipe.items() if isinstance(section, dict)}
    tensors: list[dict[str, Any]] = [
        {"name": name, "dtype": dtype, "shape": list(shape), "chunks": len(chunks),
         "bytes": math.prod(shape) * format.DTYPES[dtype][0]}
        for name, (dtype, shape, chunks) in manifest.tensors.items()
    ]  # fmt: skip
    return {
        "path": str(folder),
        **{key: getattr(manifest, key) for key in ("step", "samples", "tokens", "values")},
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
    placed = format.chunks_by_file(manifest.tensors)
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
                            format.check_table(path, format.read_table(path, file)[1], chunks)
        except DamagedCheckpointError as damage:
            yield str(damage)


def unlisted_files(folder: Path) -> list[str]:
    """Names in a checkpoint folder that its manifest does not list; loading ignores them."""
    with raise_if_deleted(folder):
        listed = {MANIFEST, *read_manifest(folder).files}
        return sorted(path.name for path in folder.iterdir() if path.name not in listed)
