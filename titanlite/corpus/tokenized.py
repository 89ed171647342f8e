"""Texts that a recipe names, tokenized once into files that all ranks read, where they are too many to be held in each
one's memory.

The files are those of `titanlite data prepare`, and their tokens those that reading the texts would give.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from titanlite.corpus.corpora import CORPORA, is_held_out
from titanlite.corpus.corpora.files import FileFinder
from titanlite.corpus.prepare import Request, prepare
from titanlite.corpus.progress import Progress
from titanlite.corpus.token_file import TokenFile, paths_of
from titanlite.corpus.tokenizers import Tokenizer
from titanlite.corpus.units import PART_VERSION, Piece, Settings, key_of
from titanlite.corpus.workers import cores
from titanlite.recipe.paths import expand
from titanlite.recipe.sections import Data, Run

IN_MEMORY_BYTES = 2**25
"""Texts of up to this size, packed or not, are read by every rank for itself."""


def texts_folder(run: Run) -> Path:
    """Where the runs beside this one find them too."""
    return expand(run.output_dir) / ".texts"


def open_tokenized(
    paths: Sequence[str], section: Data, tokenizer: Tokenizer, percent: float, folder: Path
) -> tuple[TokenFile, ...] | None:
    """The files' tokens, and then those of the `percent` held out, if that is not 0; None for what is better read.

    That is small, comes from no files, or is of files that are single documents and all on one side. The first process
    to come tokenizes, on all cores; others, on other machines too, wait for it. Raises `DataError`.
    """
    if any(entry in CORPORA for entry in paths):
        return None
    finder = FileFinder(section.text_key)
    files = [Piece(source, file) for source, entry in enumerate(paths) for file in finder.find(entry)]
    size = sum(file.size for _, file, _ in files)
    texts = [is_held_out(file.name, percent) for _, file, _ in files if file.format == "text"]
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
    request = Request(
        tuple(paths), folder / _version_of(files, settings), settings, workers=cores(), force=True, shared=True
    )
    if not paths_of(request.out).idx.exists():  # which is the last to be there
        with Progress(sys.stderr) as progress:
            prepare(request, files, tokenizer, progress)
    return tuple(map(TokenFile.open, reversed(request.outputs)))


def _version_of(files: Sequence[Piece], settings: Settings) -> str:
    """Another one wherever the tokens may be others."""
    texts = [(file.name, os.path.abspath(file.path), file.size, file.modified_ns) for _, file, _ in files]
    return key_of([PART_VERSION, settings.decisive, texts])
