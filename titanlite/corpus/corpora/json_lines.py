"""Lines of JSON objects in UTF-8, one of whose fields is a document."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from titanlite.corpus.corpora import BLOCK_BYTES, Part, Reader, missing_field, open_unpacked, wrap_os_errors
from titanlite.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # Some editors begin a file with it, and it is not JSON


def _read(path: Path, text_key: str, part: Part | None) -> Iterator[tuple[int, bytes | DataError]]:
    for number, line in read_lines(path, part):
        try:
            yield number, _text_of(line, text_key, f"{path}:{number}")
        except DataError as error:
            yield number, error


def _divide(path: Path, size: int, part_bytes: int) -> list[Part]:
    """The newlines before each part are not counted here: `before` is 0."""
    return [Part(first, min(first + part_bytes, size), 0) for first in range(0, size, part_bytes)]


JSON_LINES = Reader(_read, _divide)


def count_newlines(path: Path, first: int, stop: int) -> int:
    """Newlines among bytes `first` to `stop`. Raises `DataError`."""
    with wrap_os_errors(path), open(path, "rb") as file:
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


def _text_of(line: bytes, text_key: str, place: str) -> bytes:
    """The text of one line, in UTF-8. Raises `DataError` naming `place`."""
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
        raise missing_field(f"{place}: no field", text_key, list(record))
    text = record[text_key]
    if not isinstance(text, str):
        raise DataError(
            f"{place}: field '{text_key}' is not a string but {type(text).__name__}; set data.text_key (--text-key) to "
            "the field that holds the text, or mend the line."
        )
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: field '{text_key}' has half of a surrogate pair at character {error.start + 1}, "
            "which is no text; mend or delete the line."
        ) from error
