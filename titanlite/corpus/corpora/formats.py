"""What is in a file, by its name and by how it begins: text (any bytes, one document), lines of JSON, tables.

Text and lines may be packed by gzip or zstd.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from titanlite.corpus.corpora import PACKED, READERS, Document, Part, Reader, read_unpacked
from titanlite.corpus.corpora.readers import BYTE_ORDER_MARK, read_lines
from titanlite.errors import DataError

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
HEAD = 4096  # Bytes that tell what a file is


def format_of(path: Path, text_key: str) -> str:
    """How a file is read: by its name, and where that does not say it by how it begins. Raises `DataError` for what is
    no text.
    """
    suffix = path.suffix.lower()
    if suffix in READERS or suffix in TABLES:
        return suffix if suffix in READERS else TABLES[suffix]
    refused: tuple[str, ...] = BINARY_SUFFIXES
    if suffix in PACKED:
        suffix, refused = Path(path.stem).suffix.lower(), (*BINARY_SUFFIXES, *PACKED, *TABLES)
    if suffix in refused:
        name = "".join(path.suffixes[-2 if path.suffix.lower() in PACKED else -1 :])
        raise DataError(
            f"{path}: a {name} file is not text; unpack or convert it to text or JSON lines, or leave it out."
        )
    head = read_unpacked(path, HEAD)
    if kind := next((kind for kind, magic in MAGIC.items() if re.match(magic, head, re.DOTALL)), None):
        raise DataError(
            f"{path}: begins as a {kind} file does, and its name says text; give it the name of what it is, convert it "
            "to UTF-8 text or JSON lines, or leave it out."
        )
    if suffix in LINES_SUFFIXES:
        return "lines"
    start = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    has_text = re.match(rb"\[\s*\{[^}]*" + re.escape(json.dumps(text_key).encode()) + rb"\s*:", start)
    if start[:1] == b"[" and (suffix == MAYBE_LINES or has_text):
        raise DataError(
            f"{path}: a JSON array, which would be one document; write one object a line (jq -c '.[]' FILE > "
            "FILE.jsonl), or leave it out."
        )
    return "lines" if start[:1] == b"{" and _is_lines(path, text_key, suffix == MAYBE_LINES) else "text"


def is_folder_text(path: Path, text_key: str) -> bool:
    """Whether a file of a folder is taken. Of JSON, that which is lines, or has the text's field in a form that is
    refused: other JSON is a program's. Raises `DataError` if it cannot be read.
    """
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
    """Whether the file's first line is a JSON object with the text, or its first two are JSON objects.

    Raises `DataError` for JSON whose one object has the text, and several lines.
    """
    records = [_object(line) for _, line in islice(read_lines(path), 2)]
    if text_key in (records[0] or ()) or (len(records) == 2 and None not in records):
        return True
    if is_json and text_key in (_object(read_unpacked(path)) or ()):
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


def read_documents(
    name: str,
    path: Path,
    format: str,
    text_key: str,
    part: Part | None = None,
    on_bad: Callable[[DataError], None] | None = None,
) -> Iterator[Document]:
    """The documents of a file, or of a part of it, that are not empty; named `name`, or `name:line`, `name:row`.

    A line or row without a text is passed over after a call of `on_bad`. Raises `DataError` with file and position for
    what cannot be read, such a line among it if there is no `on_bad`.
    """
    reader: Reader = READERS.get(format)
    for number, text in reader.read(path, text_key, part):
        if isinstance(text, DataError):
            if on_bad is None:
                raise text
            on_bad(text)
        elif text:
            yield Document(f"{name}:{number}" if number else name, text)


def divide(path: Path, format: str, size: int, part_bytes: int) -> list[Part] | None:
    """Parts of about `part_bytes` of a file that can be read so; None for one that is read as a whole. Raises
    `DataError`.
    """
    reader: Reader = READERS.get(format)
    if reader.divide is None or size <= part_bytes or path.suffix.lower() in PACKED:
        return None
    return reader.divide(path, size, part_bytes)
