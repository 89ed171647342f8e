"""Which files an entry of the user's names: a path, a glob or a folder; and what is in each, by its name and by how it
begins: text (any bytes, one document), lines of JSON, tables. And Python's own files.
"""

from __future__ import annotations

import glob
import json
import os
import re
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from titanlite.corpus.corpora import CORPORA, READERS, Document, FoundFile
from titanlite.corpus.corpora.readers import BYTE_ORDER_MARK, PACKED, read_lines, read_unpacked, wrap_read_errors
from titanlite.errors import DataError
from titanlite.recipe.paths import expand
from titanlite.registry import did_you_mean

if TYPE_CHECKING:
    from titanlite.recipe.sections import Data

LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
MAYBE_LINES = ".json"
TEXT_SUFFIXES = (".txt", ".text", ".md", *LINES_SUFFIXES, MAYBE_LINES)
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow"}
FOLDER_SUFFIXES = (*TEXT_SUFFIXES, *(text + packed for text in TEXT_SUFFIXES for packed in PACKED), ".parquet")
"""What is taken from a folder, beside suffixes in `READERS`; a file named by itself or by a glob is taken as text
whatever its suffix is."""
BINARY_SUFFIXES = (
    ".xz", ".bz2", ".zip", ".tar", ".tgz", ".lz4", ".lzma", ".lzo", ".br", ".7z", ".rar", ".z", ".snappy", ".npy",
    ".npz", ".bin", ".idx", ".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".safetensors", ".gguf", ".onnx", ".h5", ".hdf5",
    ".mat", ".parq", ".pq", ".orc", ".avro", ".tfrecord", ".tfrecords", ".mds", ".lance", ".sqlite", ".sqlite3", ".db",
    ".lmdb", ".mdb", ".duckdb", ".csv", ".tsv", ".xls", ".xlsx", ".ods", ".pdf", ".doc", ".docx", ".odt", ".ppt",
    ".pptx", ".epub", ".mobi", ".pyc", ".a",
)  # fmt: skip
"""Refused: training on a compressed file's bytes, or a table's commas, would go unnoticed for a long while."""
MAGIC = {
    "gzip": rb"\x1f\x8b",
    "zstd": rb"[\x50-\x5f]\x2a\x4d\x18|\x28\xb5\x2f\xfd",
    "bzip2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
    "xz": rb"\xfd7zXZ\x00",
    "lz4": rb"\x04\x22\x4d\x18",
    "7z": rb"7z\xbc\xaf\x27\x1c",
    "rar": rb"Rar!\x1a\x07",
    "compress": rb"\x1f[\x9d\xa0]",
    "zip": rb"PK(\x03\x04|\x05\x06|\x07\x08)",
    "tar": rb".{257}ustar[\x00 ]",
    "Parquet": rb"PAR[1E]",
    "Arrow": rb"ARROW1|FEA1|\xff{4}.{2}\x00\x00.{4}",
    "Avro": rb"Obj\x01",
    "ORC": rb"ORC[\x00-\x1f]",
    "safetensors": rb".{5}\x00{3}\{\"",
    "GGUF": rb"GGUF.\x00\x00\x00",
    "NumPy": rb"\x93NUMPY",
    "HDF5": rb"\x89HDF\r\n\x1a\n",
    "SQLite": rb"SQLite format 3\x00",
    "pickle": rb"\x80[\x02-\x05]",
    "token file": rb"MMIDIDX\x00\x00",
    "PDF": rb"%PDF-\d",
    "Office": rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
    "image": rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a",
    "sound or film": rb"RIFF.{4}(WAVE|AVI |WEBP)|OggS\x00|fLaC\x00|.{4}ftyp",
    "program": rb"\x7fELF|\x00asm|\xca\xfe\xba\xbe|MZ.{58,}PE\x00\x00",
    "UTF-16 or UTF-32": rb"\xff\xfe|(\x00\x00)?\xfe\xff",
    "Git LFS pointer": rb"version https://git-lfs\.github\.com/spec/",
}
"""How files begin that are not text, or not in UTF-8, whatever their names are."""
HEAD = 4096  # bytes that tell what a file is

# Of Python's own folder, by the beginnings of names: other people's code, and what the build or the site wrote.
_SKIPPED_FOLDERS = ("site-packages", "dist-packages", "__pycache__", "config-")
_SKIPPED_FILES = ("_sysconfigdata", "sitecustomize.py", "usercustomize.py")


class FileFinder:
    """Finds the files of entries such as those of `data.corpus`, each once."""

    def __init__(self, text_key: str, key: str = "data.corpus", corpora: Iterable[str] = CORPORA) -> None:
        """`key` is what the user calls the entries, and `corpora` what they can be beside paths."""
        self._text_key, self._key, self._corpora = text_key, key, corpora
        self._found: dict[str, str] = {}  # real path -> the entry that named it

    def find(self, entry: str) -> Iterator[FoundFile]:
        """The files of an entry in the order of their names, relative to what the entry fixes: the folder; the folder
        before a glob's first wildcard; a file's own. Each is checked when it is come to. Raises `DataError` for what
        cannot be text, and for an empty file that the entry names itself.
        """
        for name, path in self._paths(entry):
            place = _real(path)
            if place in self._found:
                both = f"by '{self._found[place]}' and by '{entry}'"
                raise DataError(f"{path}: {self._key} names it twice, {both}; take one of them out.")
            self._found[place] = entry
            with wrap_read_errors(path):
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
            with wrap_read_errors(path):
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
    texts = _name(path, (file for file in files if is_folder_text(file, text_key)))
    if not texts:
        taken = f"{', '.join(TEXT_SUFFIXES)} (also with {' or '.join(PACKED)} after it) or .parquet, none hidden"
        fix = f"for others write a glob such as '{entry.rstrip('/')}/**/*.py'."
        raise DataError(f"{path}: no text is in the folder, of which files ending in {taken} are taken; {fix}")
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
        folders = f"matches only folders; write '{entry.rstrip('/')}/*.txt' for the files in them."
        raise DataError(f"{pattern}: {folders if matches else why}")
    parts = Path(pattern).parts
    fixed = Path(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
    return _name(fixed, files)


def match_files(pattern: str) -> Iterator[str]:
    """What a glob matches: as `glob.glob`, but `**` enters each real folder once, however many links lead there."""
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
    """The folder and those below it but hidden ones, with the names of their files; each real folder once."""

    def refuse(error: OSError) -> NoReturn:
        with wrap_read_errors(Path(error.filename)):
            raise error

    entered: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(top, followlinks=True, onerror=refuse):
        with wrap_read_errors(Path(parent)):  # a link, say, that was listed and cannot be followed
            status = os.stat(parent)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        # In order, so that of two links to one folder it is always the same that is entered.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield parent, files


def _name(base: Path, files: Iterable[Path]) -> list[tuple[str, Path]]:
    """In the order of their names, relative to `base`, and of those that are links to one file the first."""
    real: dict[str, tuple[str, Path]] = {}
    for name, path in sorted((file.relative_to(base).as_posix(), file) for file in files):
        real.setdefault(_real(path), (name, path))
    return list(real.values())


_real_folder = lru_cache(maxsize=4096)(os.path.realpath)


def _real(path: Path) -> str:
    """`os.path.realpath`, which asks for each folder on the way: here each folder is asked for once."""
    parent, name = os.path.split(path if path.is_absolute() else Path.cwd() / path)
    return os.path.realpath(path) if os.path.islink(path) else os.path.join(_real_folder(parent), name)


def format_of(path: Path, text_key: str) -> str:
    """How a file is read: by its name, or else by how it begins. Raises `DataError` for what is no text."""
    suffix = path.suffix.lower()
    if suffix in READERS or suffix in TABLES:
        return suffix if suffix in READERS else TABLES[suffix]
    refused: tuple[str, ...] = BINARY_SUFFIXES
    if suffix in PACKED:
        suffix, refused = Path(path.stem).suffix.lower(), (*BINARY_SUFFIXES, *PACKED, *TABLES)
    if suffix in refused:
        name = "".join(path.suffixes[-2 if path.suffix.lower() in PACKED else -1 :])
        fix = "unpack or convert it to text or JSON lines, or leave it out."
        raise DataError(f"{path}: a {name} file is not text; {fix}")
    head = read_unpacked(path, HEAD)
    if kind := next((kind for kind, magic in MAGIC.items() if re.match(magic, head, re.DOTALL)), None):
        fix = "give it the name of what it is, convert it to UTF-8 text or JSON lines, or leave it out."
        raise DataError(f"{path}: begins as a {kind} file does, and its name says text; {fix}")
    if suffix in LINES_SUFFIXES:
        return "lines"
    start = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    has_text = re.match(rb"\[\s*\{[^}]*" + re.escape(json.dumps(text_key).encode()) + rb"\s*:", start)
    if start[:1] == b"[" and (suffix == MAYBE_LINES or has_text):
        fix = "write one object a line (jq -c '.[]' FILE > FILE.jsonl), or leave it out."
        raise DataError(f"{path}: a JSON array, which would be one document; {fix}")
    return "lines" if start[:1] == b"{" and _is_lines(path, text_key, suffix == MAYBE_LINES) else "text"


def is_folder_text(path: Path, text_key: str) -> bool:
    """Whether a file of a folder is taken. Of JSON, that which is lines or, to be refused, has the text's field."""
    suffixes = (*FOLDER_SUFFIXES, *(format for format in READERS if format.startswith(".")))
    if path.name.startswith(".") or not path.name.lower().endswith(suffixes):
        return False
    if MAYBE_LINES not in map(str.lower, path.suffixes[-2:]):
        return True
    try:
        return format_of(path, text_key) == "lines"
    except DataError:
        return json.dumps(text_key).encode() in read_unpacked(path, HEAD)


def _is_lines(path: Path, text_key: str, is_json: bool) -> bool:
    """Whether the file's first line is a JSON object with the text, or its first two are JSON objects."""
    records = [_object(line) for _, line in islice(read_lines(path), 2)]
    if text_key in (records[0] or ()) or (len(records) == 2 and None not in records):
        return True
    if is_json and text_key in (_object(read_unpacked(path)) or ()):
        fix = "write one object a line (jq -c . FILE > FILE.jsonl), or leave it out."
        raise DataError(f"{path}: a JSON object of several lines, which would be one document of raw JSON; {fix}")
    return False


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_stdlib(section: Data) -> Iterator[Document]:
    """Every `.py` file of this Python's standard library, tests among them, that is not empty, in order.

    Installations of one version differ at most by what their distributors patch or leave out.
    """
    root, paths = Path(sysconfig.get_path("stdlib")), list[str]()
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(_SKIPPED_FOLDERS)]
        names = (name for name in files if name.endswith(".py") and not name.startswith(_SKIPPED_FILES))
        paths += [Path(folder, name).relative_to(root).as_posix() for name in names]
    if not paths:
        fix = 'use a Python that has it, or set data.corpus (now "python-stdlib") to a text file.'
        raise DataError(f"{root}: this Python was installed without the source of its standard library; {fix}")
    for path in sorted(paths):
        with wrap_read_errors(root / path):
            content = (root / path).read_bytes()
        if content:
            yield Document(path, content)
