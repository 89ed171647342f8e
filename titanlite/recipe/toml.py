"""TOML with line numbers, and TOML written back: what the standard library's reader does not offer.

Knows nothing of recipes.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


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


def value_at(values: Any, path: Sequence[str]) -> Any:
    """What stands at a key, whose part is an index where it names an element of an array; None for nothing."""
    with suppress(LookupError, TypeError, ValueError):
        for name in path:
            values = values[int(name)] if isinstance(values, list) else values[name]
        return values
    return None


def find_line(text: str, path: Sequence[str]) -> int:
    """The line (from 1) of a valid document that first names a table, key or array element; 0 if it does not hold it.

    What is nested in a value stands where that begins, or the element of an array over several lines.
    """
    lines = _find_lines(text)
    tables = (tuple(path[:length]) for length in range(len(path), 0, -1))
    return next((lines[table] for table in tables if table in lines), 0)


@functools.lru_cache(maxsize=8)
def _find_lines(text: str) -> dict[tuple[str, ...], int]:
    """The lines of tables, keys and array elements, found by reading each statement (a header, or a key's value) once.

    One is TOML by itself, and none of its beginnings is: lines are put together until they are. An array over several
    lines is TOML once a bracket closes it; what follows is then read as an array of its own.
    """
    lines: dict[tuple[str, ...], int] = {}
    newest: dict[tuple[str, ...], int] = {}  # array of tables -> index of its last one
    table: tuple[str, ...] = ()
    statement, start, elements = "", 1, 0
    for number, line in enumerate(text.split("\n"), 1):
        statement += (line if statement.endswith("\n") else line.lstrip(" \t,")) + "\n"
        for closing in ("", "]"):
            with suppress(TomlSyntaxError):
                value: Any = parse_toml(statement + closing)
                break
        else:
            continue
        is_header = statement.startswith("[")
        path = () if is_header else table
        while isinstance(value, dict) and len(value) == 1:
            [(name, value)] = value.items()
            path = (*path, name)
            lines.setdefault(path, start)
            if is_header and isinstance(value, list):
                newest[path], value = newest.get(path, -1) + 1, value[0]
            if is_header and path in newest:
                path = (*path, str(newest[path]))
                lines.setdefault(path, start)
        if is_header:
            table = path
        found = len(value) if isinstance(value, list) else 0
        lines |= {(*path, str(elements + index)): start for index in range(found)}
        start, elements = number + 1, elements + found if closing else 0
        statement = f"{'.'.join(map(_format_key, path[len(table) :]))} = [" if closing else ""
    return lines


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
