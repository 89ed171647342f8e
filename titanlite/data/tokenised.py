"""Texts that a recipe names as they are, tokenised once, into files that all ranks map, where they are too many to be
held in each one's memory.

The files are those of `titanlite data prepare`, and their tokens those that reading the texts would give.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from titanlite.data.corpora import CORPORA, is_held_out
from titanlite.data.corpora.files import FileReader
from titanlite.data.prepare import Request, prepare
from titanlite.data.progress import Progress
from titanlite.data.token_file import HELD_OUT, TokenFile, paths_of
from titanlite.data.tokenizers import Tokenizer
from titanlite.data.units import Settings, key_of
from titanlite.data.workers import cores
from titanlite.durable import InUse, cause, take_lock
from titanlite.errors import DataError
from titanlite.recipe.sections import Data, Run
from titanlite.recipe.units import format_bytes

IN_MEMORY_BYTES = 2**25
"""Texts of so many bytes, packed or not, are read by every rank for itself."""
_PAUSE_SECONDS = 0.5


def texts_folder(run: Run) -> Path:
    """Where the runs beside this one find them too."""
    return Path(run.output_dir) / ".texts"


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
    versions = [(file.name, os.path.abspath(file.path), file.size, file.modified_ns) for file in files]
    out = folder / key_of([settings.decisive, versions])
    request = Request(tuple(paths), out, settings, workers=cores(), force=True)
    with _alone(out):
        if not paths_of(out).idx.exists():  # which is the last to be there
            with Progress(sys.stderr) as progress:
                progress.message(f"tokenising {format_bytes(size)} of texts into {out}, once for all runs")
                _prepare(request, tokenizer, progress)
    return tuple(map(TokenFile.open, [out, out.with_name(out.name + HELD_OUT)][: 2 if percent else 1]))


def _prepare(request: Request, tokenizer: Tokenizer, progress: Progress) -> None:
    try:
        prepare(request, tokenizer, progress)
    except DataError as error:  # which speaks of the command's options
        words = (("--text-key", "data.text_key"), ("--held-out", "data.validation_percent"), ("--workers", "ranks"))
        text = str(error)
        for option, key in words:
            text = text.replace(option, key)
        raise DataError(text) from error


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Where one process at a time is; of what the one before has done, the next finds whatever is done."""
    lock = out.with_name(f".{out.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                held = take_lock(lock, f"the folder {out.parent}", "end it", lambda text: None)
                break
            except InUse:
                time.sleep(_PAUSE_SECONDS)
    except OSError as error:
        raise DataError(
            f"cannot write {out.parent}, where texts that are too many for memory are tokenised: "
            f"{cause(error, out.parent)}; change run.output_dir, or prepare them (titanlite data prepare)."
        ) from error
    try:
        yield
    finally:
        os.close(held)
