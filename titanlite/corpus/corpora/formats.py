"""What is in a file: text (any bytes, one document), JSON lines (UTF-8, one document a line), Parquet and Arrow (one a
row).

Text and JSON lines may be packed by gzip or zstd. JSON lines that are not, and Parquet, can be read in parts, which
together yield what the whole does: so many processes share a large file.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from titanlite.corpus.corpora import Document
from titanlite.errors import DataError
from titanlite.registry import did_you_mean

Form = Literal["text", "lines", "parquet", "arrow"]

LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
MAYBE_LINES = ".json"
TEXT_SUFFIXES = (".txt", ".text", ".md", *LINES_SUFFIXES, MAYBE_LINES)
PACKED = (".gz", ".zst")
TABLE_FORMS: dict[str, Form] = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow"}
FOLDER_SUFFIXES = (*TEXT_SUFFIXES, *(text + packed for text in TEXT_SUFFIXES for packed in PACKED), ".parquet")
"""What is taken from a folder; a file named by itself or by a glob is taken as text whatever its suffix is."""
BINARY_SUFFIXES = (
    ".xz", ".bz2", ".zip", ".tar", ".tgz", ".lz4", ".lzma", ".lzo", ".br", ".7z", ".rar", ".z", ".snappy", ".npy",
    ".npz", ".bin", ".idx", ".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".safetensors", ".gguf", ".onnx", ".h5", ".hdf5",
    ".mat", ".parq", ".pq", ".orc", ".avro", ".tfrecord", ".tfrecords", ".mds", ".lance", ".sqlite", ".sqlite3", ".db",
    ".lmdb", ".mdb", ".duckdb", ".csv", ".tsv", ".xls", ".xlsx", ".ods", ".pdf", ".doc", ".docx", ".odt", ".ppt",
    ".pptx", ".epub", ".mobi", ".pyc", ".a",
)  # fmt: skip
"""Refused: training on a compressed file's bytes, or a table's commas, would go unnoticed for a long while."""
MAGIC = {
    name: re.compile(pattern, re.DOTALL)
    for name, pattern in {
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
    }.items()
}
"""How files begin that are not text, or not in UTF-8, whatever their names are."""
HEAD = 4096
"""Bytes that tell what a file is."""
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
_MARK = b"\xef\xbb\xbf"
"""Some editors begin a file with a byte order mark, which is not JSON."""

ROWS_AT_ONCE = 1_000
BLOCK_BYTES = 2**20


class Part(NamedTuple):
    """Of a JSONL file the lines that begin in a range of its bytes; of a Parquet file a range of its row groups."""

    first: int
    stop: int
    before: int
    """Newlines, or rows, of the file before it: from them its documents have their numbers."""


def form_of(path: Path, text_key: str) -> Form:
    """How a file is read: by its name, and where that does not say it by how it begins. Raises `DataError` for what is
    no text.
    """
    suffix = path.suffix.lower()
    if suffix in TABLE_FORMS:
        return TABLE_FORMS[suffix]
    refused: tuple[str, ...] = BINARY_SUFFIXES
    if suffix in PACKED:
        suffix, refused = Path(path.stem).suffix.lower(), (*BINARY_SUFFIXES, *PACKED, *TABLE_FORMS)
    if suffix in refused:
        way_out = "unpack or convert it to text or JSON lines, or leave it out"
        name = "".join(path.suffixes[-2 if path.suffix.lower() in PACKED else -1 :])
        raise DataError(f"{path}: a {name} file is not text; {way_out}.")
    head = _head(path)
    if kind := next((kind for kind, magic in MAGIC.items() if magic.match(head)), None):
        raise DataError(
            f"{path}: begins as a {kind} file does, and its name says text; give it the name of what it is, convert it "
            "to UTF-8 text or JSON lines, or leave it out."
        )
    if suffix in LINES_SUFFIXES:
        return "lines"
    start = head.removeprefix(_MARK).lstrip()
    if start[:1] == b"[" and (suffix == MAYBE_LINES or _begins_records(start, text_key)):
        raise DataError(
            f"{path}: a JSON array, which would be one document; write one object a line (jq -c '.[]' FILE > "
            "FILE.jsonl), or leave it out."
        )
    return "lines" if start[:1] == b"{" and _is_lines(path, text_key, suffix == MAYBE_LINES) else "text"


def holds_documents(path: Path, text_key: str) -> bool:
    """Whether JSON that lies in a folder is lines, or has the text's field in a form that is refused; the rest is not
    meant as text. Raises `DataError` if it cannot be read.
    """
    try:
        return form_of(path, text_key) == "lines"
    except DataError:
        return json.dumps(text_key).encode() in _head(path)


def _head(path: Path) -> bytes:
    with _opened(path) as file:
        return file.read(HEAD)


def _begins_records(start: bytes, text_key: str) -> bool:
    """Whether an array begins with an object that has the field of the text."""
    return re.match(rb"\[\s*\{[^}]*" + re.escape(json.dumps(text_key).encode()) + rb"\s*:", start) is not None


def _is_lines(path: Path, text_key: str, is_json: bool) -> bool:
    """Whether the file's first line is a JSON object with the text, or its first two are JSON objects.

    Raises `DataError` for JSON whose one object has the text, and several lines.
    """
    records = [_object(line) for _, line in islice(_lines(path, None), 2)]
    if text_key in (records[0] or ()) or (len(records) == 2 and None not in records):
        return True
    if is_json and text_key in (_object(_whole(path)) or ()):
        raise DataError(
            f"{path}: a JSON object of several lines, which would be one document of raw JSON; write one object a line "
            "(jq -c . FILE > FILE.jsonl), or leave it out."
        )
    return False


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


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
            if number == 1:
                line = line.removeprefix(_MARK)
            if line := line.rstrip():
                yield number, line


def _rows(path: Path, form: Form, text_key: str, asked: str, part: Part | None) -> Iterator[tuple[int, bytes | None]]:
    """Numbers and texts of the rows."""
    arrow = _pyarrow()
    number = 0 if part is None else part.before
    read = _parquet_columns if form == "parquet" else _arrow_columns
    with _arrow_refusals(path):
        for column in read(arrow, path, text_key, asked, part):
            # Offsets of a damaged file may point anywhere in this process's memory, so nothing is read before.
            column.validate(full=True)
            for text in column.cast(arrow.large_binary()).to_pylist():
                number += 1
                yield number, text


def _parquet_columns(arrow: Any, path: Path, text_key: str, asked: str, part: Part | None) -> Iterator[Any]:
    file = arrow.parquet.ParquetFile(path, page_checksum_verification=True)
    _text_column(path, file.schema_arrow, text_key, asked)
    groups = range(file.num_row_groups) if part is None else range(part.first, part.stop)
    for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=list(groups), columns=[text_key], use_threads=False):
        yield batch.column(text_key)  # a field of a struct may have the same path


def _arrow_columns(arrow: Any, path: Path, text_key: str, asked: str, part: Part | None) -> Iterator[Any]:
    """Of a stream, as datasets are saved, or of a file (Feather)."""

    def read(options: Any = None) -> Any:
        head = file.read(6)
        if head.startswith(b"FEA1"):
            raise DataError(f"{path}: Feather of version 1, which libraries stop reading; write it again as version 2.")
        is_file = head == b"ARROW1"
        file.seek(0)
        return (arrow.ipc.open_file if is_file else arrow.ipc.open_stream)(file, options=options)

    with arrow.OSFile(str(path)) as file:  # not mapped: a file that is cut while it is read must not be a SIGBUS
        column = _text_column(path, read().schema, text_key, asked)
        file.seek(0)
        batches = read(arrow.ipc.IpcReadOptions(included_fields=[column], use_threads=False))
        count = getattr(batches, "num_record_batches", None)  # a file's
        for batch in batches if count is None else map(batches.get_batch, range(count)):
            yield batch.column(0)


def _text_column(path: Path, schema: Any, text_key: str, asked: str) -> int:
    """Which column has the text. Raises `DataError` if none has that name, more than one, or one of something else."""
    found = schema.get_all_field_indices(text_key)
    if not found:
        raise _no_field(f"{path}: no column", text_key, schema.names, asked)
    if len(found) > 1:
        raise DataError(f"{path}: column '{text_key}' is there {len(found)} times; name each otherwise.")
    kind = schema.field(found[0]).type
    of = kind.value_type if str(kind).startswith("dictionary<") else kind
    if str(of) not in TEXT_TYPES:
        raise DataError(
            f"{path}: column '{text_key}' is not text but {kind}; set {asked} to the column that holds the text."
        )
    return int(found[0])


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
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # of a damaged file also KeyError, UnicodeDecodeError, OverflowError ...
        raise DataError(f"{path}: cannot be read ({error}); fetch or write it again, or leave it out.") from error
