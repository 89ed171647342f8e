"""The readers: text as it is, lines of JSON, rows of Parquet and of Arrow (streams, as datasets are saved, and files).

Lines that are not packed, and Parquet, can be read in parts, so that many processes share a large file.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from titanlite.corpus.corpora import READERS, Document, FoundFile, Part, Reader
from titanlite.errors import DataError
from titanlite.registry import did_you_mean

PACKED = {".gz": "gzip", ".zst": "zstd"}
BLOCK_BYTES = 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors begin a file with it, and it is not JSON
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
ROWS_AT_ONCE = 1_000


@contextmanager
def open_unpacked(path: Path, block_bytes: int = BLOCK_BYTES) -> Iterator[IO[bytes]]:
    """The file's content, unpacked by blocks. What is read within, and cannot be, is a `DataError` with the place."""
    codec = PACKED.get(path.suffix.lower())
    with wrap_read_errors(path), open(path, "rb", buffering=block_bytes if codec else -1) as file:
        if codec is None:
            yield file
            return
        import pyarrow

        # Unlike zstandard's reader, Arrow's does not take a file that was cut short for a whole one.
        yield io.BufferedReader(pyarrow.CompressedInputStream(file, codec), block_bytes)


def read_unpacked(path: Path, limit: int = -1) -> bytes:
    """The whole of it, or its first `limit` bytes."""
    with open_unpacked(path, BLOCK_BYTES if limit < 0 else limit) as file:
        return file.read(limit)


@contextmanager
def wrap_read_errors(path: Path, kind: type[Exception] = OSError) -> Iterator[None]:
    """Raise as `DataError` what cannot be read. Arrow's errors of damaged tables are of any `kind`."""
    try:
        yield
    except DataError:
        raise
    except kind as error:
        why = f"cannot be read ({getattr(error, 'strerror', '')}); mend it or its permissions, or leave it out."
        if getattr(error, "errno", None) is None:
            hint = ", or unpack it by zstd -d --long=31" if "too much memory" in str(error) else ""
            why = f"damaged or cut short ({error}); fetch or make it again{hint}, or leave it out."
        raise DataError(f"{path}: {why}") from error


def read_documents(
    file: FoundFile, text_key: str, on_bad: Callable[[DataError], None] | None = None
) -> Iterator[Document]:
    """The documents of a file, or of a part of it, that are not empty; named as it is, or `name:line`, `name:row`.

    A line or row without a text is passed over after a call of `on_bad`; if there is none, it is a `DataError`.
    """
    reader: Reader = READERS.get(file.format)
    for number, text in reader.read(file.path, text_key, file.part):
        if isinstance(text, DataError):
            if on_bad is None:
                raise text
            on_bad(text)
        elif text:
            yield Document(f"{file.name}:{number}" if number else file.name, text)


def divide(file: FoundFile, part_bytes: int) -> list[Part]:
    """Parts of about `part_bytes`; none of a file that is read as a whole."""
    reader: Reader = READERS.get(file.format)
    if reader.divide is None or file.size <= part_bytes or file.path.suffix.lower() in PACKED:
        return []
    return reader.divide(file.path, file.size, part_bytes)


def _read_lines(path: Path, text_key: str, part: Part | None) -> Iterator[tuple[int, bytes | DataError]]:
    for number, line in read_lines(path, part):
        try:
            yield number, _text_of(line, text_key)
        except DataError as error:
            yield number, DataError(f"{path}:{number}: {error}")


def _divide_lines(path: Path, size: int, part_bytes: int) -> list[Part]:
    """The newlines before each part are not counted here: `before` is 0."""
    return [Part(first, min(first + part_bytes, size), 0) for first in range(0, size, part_bytes)]


def count_newlines(path: Path, first: int, stop: int) -> int:
    """Newlines among bytes `first` to `stop`. Raises `DataError`."""
    with wrap_read_errors(path), open(path, "rb") as file:
        file.seek(first)
        sizes = (min(BLOCK_BYTES, stop - at) for at in range(first, stop, BLOCK_BYTES))
        return sum(file.read(size).count(b"\n") for size in sizes)


def read_lines(path: Path, part: Part | None = None) -> Iterator[tuple[int, bytes]]:
    """Numbers and contents of the lines that hold anything but white space."""
    with open_unpacked(path) as file:
        number, at, stop = 0, 0, part.stop if part else sys.maxsize
        if part and part.first:
            file.seek(part.first - 1)
            rest = file.readline(stop - part.first + 1)  # of the line before; if it is long, of no line but that
            number, at = part.before + (rest != b"\n"), part.first - 1 + len(rest)
        while at < stop and (line := file.readline()):
            at += len(line)
            number += 1
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if line := line.rstrip():
                yield number, line


def _text_of(line: bytes, text_key: str) -> bytes:
    """The text of one line, in UTF-8. Raises `DataError`."""
    try:
        record = json.loads(line.decode())
        if not isinstance(record, dict):
            raise DataError(f'a JSON object is wanted, such as {{"{text_key}": "..."}}; mend or delete the line.')
        if text_key not in record:
            raise _missing("no field", text_key, list(record))
        text = record[text_key]
        if not isinstance(text, str):
            kind = type(text).__name__
            raise DataError(f"field '{text_key}' is not a string but {kind}; set data.text_key, or mend the line.")
        return text.encode()
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:#04x} at position {error.start + 1} of the line"
        why = f"not UTF-8: {byte}; convert the file to UTF-8."
    except UnicodeEncodeError as error:
        why = f"field '{text_key}' has half of a surrogate pair at character {error.start + 1}; mend or delete it."
    except json.JSONDecodeError as error:
        fix = "a .jsonl file has one JSON object a line: mend or delete this one (plain text is .txt, say)."
        why = f"invalid JSON at column {error.colno}: {error.msg}; {fix}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested thousands deep
        why = f"JSON that cannot be read ({error}); mend or delete the line."
    raise DataError(why)


def _missing(what: str, text_key: str, fields: list[str]) -> DataError:
    """For a record, or table, without the text."""
    hint = did_you_mean(text_key, fields) or f"it has {', '.join(map(repr, fields[:8])) or 'none'}"
    return DataError(f"{what} '{text_key}' ({hint}); set data.text_key (--text-key) to the field that holds the text.")


def _divide_parquet(path: Path, size: int, part_bytes: int) -> list[Part]:
    parts: list[Part] = []
    with wrap_read_errors(path, Exception):
        from pyarrow.parquet import ParquetFile

        metadata = ParquetFile(path).metadata
        first = rows = before = held = 0
        for index in range(metadata.num_row_groups):
            held += metadata.row_group(index).total_byte_size
            rows += metadata.row_group(index).num_rows
            if held >= part_bytes or index == metadata.num_row_groups - 1:
                parts.append(Part(first, index + 1, before))
                first, before, held, rows = index + 1, before + rows, 0, 0
    return parts


def _read_rows(
    read_columns: Callable[..., Iterator[Any]], path: Path, text_key: str, part: Part | None
) -> Iterator[tuple[int, bytes | DataError]]:
    number = part.before if part else 0
    with wrap_read_errors(path, Exception):
        import pyarrow  # takes long

        for column in read_columns(path, text_key, part):
            # Offsets of a damaged file may point anywhere in this process's memory, so nothing is read before.
            column.validate(full=True)
            for text in column.cast(pyarrow.large_binary()).to_pylist():
                number += 1
                if text is None:
                    text = DataError(f"{path}:{number}: '{text_key}' is null; fill or delete the row.")
                yield number, text


def _parquet_columns(path: Path, text_key: str, part: Part | None) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(path, page_checksum_verification=True)
    _text_column(path, file.schema_arrow, text_key)
    groups = range(part.first, part.stop) if part else range(file.num_row_groups)
    for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=list(groups), columns=[text_key], use_threads=False):
        yield batch.column(text_key)  # a field of a struct may have the same path


def _arrow_columns(path: Path, text_key: str, part: Part | None) -> Iterator[Any]:
    from pyarrow import OSFile, ipc

    with OSFile(str(path)) as file:  # not mapped: a file that is cut while it is read must not be a SIGBUS
        head = file.read(6)
        if head.startswith(b"FEA1"):
            raise DataError(f"{path}: Feather of version 1, which libraries stop reading; write it again as version 2.")
        is_file = head == b"ARROW1"
        read = ipc.open_file if is_file else ipc.open_stream
        file.seek(0)
        column = _text_column(path, read(file).schema, text_key)
        file.seek(0)
        batches = read(file, options=ipc.IpcReadOptions(included_fields=[column], use_threads=False))
        for batch in map(batches.get_batch, range(batches.num_record_batches)) if is_file else batches:
            yield batch.column(0)


def _text_column(path: Path, schema: Any, text_key: str) -> int:
    """Which column has the text. Raises `DataError` if none has that name, more than one, or one of something else."""
    found = schema.get_all_field_indices(text_key)
    if not found:
        raise _missing(f"{path}: no column", text_key, schema.names)
    if len(found) > 1:
        raise DataError(f"{path}: column '{text_key}' is there {len(found)} times; name each otherwise.")
    kind = schema.field(found[0]).type
    of = kind.value_type if str(kind).startswith("dictionary<") else kind
    if str(of) not in TEXT_TYPES:
        raise DataError(f"{path}: column '{text_key}' is not text but {kind}; set data.text_key to one that is.")
    return int(found[0])


TEXT = Reader(lambda path, text_key, part: iter([(0, read_unpacked(path))]))
JSON_LINES = Reader(_read_lines, _divide_lines)
PARQUET = Reader(partial(_read_rows, _parquet_columns), _divide_parquet)
ARROW = Reader(partial(_read_rows, _arrow_columns))
