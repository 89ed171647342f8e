"""`titanlite data prepare`: texts into token files, by many processes, to the same bytes whatever happens on the way.

Inputs are cut into units (see `units`) by what they are, not by who reads them; finished units lie as parts in
`PREFIX.parts`, where a start after a kill finds them, and are joined in order.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from titanlite.corpus import token_file
from titanlite.corpus.corpora import CORPORA, FoundFile, Part, is_held_out
from titanlite.corpus.corpora.files import FileFinder
from titanlite.corpus.corpora.readers import count_newlines, divide
from titanlite.corpus.token_file import Int64, TokenFile, TokenInfo, TokenWriter, paths_of
from titanlite.corpus.tokenizers import Tokenizer
from titanlite.corpus.units import (
    EXAMPLES,
    PART_VERSION,
    RECORD,
    PartFile,
    Request,
    Unit,
    find_part,
    key_of,
    write_unit,
)
from titanlite.corpus.workers import Progress, WorkerPool, cores
from titanlite.errors import DataError, UsageError
from titanlite.files import Lock, take_lock, wrap_os_errors
from titanlite.recipe.paths import expand
from titanlite.recipe.sections import Data, Run
from titanlite.text import format_bytes

SMALLEST_UNIT_BYTES, LARGEST_UNIT_BYTES = 2**22, 2**28
UNITS, UNIT_FILES = 1_024, 4_096  # units aimed at, enough for any number of processes; and the most files of one
IN_MEMORY_BYTES = 2**25  # texts of a recipe of up to this size, packed or not, are read by every rank for itself


def find_inputs(inputs: Sequence[str], text_key: str) -> list[FoundFile]:
    """All files that the command's inputs name, in order. Raises `DataError`, and `UsageError` for a corpus' name."""
    if named := [entry for entry in inputs if entry in CORPORA and not Path(entry).exists()]:
        raise UsageError(f"'{named[0]}' is for recipes, which read it as it is; give files, folders or globs.")
    return FileFinder(text_key, "INPUT", ()).find_all(inputs)


def prepare(request: Request, files: Sequence[FoundFile]) -> dict[Path, TokenInfo]:
    """Make the token files of the inputs' `files`, or go on where an earlier start stopped; their sidecars by prefix.

    Raises `DataError` for texts that cannot be read and a full disk, `UsageError` for what is in the way.
    """
    parts = paths_of(request.out).parts
    then = " What is done stays done: mend that and start again, or choose another folder (--out, run.output_dir)."
    with (
        wrap_os_errors(f"cannot write or lock {parts}", parts, then, DataError),
        closing(Progress(sys.stderr)) as progress,
        closing(_lock(request, parts, progress)) as lock,
    ):
        try:
            done = _make(request, files, lock, progress)
            shutil.rmtree(parts, ignore_errors=True)
            if parts.exists():
                progress.message(f"cannot remove {parts}, which nothing needs any more")
            return done
        except BaseException:
            with suppress(OSError):  # of a start that was refused, or found nothing to do, nothing is left
                if os.listdir(parts) == [".lock"]:
                    shutil.rmtree(parts)
            raise


def _make(request: Request, files: Sequence[FoundFile], lock: Lock, progress: Progress) -> dict[Path, TokenInfo]:
    texts: list[tuple[Any, ...]] = []
    for file in files:
        # Lines of JSON were once known by the name .jsonl alone, and what was made of others as one text is not this.
        by_content = file.format == "lines" and ".jsonl" not in file.name.lower()
        texts.append((file.source, file.name, file.size, *(["lines"] if by_content else [])))
    made_from = key_of([request.decisive, request.drop_duplicates, texts])
    if done := _finished(request, made_from, files, began_before=any(lock.path.parent.glob("*.json"))):
        progress.message(f"{request.out} is finished: nothing is left to do")
        return done
    parts = _write_parts(request, files, progress)
    if not lock.is_in_place():
        raise UsageError(f"{lock.path} was removed: another process may be at work there. Start again.")
    return _join(request, parts, made_from, files, progress)


def _lock(request: Request, parts: Path, progress: Progress) -> Lock:
    while True:
        parts.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # who held it is done, and has removed the folder
            what, other = f"the prefix {request.out}", "give another --out"
            return take_lock(parts / ".lock", what, other, progress.message, request.shared)


def _finished(
    request: Request, made_from: str, files: Sequence[FoundFile], began_before: bool
) -> dict[Path, TokenInfo] | None:
    """The sidecars, if an earlier start has made the very same; None if there is something to do.

    Raises `UsageError` if other files are in the way, and not to be overwritten.
    """
    for prefix in [] if request.shared else request.outputs:
        paths = paths_of(prefix)
        there = [path for path in (paths.bin, paths.idx, paths.sidecar) if path.exists()]
        is_ours = not there or (began_before and paths.idx not in there)
        if not is_ours and (reason := _difference(prefix, made_from, files)):
            if request.force:
                return None
            fix = "Give another --out, or add --force to overwrite it."
            raise UsageError(f"{there[0]} is there already, and {reason}. {fix}")
    opened = {prefix: TokenFile.open(prefix).info for prefix in request.outputs if paths_of(prefix).idx.exists()}
    return {prefix: info for prefix, info in opened.items() if info} if len(opened) == len(request.outputs) else None


def _difference(prefix: Path, made_from: str, files: Sequence[FoundFile]) -> str:
    """Why a token file that is there is not what is asked for; empty if it is."""
    try:
        info = TokenFile.open(prefix).info
    except DataError as error:
        return f"is not whole ({error})"
    if info is None:
        return "titanlite did not make it"
    if info.made_from != made_from:
        return "it is of other inputs or settings"
    made_ns = paths_of(prefix).sidecar.stat().st_mtime_ns
    newer = next((file.path for file in files if file.modified_ns > made_ns), None)
    return f"{newer} is newer" if newer else ""


def _write_parts(request: Request, files: Sequence[FoundFile], progress: Progress) -> list[PartFile]:
    """The parts of all units, in order; those that are not there yet are written."""
    with WorkerPool(request.workers) as workers:
        units = _units(files, workers)
        missing = [unit for unit in units if find_part(unit, request) is None]
        total = sum(unit.bytes for unit in units)
        progress.message(f"tokenizing {format_bytes(total)} of texts into {request.out}")
        progress.begin("tokenizing", total, total - sum(unit.bytes for unit in missing))
        for number, _ in workers.run(write_unit, [(unit, request) for unit in missing]):
            progress.advance(missing[number].bytes)
    parts = [part for unit in units if (part := find_part(unit, request))]
    assert len(parts) == len(units), "each unit that is done has its part"
    return parts


def unit_bytes(total: int) -> int:
    """How much a unit reads of inputs of `total` bytes: a power of two, so that a little more text changes nothing."""
    return min(max(SMALLEST_UNIT_BYTES, 1 << (max(total, 1) // UNITS).bit_length()), LARGEST_UNIT_BYTES)


def _units(files: Sequence[FoundFile], workers: WorkerPool) -> list[Unit]:
    """The inputs, cut and grouped, in order."""
    limit = unit_bytes(sum(file.size for file in files))
    cuts = [divide(file, limit) for file in files]
    _count_lines_before(files, cuts, workers)
    units: list[Unit] = []
    for file, cut in zip(files, cuts, strict=True):
        last = units[-1] if units and units[-1].files[-1].part is None else Unit((), limit + 1)
        if cut:
            units += [Unit((file._replace(part=part),), file.size // len(cut)) for part in cut]
        elif last.bytes + file.size <= limit and len(last.files) < UNIT_FILES:
            units[-1] = Unit((*last.files, file), last.bytes + file.size)
        else:
            units.append(Unit((file,), file.size))
    return units


def _count_lines_before(files: Sequence[FoundFile], cuts: Sequence[list[Part]], workers: WorkerPool) -> None:
    """Set `before` of parts of lines."""
    of_lines = [(file.path, cut) for file, cut in zip(files, cuts, strict=True) if file.format == "lines"]
    counts = iter(sorted(workers.run(count_newlines, [(path, *part[:2]) for path, cut in of_lines for part in cut])))
    for _, cut in of_lines:
        befores = accumulate((count for _, count in islice(counts, len(cut))), initial=0)
        cut[:] = [part._replace(before=before) for part, before in zip(cut, befores, strict=False)]


def _join(
    request: Request, parts: Sequence[PartFile], made_from: str, files: Sequence[FoundFile], progress: Progress
) -> dict[Path, TokenInfo]:
    first_ones = _first_of_equals(parts) if request.drop_duplicates else None
    text_bytes = dict.fromkeys(request.outputs, 0)
    progress.begin("joining", sum(part.summary["token_bytes"] for part in parts), 0)
    with ExitStack() as stack:
        size = request.tokenizer.vocab_size
        writers = {prefix: stack.enter_context(TokenWriter(prefix, size)) for prefix in request.outputs}
        at = 0
        for part in parts:
            records = np.fromfile(part.records, RECORD)
            kept = np.ones(len(records), np.bool_) if first_ones is None else first_ones[at : at + len(records)]
            at += len(records)
            for prefix, writer in writers.items():
                chosen = kept & (records["held"] == (prefix != request.out))
                text_bytes[prefix] += int(records["bytes"][chosen].sum())
                _copy(part, records["tokens"], chosen, writer)
            progress.advance(part.summary["token_bytes"])
        total = sum(writer.documents for writer in writers.values())
        if not total:
            raise DataError("the inputs hold no text at all; give some with text in it.")
        if empty := [prefix for prefix, writer in writers.items() if not writer.documents]:
            which, key = "all" if empty[0] == request.out else "none", "--held-out (data.validation_percent)"
            problem = f"{which} of the {total:,} documents are held out by {key} {request.held_out_percent:g}"
            fix = "give more documents, or another percentage"
            raise DataError(f"{problem}, which goes by a hash of their names; {fix}.")
        shared: dict[str, Any] = {
            "made_from": made_from,
            "tokenizer": request.tokenizer,
            "duplicates": at - total,
            "bad_lines": sum(part.summary["bad"] for part in parts),
            "bad_line_examples": tuple(line for part in parts for line in part.summary["examples"])[:EXAMPLES],
            "sources": tuple(_sources(request.inputs, parts, files)),
        }
        return {prefix: writer.commit(text_bytes=text_bytes[prefix], **shared) for prefix, writer in writers.items()}


def _first_of_equals(parts: Sequence[PartFile]) -> npt.NDArray[np.bool_]:
    """Of all documents in order, which are not equal to an earlier one; takes about 50 bytes of memory a document."""
    high, low = (
        np.concatenate([np.fromfile(part.records, RECORD)[half] for part in parts]) for half in ("high", "low")
    )
    order = np.lexsort((low, high))  # stable: of equal ones the first stays first
    high, low = high[order], low[order]
    first = np.ones(len(order), np.bool_)
    first[order[1:]] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    return first


def _copy(part: PartFile, lengths: Int64, chosen: npt.NDArray[np.bool_], writer: TokenWriter) -> None:
    """Append the chosen documents of a part."""
    if not chosen.any():
        return
    tokens = token_file.FileArray(token_file.OpenFile(part.tokens), 0, writer.dtype, int(lengths.sum()))
    ends = np.cumsum(lengths)
    changes = np.flatnonzero(np.diff(chosen, prepend=False, append=False))  # where runs of chosen ones begin and end
    for first, stop in zip(changes[::2], changes[1::2], strict=True):
        for start in range(ends[first] - lengths[first], end := int(ends[stop - 1]), token_file.BLOCK):
            writer.extend(tokens[start : min(start + token_file.BLOCK, end)])
    writer.end_documents(lengths[chosen])


def _sources(
    inputs: Sequence[str], parts: Sequence[PartFile], files: Sequence[FoundFile]
) -> Iterator[token_file.SourceInfo]:
    documents, hashes, counts, sizes = (Counter[int]() for _ in range(4))
    for file in files:
        counts[file.source] += 1
        sizes[file.source] += file.size
    for part in parts:
        for source, count, total in part.summary["sources"]:
            documents[part.source + source] += count
            hashes[part.source + source] += int(total, 16)
    for source, entry in enumerate(inputs):
        yield token_file.SourceInfo(
            path=entry.encode("utf-8", "backslashreplace").decode(), files=counts[source], bytes=sizes[source],
            documents=documents[source], texts_xxh3_128=f"{hashes[source] % 2**128:032x}",
        )  # fmt: skip


def texts_folder(run: Run) -> Path:
    """Where the runs beside this one find them too."""
    return expand(run.output_dir) / ".texts"


def open_tokenized(
    paths: Sequence[str], section: Data, tokenizer: Tokenizer, percent: float, folder: Path
) -> tuple[TokenFile, ...] | None:
    """Texts of a recipe that are too many for each rank's memory, as token files; if `percent` is not 0, those held out
    come second. The first process to come makes them, on all cores; others, on other machines too, wait for it.

    None for what is small, comes from no files, or is of files that are single documents and all on one side.
    """
    if any(entry in CORPORA for entry in paths):
        return None
    files = FileFinder(section.text_key).find_all(paths)
    sides = {is_held_out(file.name, percent) if file.format == "text" else None for file in files}
    if sum(file.size for file in files) <= IN_MEMORY_BYTES or (percent and len(sides) == 1 and None not in sides):
        return None
    request = Request(
        inputs=tuple(paths), out=folder, tokenizer=token_file.TokenizerInfo.of(section.tokenizer, tokenizer),
        separator=section.separator, special_tokens=tuple(section.special_tokens), text_key=section.text_key,
        held_out_percent=percent, workers=cores(), shared=True,
    )  # fmt: skip
    # Another name wherever the tokens may be others.
    texts = [(file.name, os.path.abspath(file.path), file.size, file.modified_ns) for file in files]
    request = replace(request, out=folder / key_of([PART_VERSION, request.decisive, texts]))
    if not paths_of(request.out).idx.exists():  # which is the last to be there
        prepare(request, files)
    return tuple(map(TokenFile.open, reversed(request.outputs)))
