"""`titanlite data prepare`: texts into token files, by many processes, to the same bytes whatever happens on the way.

The inputs are cut into units by what they are, not by who is there to read them; finished units lie as parts in
`PREFIX.parts` and are joined in order. A start after a kill finds them there. What a unit does, `units` knows.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from titanlite.corpus.corpora import CORPORA
from titanlite.corpus.corpora.files import Asked, FileReader, FoundFile
from titanlite.corpus.corpora.formats import Part, divide
from titanlite.corpus.file_array import FileArray, OpenFile
from titanlite.corpus.progress import Progress
from titanlite.corpus.token_file import (
    BLOCK,
    HELD_OUT,
    Int64,
    Paths,
    SourceInfo,
    TokenFile,
    TokenInfo,
    TokenizerInfo,
    TokenWriter,
    paths_of,
)
from titanlite.corpus.tokenizers import Tokenizer
from titanlite.corpus.units import EXAMPLES, PartFile, Piece, Settings, Unit, key_of, part_at
from titanlite.corpus.workers import Workers, count_task, unit_task
from titanlite.errors import DataError, UsageError
from titanlite.files import cause, take_lock

SMALLEST_UNIT_BYTES, LARGEST_UNIT_BYTES = 2**22, 2**28
UNITS = 1_024
"""About so many are made of inputs that are neither small nor huge: enough for any number of processes."""
UNIT_FILES = 4_096


@dataclass(frozen=True)
class Request:
    """What is to be prepared."""

    inputs: tuple[str, ...]
    """Files, folders and globs."""
    out: Path
    """The prefix."""
    settings: Settings
    drop_duplicates: bool = False
    workers: int = 1
    force: bool = False
    """Whether token files of other inputs or settings, that are there, are to go."""

    @property
    def outputs(self) -> list[Path]:
        """Prefixes: what is held out, if anything is, and the rest."""
        held = [self.out.with_name(self.out.name + HELD_OUT)] if self.settings.held_out_percent else []
        return [*held, self.out]


def prepare(request: Request, tokenizer: Tokenizer, progress: Progress) -> dict[Path, TokenInfo]:
    """Make the token files, or go on where an earlier start of the same request stopped; their sidecars by prefix.

    `tokenizer` is that of the settings. Raises `DataError` for texts that cannot be read and for a disk that takes no
    more, `UsageError` for what is in the way; parts that are done stay, and serve the next start.
    """
    files = _find(request.inputs, request.settings.text_key)
    # What was made of JSON lines when they were known by the name .jsonl alone, and else one text, is not the same.
    by_content = [file.form == "lines" and ".jsonl" not in file.name.lower() for _, file in files]
    texts = [
        (source, file.name, file.size, *(["lines"] if lines else []))
        for (source, file), lines in zip(files, by_content, strict=True)
    ]
    made_from = key_of([request.settings.decisive, request.drop_duplicates, texts])
    parts = paths_of(request.out).parts
    with _refusals_explained(request.out):
        parts.mkdir(parents=True, exist_ok=True)
        lock = take_lock(parts / ".lock", f"the prefix {request.out}", "give another --out", progress.message)
        began_before = any(parts.glob("*.json"))
        try:
            done = _finished(request, made_from, files, began_before)
            if done is None:
                units, found = _write_parts(request, files, parts, progress)
                if not lock.is_in_place():
                    raise UsageError(f"{lock.path} was removed: another process may be at work there. Start again.")
                done = _join(request, tokenizer, units, found, made_from, files, progress)
            else:
                progress.message(f"{request.out} is finished: nothing is left to do")
            _remove(parts, progress)
        except BaseException:
            with suppress(OSError):  # of a start that was refused, or found nothing to do, nothing is left
                if os.listdir(parts) == [".lock"]:
                    shutil.rmtree(parts)
            raise
        finally:
            lock.close()
    return done


def _find(inputs: Sequence[str], text_key: str) -> list[tuple[int, FoundFile]]:
    """All files in order, each with the number of the input that names it."""
    reader = FileReader(text_key, Asked("INPUT", "--text-key", ()))
    named = next((entry for entry in inputs if entry in CORPORA and not Path(entry).exists()), None)
    if named is not None:
        raise UsageError(f"'{named}' is for recipes, which read it as it is; give files, folders or globs.")
    return [(source, file) for source, entry in enumerate(inputs) for file in reader.files(entry)]


def _finished(
    request: Request, made_from: str, files: Sequence[tuple[int, FoundFile]], began_before: bool
) -> dict[Path, TokenInfo] | None:
    """The sidecars, if an earlier start has made the very same; None if there is something to do.

    Raises `UsageError` if other files are in the way and the user did not say that they may go.
    """
    for prefix in request.outputs:
        paths = paths_of(prefix)
        there = [path for path in (paths.bin, paths.idx, paths.sidecar) if path.exists()]
        if not there or (began_before and paths.idx not in there):
            continue
        reason = _difference(paths, prefix, made_from, files)
        if reason and not request.force:
            way_out = "Give another --out, or add --force to overwrite it."
            raise UsageError(f"{there[0]} is there already, and {reason}. {way_out}")
        if reason:
            return None
    opened = {prefix: TokenFile.open(prefix).info for prefix in request.outputs if paths_of(prefix).idx.exists()}
    return {prefix: info for prefix, info in opened.items() if info} if len(opened) == len(request.outputs) else None


def _difference(paths: Paths, prefix: Path, made_from: str, files: Sequence[tuple[int, FoundFile]]) -> str:
    """Why a token file that is there is not what is asked for; empty if it is."""
    try:
        info = TokenFile.open(prefix).info
    except DataError as error:
        return f"is not whole ({error})"
    if info is None:
        return "titanlite did not make it"
    if info.made_from != made_from:
        return "it is of other inputs or settings"
    made_ns = paths.sidecar.stat().st_mtime_ns
    newer = next((file.path for _, file in files if file.modified_ns > made_ns), None)
    return f"{newer} is newer" if newer else ""


def _write_parts(
    request: Request, files: Sequence[tuple[int, FoundFile]], folder: Path, progress: Progress
) -> tuple[list[Unit], list[PartFile]]:
    """All units and their parts, in order; those that are not there yet are written."""
    with Workers(request.workers, request.settings, folder) as workers:
        units = _units(files, workers)
        keys = [unit.key(request.settings) for unit in units]
        there = [part_at(folder, key) for key in keys]
        missing = [index for index, part in enumerate(there) if part is None]
        total = sum(unit.bytes for unit in units)
        progress.begin("tokenising", total, total - sum(units[index].bytes for index in missing))
        for number, _ in workers.run([unit_task(units[index]) for index in missing]):
            index = missing[number]
            there[index] = part_at(folder, keys[index])
            progress.advance(units[index].bytes)
    found = [part for part in there if part is not None]
    assert len(found) == len(units), "each unit that is done has its part"
    return units, found


def unit_bytes(total: int) -> int:
    """How much a unit reads of inputs of so many bytes: a power of two, so that a little more text changes nothing."""
    return min(max(SMALLEST_UNIT_BYTES, 1 << (max(total, 1) // UNITS).bit_length()), LARGEST_UNIT_BYTES)


def _units(files: Sequence[tuple[int, FoundFile]], workers: Workers) -> list[Unit]:
    """The inputs, cut and grouped, in order."""
    limit = unit_bytes(sum(file.size for _, file in files))
    parts = [divide(file.path, file.form, file.size, limit) for _, file in files]
    parts = _counted(files, parts, workers)
    units: list[Unit] = []
    group: list[tuple[int, FoundFile]] = []
    grouped = 0
    for (source, file), cut in zip(files, parts, strict=True):
        if group and (cut is not None or grouped + file.size > limit or len(group) == UNIT_FILES):
            units.append(_unit(group))
            group, grouped = [], 0
        if cut is None:
            group.append((source, file))
            grouped += file.size
        else:
            units += [_unit([(source, file)], part, file.size // len(cut)) for part in cut]
    return [*units, _unit(group)] if group else units


def _unit(files: Sequence[tuple[int, FoundFile]], part: Part | None = None, size: int | None = None) -> Unit:
    first = files[0][0]
    pieces = tuple(
        Piece(source - first, f.name, str(f.path), f.form, f.size, f.modified_ns, part) for source, f in files
    )
    return Unit(pieces, first, sum(file.size for _, file in files) if size is None else size)


def _counted(
    files: Sequence[tuple[int, FoundFile]], parts: Sequence[list[Part] | None], workers: Workers
) -> list[list[Part] | None]:
    """The same parts, those of lines knowing how many lines are before them."""
    lines = [
        (index, part) for index, (_, file) in enumerate(files) if file.form == "lines" for part in parts[index] or ()
    ]
    counts = dict(workers.run([count_task(files[index][1].path, part) for index, part in lines]))
    newlines: dict[int, list[int]] = {}
    for number, (index, _) in enumerate(lines):
        newlines.setdefault(index, [0]).append(counts[number])
    return [
        [part._replace(before=before) for part, before in zip(cut or (), accumulate(newlines[index]), strict=False)]
        if index in newlines
        else cut
        for index, cut in enumerate(parts)
    ]


def _join(
    request: Request,
    tokenizer: Tokenizer,
    units: Sequence[Unit],
    parts: Sequence[PartFile],
    made_from: str,
    files: Sequence[tuple[int, FoundFile]],
    progress: Progress,
) -> dict[Path, TokenInfo]:
    """The parts as token files."""
    first_ones = _first_of_equals(parts) if request.drop_duplicates else None
    writers: dict[Path, TokenWriter] = {}
    text_bytes = dict.fromkeys(request.outputs, 0)
    progress.begin("joining", sum(part.summary["token_bytes"] for part in parts), 0)
    try:
        for prefix in request.outputs:
            writers[prefix] = TokenWriter(prefix, tokenizer.vocab_size)
        at = 0
        for part in parts:
            records = part.load()
            kept = np.ones(len(records), np.bool_) if first_ones is None else first_ones[at : at + len(records)]
            at += len(records)
            for prefix, writer in writers.items():
                chosen = kept & (records["held"] == (prefix != request.out))
                text_bytes[prefix] += int(records["bytes"][chosen].sum())
                _copy(part, records["tokens"], chosen, writer)
            progress.advance(part.summary["token_bytes"])
        _require_documents(request, {prefix: writer.documents for prefix, writer in writers.items()})
        kept_documents = sum(writer.documents for writer in writers.values())
        shared: dict[str, Any] = {
            "made_from": made_from,
            "tokenizer": TokenizerInfo(
                name=request.settings.tokenizer, fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size, separator=tokenizer.separator,
            ),
            "duplicates": at - kept_documents,
            "bad_lines": sum(part.summary["bad"] for part in parts),
            "bad_line_examples": tuple(line for part in parts for line in part.summary["examples"])[:EXAMPLES],
            "sources": _sources(request.inputs, units, parts, files),
        }  # fmt: skip
        return {prefix: writer.commit(text_bytes=text_bytes[prefix], **shared) for prefix, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise


def _first_of_equals(parts: Sequence[PartFile]) -> npt.NDArray[np.bool_]:
    """Of all documents in order, which are not equal to an earlier one; takes about 50 bytes of memory a document."""
    high, low = (np.concatenate([part.load()[half] for part in parts]) for half in ("high", "low"))
    order = np.lexsort((low, high))  # stable: of equal ones the first stays first
    high, low = high[order], low[order]
    first = np.ones(len(order), np.bool_)
    first[order[1:]] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    return first


def _copy(part: PartFile, lengths: Int64, chosen: npt.NDArray[np.bool_], writer: TokenWriter) -> None:
    """Append the chosen documents of a part."""
    if not chosen.any():
        return
    tokens = FileArray(OpenFile(part.tokens), 0, writer.dtype, int(lengths.sum()))
    ends = np.cumsum(lengths)
    changes = np.flatnonzero(np.diff(chosen, prepend=False, append=False))  # where runs of chosen ones begin and end
    for first, stop in zip(changes[::2], changes[1::2], strict=True):
        for start in range(ends[first] - lengths[first], end := int(ends[stop - 1]), BLOCK):
            writer.extend(tokens[start : min(start + BLOCK, end)])
    writer.end_documents(lengths[chosen])


def _require_documents(request: Request, documents: dict[Path, int]) -> None:
    total = sum(documents.values())
    if not total:
        raise DataError("the inputs hold no text at all; give some with text in it.")
    percent = request.settings.held_out_percent
    for prefix, count in documents.items():
        if not count:
            which = "all" if prefix == request.out else "none"
            raise DataError(
                f"{which} of the {total:,} documents are held out by --held-out {percent:g}, which goes by a hash of "
                "their names; give more documents, another percentage, or no --held-out."
            )


def _sources(
    inputs: Sequence[str], units: Sequence[Unit], parts: Sequence[PartFile], files: Sequence[tuple[int, FoundFile]]
) -> tuple[SourceInfo, ...]:
    documents, hashes = [0] * len(inputs), [0] * len(inputs)
    for unit, part in zip(units, parts, strict=True):
        for source, count, total in part.summary["sources"]:
            documents[unit.source + source] += count
            hashes[unit.source + source] += int(total, 16)
    sizes: list[list[int]] = [[] for _ in inputs]
    for source, file in files:
        sizes[source].append(file.size)
    return tuple(
        SourceInfo(
            path=entry.encode("utf-8", "backslashreplace").decode(), files=len(sizes[source]), bytes=sum(sizes[source]),
            documents=documents[source], texts_xxh3_128=f"{hashes[source] % 2**128:032x}",
        )
        for source, entry in enumerate(inputs)
    )  # fmt: skip


def _remove(parts: Path, progress: Progress) -> None:
    try:
        shutil.rmtree(parts)
    except OSError as error:
        progress.message(f"cannot remove {parts}, which nothing needs any more: {cause(error, parts)}")


@contextmanager
def _refusals_explained(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write {error.filename or out}: {cause(error, out)}. What is done stays done: mend that, and the "
            "same command goes on."
        ) from error
