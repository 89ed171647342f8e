"""Text and JSONL from the user's own files: a path, a glob or a folder each time it is asked.

Text files may hold any bytes and are one document each; a JSONL file is one document a line, in UTF-8.
"""

from __future__ import annotations

import glob
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from titanlite.data.corpora import CORPORA, Document
from titanlite.errors import DataError
from titanlite.registry import did_you_mean

FOLDER_SUFFIXES = (".txt", ".text", ".md", ".jsonl")
"""What is taken from a folder; a file named by itself or by a glob is taken as text whatever its suffix is."""
BINARY_SUFFIXES = (".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".parquet", ".arrow", ".npy", ".bin", ".idx", ".pdf")
"""Refused: training on a compressed file's bytes would go unnoticed for a long while."""


class FileReader:
    """Reads entries of `data.corpus`; remembers what it has read, so that no file is read twice."""

    def __init__(self, text_key: str) -> None:
        self._text_key = text_key
        self._read: dict[str, str] = {}  # absolute path -> the entry that named it

    def read(self, entry: str) -> Iterator[Document]:
        """Documents of one entry, files in the order of their paths.

        Names are relative to what the entry fixes (the folder; the folder before a glob's first wildcard; for a
        file, its own name), so they stay the same when the corpus moves. Empty files and texts are passed over,
        except a file that the entry names itself. Raises `DataError`.
        """
        for name, path in _find(entry):
            self._claim(path, entry)
            if path.suffix.lower() in BINARY_SUFFIXES:
                raise DataError(
                    f"{path}: a {path.suffix} file is not text (named by data.corpus = '{entry}'); "
                    "unpack or convert it to text or JSONL, or leave it out."
                )
            with _reading(path):
                status = path.stat()
                if not stat.S_ISREG(status.st_mode):
                    raise DataError(f"{path}: not a regular file, and data must stay to be read again; leave it out.")
                if status.st_size == 0 and path == Path(entry).expanduser():
                    raise DataError(f"{path}: the file is empty; give a file with text in it, or leave it out.")
                if path.suffix.lower() == ".jsonl":
                    yield from self._lines(name, path)
                elif content := path.read_bytes():
                    yield Document(name, content)

    def _claim(self, path: Path, entry: str) -> None:
        place = os.path.abspath(path)
        if place in self._read:
            raise DataError(
                f"{path}: data.corpus names it twice, by '{self._read[place]}' and by '{entry}', "
                "and would read it twice; take one of them out."
            )
        self._read[place] = entry

    def _lines(self, name: str, path: Path) -> Iterator[Document]:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:  # some editors begin a file with a byte order mark, which is not JSON
                    line = line.removeprefix(b"\xef\xbb\xbf")
                line = line.rstrip()
                text = _text_of(line, self._text_key, f"{path}:{number}") if line else b""
                if text:
                    yield Document(f"{name}:{number}", text)


def _find(entry: str) -> list[tuple[str, Path]]:
    """The files of an entry as (name, path), in the order of their names."""
    path = Path(entry).expanduser()
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if glob.has_magic(entry):
            return _match(str(path), entry)
        if not isinstance(error, FileNotFoundError | NotADirectoryError | ValueError):
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); mend its permissions or data.corpus."
            ) from error
        hint = did_you_mean(entry, list(CORPORA)) or f"give a path, a glob, a list of them, or '{', '.join(CORPORA)}'."
        raise DataError(
            f"{path}: data.corpus names no file or folder (looked for {os.path.abspath(path)}); {hint}"
        ) from error
    if not is_folder:
        return [(path.name, path)]
    found = sorted((file.relative_to(path).as_posix(), file) for file in _files_below(path))
    if not found:
        raise DataError(
            f"{path}: the folder has no text; of folders, files ending in {', '.join(FOLDER_SUFFIXES)} are taken, "
            f"hidden ones left out. For others write a glob such as '{entry.rstrip('/')}/**/*.py'."
        )
    return found


def _match(pattern: str, entry: str) -> list[tuple[str, Path]]:
    matches = glob.glob(pattern, recursive=True)
    files = {Path(match) for match in matches if not os.path.isdir(match)}  # a set: ** twice finds a file twice
    if not files:
        raise DataError(
            f"{pattern}: matches only folders; write '{entry.rstrip('/')}/*.txt' for the files in them."
            if matches
            else f"{pattern}: no file matches (data.corpus; looked from {os.getcwd()}); mend the pattern."
        )
    parts = Path(pattern).parts
    fixed = Path(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
    return sorted((file.relative_to(fixed).as_posix(), file) for file in files)


def _files_below(folder: Path) -> Iterator[Path]:
    """Files with a suffix that folders are searched for; links are followed, each folder is entered once."""
    entered: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); mend its permissions.") from error

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        # In order, so that of two links to one folder it is always the same that is entered.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if name.lower().endswith(FOLDER_SUFFIXES) and not name.startswith("."):
                yield Path(parent, name)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); mend its permissions, or leave it out of data.corpus."
        ) from error


def _text_of(line: bytes, text_key: str, place: str) -> bytes:
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
        hint = did_you_mean(text_key, list(record)) or f"it has {', '.join(map(repr, list(record)[:8])) or 'none'}"
        raise DataError(f"{place}: no field '{text_key}' ({hint}); set data.text_key to the field that holds the text.")
    text = record[text_key]
    if not isinstance(text, str):
        raise DataError(
            f"{place}: field '{text_key}' is not a string but {type(text).__name__}; "
            "set data.text_key to the field that holds the text, or mend the line."
        )
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: field '{text_key}' has half of a surrogate pair at character {error.start + 1}, "
            "which is no text; mend or delete the line."
        ) from error
