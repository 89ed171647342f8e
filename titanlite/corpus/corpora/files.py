"""Which files an entry of the user's names: a path, a glob or a folder each time it is asked; and Python's own."""

from __future__ import annotations

import glob
import json
import os
import re
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from titanlite.corpus.corpora import CORPORA, PACKED, Document, Part, wrap_os_errors
from titanlite.corpus.corpora.formats import TEXT_SUFFIXES, format_of, is_folder_text
from titanlite.errors import DataError
from titanlite.recipe.paths import expand
from titanlite.registry import did_you_mean

if TYPE_CHECKING:
    from titanlite.recipe.sections import Data

_SKIPPED_FOLDERS = ("site-packages", "dist-packages", "__pycache__", "config-")
"""Beginnings of folder names: other people's code, and the build's own configuration."""
_SKIPPED_FILES = ("_sysconfigdata", "sitecustomize.py", "usercustomize.py")
"""Beginnings of file names: written by the build or by the site."""


class FoundFile(NamedTuple):
    name: str  # Relative to what the entry fixes, so that it stays the same when the corpus moves
    path: Path
    format: str
    size: int
    modified_ns: int
    source: int = 0  # Which of the entries names it
    part: Part | None = None  # If not all of it


class FileFinder:
    """Finds the files of entries such as those of `data.corpus`, each once."""

    def __init__(self, text_key: str, key: str = "data.corpus", corpora: Sequence[str] = tuple(CORPORA)) -> None:
        """`key` is what the user calls the entries, and `corpora` what they can be beside paths."""
        self._text_key, self._key, self._corpora = text_key, key, corpora
        self._found: dict[str, str] = {}  # real path -> the entry that named it

    def find(self, entry: str) -> Iterator[FoundFile]:
        """The files of an entry in the order of their names, each checked when it is come to.

        Names are relative to what the entry fixes (the folder; the folder before a glob's first wildcard; for a
        file, its own name). Raises `DataError` for what cannot be text, and for an empty file that the entry names
        itself.
        """
        for name, path in self._paths(entry):
            place = _real(path)
            if place in self._found:
                both = f"by '{self._found[place]}' and by '{entry}'"
                raise DataError(f"{path}: {self._key} names it twice, {both}; take one of them out.")
            self._found[place] = entry
            with wrap_os_errors(path):
                status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{path}: not a regular file, and data must stay to be read again; leave it out.")
            if status.st_size == 0 and path == expand(entry):
                raise DataError(f"{path}: the file is empty; give a file with text in it, or leave it out.")
            yield FoundFile(name, path, format_of(path, self._text_key), status.st_size, status.st_mtime_ns)

    def find_all(self, entries: Sequence[str]) -> list[FoundFile]:
        """Those of each entry, in order."""
        return [file._replace(source=number) for number, entry in enumerate(entries) for file in self.find(entry)]

    def _paths(self, entry: str) -> list[tuple[str, Path]]:
        """The files of an entry as (name, path), in the order of their names."""
        path = expand(entry)
        try:
            with wrap_os_errors(path):
                is_folder = stat.S_ISDIR(path.stat().st_mode)
        except (DataError, ValueError) as error:  # ValueError: a NUL in the name
            if glob.has_magic(entry):
                return _match(str(path), entry, self._key)
            if not isinstance(error.__cause__, FileNotFoundError | NotADirectoryError | None):
                raise
            others = "".join(f", or '{name}'" for name in self._corpora)
            hint = did_you_mean(entry, list(self._corpora)) or f"give a path, a glob, a list of them{others}."
            where = f"{self._key} names no file or folder (looked for {os.path.abspath(path)})"
            raise DataError(f"{path}: {where}; {hint}") from error
        return _in_folder(path, entry, self._text_key) if is_folder else [(path.name, path)]


def _in_folder(path: Path, entry: str, text_key: str) -> list[tuple[str, Path]]:
    state, info, splits = (path / f"{name}.json" for name in ("state", "dataset_info", "dataset_dict"))
    if splits.exists():
        found = sorted(path.parent.name for path in path.glob("*/state.json"))
        one = path / (found or ["train"])[0]
        raise DataError(f"{path}: a dataset of several splits ({', '.join(found)}); give one of them, such as '{one}'.")
    if state.exists() and info.exists():
        return _shards(state)
    files = (Path(parent, name) for parent, names in _walk(path) for name in names)
    texts = _once((file.relative_to(path).as_posix(), file) for file in files if is_folder_text(file, text_key))
    if not texts:
        raise DataError(
            f"{path}: the folder has no text; of folders, files ending in {', '.join(TEXT_SUFFIXES)} (also with "
            f"{' or '.join(PACKED)} after it) or .parquet are taken, hidden ones left out. For others write a glob "
            f"such as '{entry.rstrip('/')}/**/*.py'."
        )
    return texts


def _shards(path: Path) -> list[tuple[str, Path]]:
    """The files of a Hugging Face dataset whose state `save_to_disk` wrote to `path`, in the dataset's order."""
    try:
        state = json.loads(path.read_bytes())
        files = [dict(file) for file in state["_data_files"]]
        names = [file.pop("filename") for file in files]
        chosen = [key for key in state if key.startswith("_indices") and state[key]] + [*filter(None, files)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fix = "save the dataset again, or write a glob for the folder's own files."
        raise DataError(f"{path}: not the state of a Hugging Face dataset ({error!r}); {fix}") from error
    if chosen:
        problem = f"the dataset is a choice of its files' rows ({chosen[0]}), and all of them would be read"
        raise DataError(f"{path}: {problem}; save dataset.flatten_indices() instead.")
    for name in names:
        if type(name) is not str or not re.fullmatch(r"[^/\\\0\ud800-\udfff]+\.arrow", name):
            problem = f"names {name!r}, and a dataset's files are .arrow files in its folder"
            raise DataError(f"{path}: {problem}; save the dataset again.")
    return [(name, path.with_name(name)) for name in names]


def _match(pattern: str, entry: str, key: str) -> list[tuple[str, Path]]:
    matches = list(match_files(pattern))
    files = [Path(match) for match in matches if not os.path.isdir(match)]
    if not files:
        why = f"no file matches ({key}; looked from {os.getcwd()}); mend the pattern."
        if matches:
            why = f"matches only folders; write '{entry.rstrip('/')}/*.txt' for the files in them."
        raise DataError(f"{pattern}: {why}")
    parts = Path(pattern).parts
    fixed = Path(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
    return _once((file.relative_to(fixed).as_posix(), file) for file in files)


def match_files(pattern: str) -> Iterator[str]:
    """What a glob matches, `**` any number of folders: as `glob.glob`, but `**` enters each real folder once, through
    however many links it is reached.
    """
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from glob.glob(pattern)
        return
    at = parts.index("**")
    rest = [part for index, part in enumerate(parts[at:]) if part != "**" or parts[at + index - 1] != "**"][1:]
    for top in glob.glob(os.path.join(*parts[:at])) if at else ["."]:
        for folder, _ in _walk(top) if os.path.isdir(top) else ():
            yield from match_files(os.path.join(glob.escape(folder), *(rest or "*")))


def _walk(top: str | Path) -> Iterator[tuple[str, list[str]]]:
    """The folder and those below it but hidden ones, with the names of their files; each real folder once. Raises
    `DataError` for one that cannot be read.
    """

    def refuse(error: OSError) -> NoReturn:
        with wrap_os_errors(Path(error.filename)):
            raise error

    entered: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(top, followlinks=True, onerror=refuse):
        with wrap_os_errors(Path(parent)):  # a link, say, that was listed and cannot be followed
            status = os.stat(parent)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        # In order, so that of two links to one folder it is always the same that is entered.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield parent, files


def _once(found: Iterable[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """In the order of their names, and of those that are links to one file the first."""
    real: dict[str, tuple[str, Path]] = {}
    for name, path in sorted(found):
        real.setdefault(_real(path), (name, path))
    return list(real.values())


def _real(path: Path) -> str:
    """`os.path.realpath`, which asks for each folder on the way: here each folder is asked for once."""
    parent, name = os.path.split(path if path.is_absolute() else Path.cwd() / path)
    return os.path.realpath(path) if os.path.islink(path) else os.path.join(_real_folder(parent), name)


_real_folder = lru_cache(maxsize=4096)(os.path.realpath)


def read_stdlib(section: Data) -> Iterator[Document]:
    """The corpus that is always there: every `.py` file of this Python's standard library, tests among them, that is
    not empty, in the order of its path; names are paths such as `json/decoder.py`.

    Installations of one version differ at most by what their distributors patch or leave out. Raises `DataError` where
    Python was installed without its source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(_python_files(root))
    if not paths:
        fix = 'use a Python that has it, or set data.corpus (now "python-stdlib") to a text file.'
        raise DataError(f"{root}: this Python was installed without the source of its standard library; {fix}")
    for path in paths:
        with wrap_os_errors(root / path):
            content = (root / path).read_bytes()
        if content:
            yield Document(path, content)


def _python_files(root: Path) -> Iterator[str]:
    """Paths below `root`, relative to it, with forward slashes; links to folders are not followed."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(_SKIPPED_FOLDERS)]
        for name in files:
            if name.endswith(".py") and not name.startswith(_SKIPPED_FILES):
                yield Path(folder, name).relative_to(root).as_posix()
