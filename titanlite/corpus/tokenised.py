"""Texts that a recipe names as they are, tokenised once, into files that all ranks read, where they are too many to be
held in each one's memory.

The files are those of `titanlite data prepare`, and their tokens those that reading the texts would give.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from titanlite.corpus.corpora import CORPORA, is_held_out
from titanlite.corpus.corpora.files import FileReader, FoundFile
from titanlite.corpus.prepare import Request, prepare
from titanlite.corpus.progress import Progress
from titanlite.corpus.token_file import HELD_OUT, TokenFile, paths_of
from titanlite.corpus.tokenizers import Tokenizer
from titanlite.corpus.units import PART_VERSION, Settings, key_of
from titanlite.corpus.workers import cores
from titanlite.errors import DataError
from titanlite.files import cause
from titanlite.recipe.paths import expand
from titanlite.recipe.sections import Data, Run
from titanlite.text import format_bytes

IN_MEMORY_BYTES = 2**25
"""Texts of so many bytes, packed or not, are read by every rank for itself."""

_IN_RECIPES = (
    ("no --held-out", "data.validation_percent = 0"),
    ("--held-out", "data.validation_percent"),
    ("--text-key", "data.text_key"),
    ("take fewer --workers, or ", ""),
)
"""What the command's options are called in a recipe."""


def texts_folder(run: Run) -> Path:
    """Where the runs beside this one find them too."""
    return expand(run.output_dir) / ".texts"


def tokenised(
    paths: Sequence[str], section: Data, tokenizer: Tokenizer, percent: float, folder: Path
) -> tuple[TokenFile, ...] | None:
    """The files' tokens, and then those of the `percent` held out, if that is not 0; None for what is better read.

    That is small, comes from no files, or is of files that are single documents and all on one side. The first process
    to come tokenises, on all cores; others, on other machines too, wait for it. Raises `DataError`.
    """
    if any(entry in CORPORA for entry in paths):
        return None
    reader = FileReader(section.text_key)
    files = [file for entry in paths for file in reader.files(entry)]
    size = sum(file.size for file in files)
    texts = [is_held_out(file.name, percent) for file in files if file.form == "text"]
    if size <= IN_MEMORY_BYTES or (percent and len(texts) == len(files) and len(set(texts)) < 2):
        return None
    settings = Settings(
        tokenizer=section.tokenizer,
        separator=section.separator,
        special_tokens=tuple(section.special_tokens),
        fingerprint=tokenizer.fingerprint,
        text_key=section.text_key,
        skip_bad_lines=False,
        held_out_percent=percent,
    )
    out = folder / _version_of(files, settings)
    if not paths_of(out).idx.exists():  # which is the last to be there
        request = Request(tuple(paths), out, settings, workers=cores(), force=True)
        with _alone(out):
            if not paths_of(out).idx.exists():
                _make(request, tokenizer, size)
    return tuple(map(TokenFile.open, [out, out.with_name(out.name + HELD_OUT)][: 2 if percent else 1]))


def _version_of(files: Sequence[FoundFile], settings: Settings) -> str:
    """Another one wherever the tokens may be others."""
    texts = [(file.name, os.path.abspath(file.path), file.size, file.modified_ns) for file in files]
    return key_of([PART_VERSION, settings.decisive, texts])


def _make(request: Request, tokenizer: Tokenizer, size: int) -> None:
    """Write the files, on all cores. Raises `DataError` as a run has it to say."""
    try:
        with Progress(sys.stderr) as progress:
            progress.message(f"tokenising {format_bytes(size)} of texts into {request.out}, once for all runs")
            prepare(request, tokenizer, progress)
    except DataError as error:  # which speaks of the command's options
        text = str(error)
        for option, key in _IN_RECIPES:
            text = text.replace(option, key)
        raise DataError(text) from error
    reader = FileReader(request.settings.text_key)
    if _version_of([file for entry in request.inputs for file in reader.files(entry)], request.settings) != (
        request.out.name
    ):
        paths_of(request.out).idx.unlink()
        raise DataError(f"{request.inputs[0]}: changed while it was read; start again when nothing writes to it.")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Where one process at a time is; of what the one before has done, the next finds whatever is done.

    Raises `DataError` where files cannot be written, or not locked: then many would write the same ones.
    """
    import fcntl  # not on Windows

    lock = out.with_name(f".{out.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "w") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                print(f"waiting for another process, which tokenises texts into {out}", file=sys.stderr, flush=True)
                fcntl.lockf(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise DataError(
            f"{out.parent}, where texts that are too many for memory are tokenised, cannot be written or locked: "
            f"{cause(error, out.parent)}; change run.output_dir, or prepare them (titanlite data prepare)."
        ) from error
