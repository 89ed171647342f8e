"""Which files an entry of the user's names: a path, a glob or a folder each time it is asked.

What is in them, `formats` knows.
"""

from __future__ import annotations

import glob
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from titanlite.data.corpora import CORPORA, Document
from titanlite.data.corpora.formats import FOLDER_SUFFIXES, PACKED, TEXT_SUFFIXES, Form, documents, form_of
from titanlite.errors import DataError
from titanlite.registry import did_you_mean


class FoundFile(NamedTuple):
    """A file that an entry names."""

    name: str
    """Relative to what the entry fixes, so that it stays the same when the corpus moves."""
    path: Path
    form: Form
    size: int
    """Bytes."""
    modified_ns: int


_ABOUT = "dataset_info.json"  # beside a dataset's state


@dataclass(frozen=True)
class Asked:
    """What the user calls the things that a refusal asks to be mended."""

    entries: str = "data.corpus"
    text_key: str = "data.text_key"
    corpora: tuple[str, ...] = tuple(CORPORA)
    """What an entry can be, beside a path."""


class FileReader:
    """Reads entries such as those of `data.corpus`; remembers what it has read, so that no file is read twice."""

    def __init__(self, text_key: str, asked: Asked = Asked()) -> None:
        self._text_key = text_key
        self._asked = asked
        self._read: dict[str, str] = {}  # absolute path -> the entry that named it

    def read(self, entry: str) -> Iterator[Document]:
        """Documents of one entry, files in the order of their paths; empty ones are passed over. Raises `DataError`."""
        for file in self.files(entry):
            yield from documents(file.name, file.path, file.form, self._text_key, self._asked.text_key)

    def files(self, entry: str) -> Iterator[FoundFile]:
        """The files of an entry in the order of their names, each checked when it is come to.

        Names are relative to what the entry fixes (the folder; the folder before a glob's first wildcard; for a
        file, its own name). Raises `DataError` for what cannot be text, and for an empty file that the entry names
        itself.
        """
        for name, path in _find(entry, self._asked):
            self._claim(path, entry)
            form = form_of(path)
            if form is None:
                raise DataError(
                    f"{path}: a {path.suffix} file is not text (named by {self._asked.entries} = '{entry}'); "
                    "unpack or convert it to text or JSONL, or leave it out."
                )
            with _statting(path, self._asked.entries):
                status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{path}: not a regular file, and data must stay to be read again; leave it out.")
            if status.st_size == 0 and path == Path(entry).expanduser():
                raise DataError(f"{path}: the file is empty; give a file with text in it, or leave it out.")
            yield FoundFile(name, path, form, status.st_size, status.st_mtime_ns)

    def _claim(self, path: Path, entry: str) -> None:
        place = os.path.abspath(path)
        if place in self._read:
            raise DataError(
                f"{path}: {self._asked.entries} names it twice, by '{self._read[place]}' and by '{entry}', "
                "and would read it twice; take one of them out."
            )
        self._read[place] = entry


def _find(entry: str, asked: Asked) -> list[tuple[str, Path]]:
    """The files of an entry as (name, path), in the order of their names."""
    path = Path(entry).expanduser()
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if glob.has_magic(entry):
            return _match(str(path), entry, asked.entries)
        if not isinstance(error, FileNotFoundError | NotADirectoryError | ValueError):
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); mend its permissions or {asked.entries}."
            ) from error
        others = "".join(f", or '{name}'" for name in asked.corpora)
        hint = did_you_mean(entry, list(asked.corpora)) or f"give a path, a glob, a list of them{others}."
        raise DataError(
            f"{path}: {asked.entries} names no file or folder (looked for {os.path.abspath(path)}); {hint}"
        ) from error
    if not is_folder:
        return [(path.name, path)]
    if (path / "dataset_dict.json").exists() or all((path / name).exists() for name in ("state.json", _ABOUT)):
        return _shards(path)
    found = sorted((file.relative_to(path).as_posix(), file) for file in _files_below(path))
    if not found:
        raise DataError(
            f"{path}: the folder has no text; of folders, files ending in {', '.join(TEXT_SUFFIXES)} (also with "
            f"{' or '.join(PACKED)} after it) or .parquet are taken, hidden ones left out. For others write a glob "
            f"such as '{entry.rstrip('/')}/**/*.py'."
        )
    return found


def _shards(folder: Path) -> list[tuple[str, Path]]:
    """The files of a Hugging Face dataset that `save_to_disk` wrote to the folder, in the dataset's order."""
    if (folder / "dataset_dict.json").exists():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise DataError(f"{folder}: a dataset of several splits ({', '.join(splits)}); give one of them, such as "
                        f"'{folder / (splits or ['train'])[0]}'.")  # fmt: skip
    state = folder / "state.json"
    try:
        names = [str(file["filename"]) for file in json.loads(state.read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{state}: not the state of a Hugging Face dataset ({error}); save the dataset again, or "
                        "write a glob for the folder's own files.") from error  # fmt: skip
    return [(name, folder / name) for name in names]


def _match(pattern: str, entry: str, entries: str) -> list[tuple[str, Path]]:
    matches = glob.glob(pattern, recursive=True)
    files = {Path(match) for match in matches if not os.path.isdir(match)}  # a set: ** twice finds a file twice
    if not files:
        raise DataError(
            f"{pattern}: matches only folders; write '{entry.rstrip('/')}/*.txt' for the files in them."
            if matches
            else f"{pattern}: no file matches ({entries}; looked from {os.getcwd()}); mend the pattern."
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
def _statting(path: Path, entries: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); mend its permissions, or leave it out of {entries}."
        ) from error
