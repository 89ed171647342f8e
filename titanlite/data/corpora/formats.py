"""What is in a file: text (any bytes, one document), JSONL (UTF-8, one document a line), Parquet and Arrow (one a row).

Text and JSONL may be packed by gzip or zstd. JSONL that is not, and Parquet, can be read in parts, which together yield
what the whole does: so many processes share a large file.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from titanlite.data.corpora import Document
from titanlite.errors import DataError
from titanlite.registry import did_you_mean

Form = Literal["text", "lines", "parquet", "arrow"]

TEXT_SUFFIXES = (".txt", ".text", ".md", ".jsonl")
PACKED = (".gz", ".zst")
FOLDER_SUFFIXES = (*TEXT_SUFFIXES, *(text + packed for text in TEXT_SUFFIXES for packed in PACKED), ".parquet")
"""What is taken from a folder; a file named by itself or by a glob is taken as text whatever its suffix is."""
BINARY_SUFFIXES = (".xz", ".bz2", ".zip", ".tar", ".tgz", ".npy", ".bin", ".idx", ".pdf")
"""Refused: training on a compressed file's bytes would go unnoticed for a long while."""

ROWS_AT_ONCE = 1_000
BLOCK_BYTES = 2**20


class Part(NamedTuple):
    """Of a JSONL file the lines that begin in a range of its bytes; of a Parquet file a range of its row groups."""

    first: int
    stop: int
    before: int
    """Newlines, or rows, of the file before it: from them its documents have their numbers."""


def form_of(path: Path) -> Form | None:
    """How a file is read, by its name; None for what is no text."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return "parquet"
    if suffix == ".arrow":
        return "arrow"
    if suffix in PACKED:
        suffix = Path(path.stem).suffix.lower()
        if suffix in (*PACKED, ".parquet", ".arrow"):
            return None
    if suffix in BINARY_SUFFIXES:
        return None
    return "lines" if suffix == ".jsonl" else "text"


def refuse(error: DataError) -> None:
    """What is done about a bad line where nothing else is asked for."""
    raise error


def documents(
    name: str,
    path: Path,
    form: Form,
    text_key: str,
    asked: str = "data.text_key",
    part: Part | None = None,
    bad: Callable[[DataError], None] = refuse,
) -> Iterator[Document]:
    """The documents of a file, or of a part of it, that are not empty; named `name`, or `name:line`, `name:row`.

    A line or row without a text is given to `bad`, and passed over if that returns; `asked` is what the user calls the
    setting of `text_key`. Raises `DataError` with file and position for what cannot be read.
    """
    if form == "text":
        if content := _whole(path):
            yield Document(name, content)
        return
    for number, found in _lines(path, part) if form == "lines" else _rows(path, form, text_key, asked, part):
        text: bytes | None = found
        if form == "lines":
            try:
                text = _text_of(found or b"", text_key, asked, f"{path}:{number}")
            except DataError as error:
                bad(error)
                continue
        elif found is None:
            bad(DataError(f"{path}:{number}: '{text_key}' is null; fill or delete the row."))
        if text:
            yield Document(f"{name}:{number}", text)


def divide(path: Path, form: Form, size: int, part_bytes: int) -> list[Part] | None:
    """Parts of about so many bytes, each of a file that can be read so; None for one that is read as a whole.

    Of a JSONL file nobody has counted the newlines: each part's `before` is 0. Raises `DataError`.
    """
    if size <= part_bytes or form in ("text", "arrow") or path.suffix.lower() in PACKED:
        return None
    if form == "lines":
        return [Part(first, min(first + part_bytes, size), 0) for first in range(0, size, part_bytes)]
    arrow = _pyarrow()
    with _arrow_refusals(path):
        groups = arrow.parquet.ParquetFile(path).metadata
        parts: list[Part] = []
        first = rows = before = held = 0
        for index in range(groups.num_row_groups):
            held += groups.row_group(index).total_byte_size
            rows += groups.row_group(index).num_rows
            if held >= part_bytes or index == groups.num_row_groups - 1:
                parts.append(Part(first, index + 1, before))
                first, before, held, rows = index + 1, before + rows, 0, 0
    return parts


def count_newlines(path: Path, first: int, stop: int) -> int:
    """Newlines among bytes `first` to `stop`. Raises `DataError`."""
    count = 0
    with _refusals(path), open(path, "rb", buffering=0) as file:
        file.seek(first)
        while first < stop and (block := file.read(min(BLOCK_BYTES, stop - first))):
            count += block.count(b"\n")
            first += len(block)
    return count


def _whole(path: Path) -> bytes:
    if path.suffix.lower() in PACKED:
        with _opened(path) as file:
            return file.read()
    with _refusals(path):
        return path.read_bytes()


def _lines(path: Path, part: Part | None) -> Iterator[tuple[int, bytes]]:
    """Numbers and contents of the lines that hold anything but white space."""
    with _opened(path) as file:
        number, at, stop = 0, 0, None
        if part is not None and part.first:
            file.seek(part.first - 1)
            rest = file.readline(part.stop - part.first + 1)  # of the line before; if it is long, of no line but that
            number, at = part.before + (rest != b"\n"), part.first - 1 + len(rest)
        if part is not None:
            stop = part.stop
        while (stop is None or at < stop) and (line := file.readline()):
            at += len(line)
            number += 1
            if number == 1:  # some editors begin a file with a byte order mark, which is not JSON
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line := line.rstrip():
                yield number, line


def _rows(path: Path, form: Form, text_key: str, asked: str, part: Part | None) -> Iterator[tuple[int, bytes | None]]:
    """Numbers and texts of the rows."""
    arrow = _pyarrow()
    number = 0 if part is None else part.before
    with _arrow_refusals(path):
        if form == "parquet":
            file = arrow.parquet.ParquetFile(path)
            _require_text(path, file.schema_arrow, text_key, asked)
            groups = range(file.num_row_groups) if part is None else range(part.first, part.stop)
            batches = file.iter_batches(ROWS_AT_ONCE, row_groups=list(groups), columns=[text_key], use_threads=False)
        else:
            source = arrow.memory_map(str(path))
            batches = arrow.ipc.open_stream(source)
            _require_text(path, batches.schema, text_key, asked)
        for batch in batches:
            for text in batch.column(text_key).cast(arrow.large_binary()).to_pylist():
                number += 1
                yield number, text


def _require_text(path: Path, schema: Any, text_key: str, asked: str) -> None:
    """Raises `DataError` if the table has no such column, or one of something else than text."""
    if text_key not in schema.names:
        raise _no_field(f"{path}: no column", text_key, schema.names, asked)
    kind = schema.field(text_key).type
    of = getattr(kind, "value_type", kind)  # of a dictionary: what is in it
    if not str(of).endswith(("string", "binary", "string_view", "binary_view")):
        raise DataError(
            f"{path}: column '{text_key}' is not text but {kind}; set {asked} to the column that holds the text."
        )


def _no_field(what: str, text_key: str, fields: list[str], asked: str) -> DataError:
    hint = did_you_mean(text_key, fields) or f"it has {', '.join(map(repr, fields[:8])) or 'none'}"
    return DataError(f"{what} '{text_key}' ({hint}); set {asked} to the field that holds the text.")


def _text_of(line: bytes, text_key: str, asked: str, place: str) -> bytes:
    """The text of one JSONL line, in UTF-8. Raises `DataError` naming `place`."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not UTF-8: byte {error.object[error.start]:#04x} at position {error.start + 1} of the line; "
            "convert the file to UTF-8."
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: invalid JSON at column {error.colno}: {error.msg}; a .jsonl file holds one JSON object a line, "
            "mend or delete this one (plain text wants another suffix, such as .txt)."
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested thousands deep
        raise DataError(f"{place}: JSON that cannot be read ({error}); mend or delete the line.") from error
    if not isinstance(record, dict):
        raise DataError(f'{place}: a JSON object is wanted, such as {{"{text_key}": "..."}}; mend or delete the line.')
    if text_key not in record:
        raise _no_field(f"{place}: no field", text_key, list(record), asked)
    text = record[text_key]
    if not isinstance(text, str):
        raise DataError(
            f"{place}: field '{text_key}' is not a string but {type(text).__name__}; "
            f"set {asked} to the field that holds the text, or mend the line."
        )
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: field '{text_key}' has half of a surrogate pair at character {error.start + 1}, "
            "which is no text; mend or delete the line."
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's content, unpacked. What is read within, and cannot be, is a `DataError` with the place."""
    packed = path.suffix.lower()
    with _refusals(path), open(path, "rb") as file:
        if packed not in PACKED:
            yield file
            return
        try:
            if packed == ".gz":
                yield gzip.GzipFile(fileobj=file)  # type: ignore[misc] # is read as any other file of bytes
            else:
                yield io.BufferedReader(_Unpacked(file, path), BLOCK_BYTES)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(
                f"{path}: damaged or cut short near byte {file.tell():,}: {error}; fetch or pack it again."
            ) from error


class _Unpacked(io.RawIOBase):
    """What a zstd file unpacks to, frame after frame. The library's own reader takes one cut short for a whole one."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        import zstandard

        self._file = file
        self._errors = zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self._frame = self._new()
        self._rest = b""  # packed
        self._ready = memoryview(b"")
        self._begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._rest or self._file.read(BLOCK_BYTES // 8)
            if not packed:
                if self._begun:
                    raise EOFError("the file ends before its last frame does")
                return 0
            try:
                self._ready = memoryview(self._frame.decompress(packed))
            except self._errors as error:
                raise EOFError(str(error)) from error
            self._begun, self._rest = not self._frame.eof, b""
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, self._new()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    try:
        yield
    except gzip.BadGzipFile:  # an OSError, of which more can be said
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); mend its permissions, or leave it out.") from error


def _pyarrow() -> Any:
    """The library, which takes long to import, for those that read its files."""
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    return pyarrow


@contextmanager
def _arrow_refusals(path: Path) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (OSError, ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({error}); fetch or write it again, or leave it out.") from error
