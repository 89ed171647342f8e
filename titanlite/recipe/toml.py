"""TOML with line numbers, and TOML written back: what the standard library's reader does not offer.

Knows nothing of recipes.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KeyPath = tuple[str | int, ...]
"""Where a value stands: names of tables and keys, and indices into arrays."""


class TomlSyntaxError(ValueError):
    """Text that is no TOML; its message says where, and `line` counts from 1."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


def parse_toml(text: str) -> dict[str, Any]:
    """The values of a TOML document. Raises `TomlSyntaxError` at the first place that is not TOML."""
    try:
        values: dict[str, Any] = tomllib.loads(text)
        return values
    except tomllib.TOMLDecodeError as error:
        where = re.search(r"at line (\d+)", str(error))  # or "at end of document"
        line = int(where[1]) if where else max(1, len(text.splitlines()))
        raise TomlSyntaxError(str(error)[:1].lower() + str(error)[1:], line) from None
    except RecursionError:
        raise TomlSyntaxError("values are nested too deeply", 1) from None


def parse_value(text: str) -> Any:
    """The TOML value that `text` writes (`3`, `"a"`, `[1, 2]`). Raises `ValueError` when it is not exactly one."""
    values = parse_toml(f"value = {text}")
    if set(values) != {"value"}:
        raise ValueError(f"{text!r} is not one TOML value")
    return values["value"]


def find_lines(text: str) -> dict[KeyPath, int]:
    """The line (from 1) of a valid document that first names each table, key and array element.

    A statement (a header, or a key with its value) is TOML by itself, and none of its beginnings is: lines are put
    together until they are. An array over several lines is TOML once a bracket closes it; what follows is then read as
    an array of its own. What is nested in an element of an array stands where the element begins.
    """
    lines: dict[KeyPath, int] = {}
    table: KeyPath = ()
    newest: dict[KeyPath, int] = {}  # array of tables -> index of its last one
    array: KeyPath | None = None  # the one that is open, of which `elements` are read
    elements = 0
    chunk, start = "", 1
    for number, line in enumerate(text.split("\n"), 1):
        chunk += (line.lstrip(" \t,") if array and not chunk else line) + "\n"
        statement = f"array = [{chunk}" if array else chunk
        whole = _load_or_none(statement)
        found = _load_or_none(f"{statement}]") if whole is None else whole
        if found is None:
            continue
        below = list(find_paths(found))
        if array:
            paths = [(*array, elements + int(index), *rest) for _, index, *rest in below[1:]]
        elif chunk.lstrip().startswith("["):
            table = _find_table(below[-1], newest)
            paths = [table[:length] for length in range(1, len(table) + 1)]
        else:
            paths = [(*table, *path) for path in below]
            if whole is None:
                array, elements = (*table, *takewhile(lambda part: isinstance(part, str), below[-1])), 0
        for path in paths:
            lines.setdefault(path, start)
            elements += array is not None and len(path) == len(array) + 1
        array = array if whole is None else None
        chunk, start = "", number + 1
    return lines


def _load_or_none(text: str) -> dict[str, Any] | None:
    try:
        return parse_toml(text)
    except TomlSyntaxError:
        return None


def find_paths(value: Any) -> Iterator[KeyPath]:
    """Where everything within a value stands, tables before what is in them."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield (name,)
        yield from ((name, *path) for path in find_paths(inner))


def _find_table(header: KeyPath, newest: dict[KeyPath, int]) -> KeyPath:
    """Where a header's table is: a name of an array of tables means its last one; `[[name]]` adds one to `newest`."""
    path: KeyPath = ()
    for part in header:
        if isinstance(part, int):
            newest[path] = newest.get(path, -1) + 1
        if path in newest:
            path = (*path, newest[path])
        if isinstance(part, str):
            path = (*path, part)
    return path


def format_toml(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> str:
    """`values` as TOML text: plain keys first, then a `[table]` for each nested mapping; None is left out."""
    plain = {key: value for key, value in values.items() if value is not None and not isinstance(value, Mapping)}
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    header = [f"[{'.'.join(map(_format_key, path))}]"] if path else []
    block = header + [f"{_format_key(key)} = {format_value(value)}" for key, value in plain.items()]
    texts = ["\n".join(block) + "\n"] if block else []
    texts += [format_toml(table, (*path, key)) for key, table in tables.items()]
    return "\n".join(texts)


def format_value(value: Any) -> str:
    """One value as TOML writes it; a mapping becomes an inline table, without what is None: TOML has no word for it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's; DEL is the one character that JSON lets stand and TOML does not.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, Mapping):
        pairs = [f"{_format_key(key)} = {format_value(item)}" for key, item in value.items() if item is not None]
        return f"{{{', '.join(pairs)}}}"
    return str(value)


def _format_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else format_value(key)
