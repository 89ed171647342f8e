"""Parquet, and Arrow as streams (as datasets are saved) and files (Feather): one document a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from titanlite.corpus.corpora import Part, Reader, missing_field
from titanlite.errors import DataError

TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
ROWS_AT_ONCE = 1_000


def _divide_parquet(path: Path, size: int, part_bytes: int) -> list[Part]:
    parts: list[Part] = []
    with _wrap_errors(path):
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
    with _wrap_errors(path):
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

    def read(options: Any = None) -> Any:
        head = file.read(6)
        if head.startswith(b"FEA1"):
            raise DataError(f"{path}: Feather of version 1, which libraries stop reading; write it again as version 2.")
        is_file = head == b"ARROW1"
        file.seek(0)
        return (ipc.open_file if is_file else ipc.open_stream)(file, options=options)

    with OSFile(str(path)) as file:  # not mapped: a file that is cut while it is read must not be a SIGBUS
        column = _text_column(path, read().schema, text_key)
        file.seek(0)
        batches = read(ipc.IpcReadOptions(included_fields=[column], use_threads=False))
        count = getattr(batches, "num_record_batches", None)  # a file's
        for batch in batches if count is None else map(batches.get_batch, range(count)):
            yield batch.column(0)


def _text_column(path: Path, schema: Any, text_key: str) -> int:
    """Which column has the text. Raises `DataError` if none has that name, more than one, or one of something else."""
    found = schema.get_all_field_indices(text_key)
    if not found:
        raise missing_field(f"{path}: no column", text_key, schema.names)
    if len(found) > 1:
        raise DataError(f"{path}: column '{text_key}' is there {len(found)} times; name each otherwise.")
    kind = schema.field(found[0]).type
    of = kind.value_type if str(kind).startswith("dictionary<") else kind
    if str(of) not in TEXT_TYPES:
        raise DataError(
            f"{path}: column '{text_key}' is not text but {kind}; set data.text_key (--text-key) to the column that "
            "holds the text."
        )
    return int(found[0])


PARQUET = Reader(partial(_read_rows, _parquet_columns), _divide_parquet)
ARROW = Reader(partial(_read_rows, _arrow_columns))


@contextmanager
def _wrap_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # of a damaged file also KeyError, UnicodeDecodeError, OverflowError ...
        raise DataError(f"{path}: cannot be read ({error}); fetch or write it again, or leave it out.") from error
