"""TOML with line numbers, and TOML written back: what the standard library's reader does not offer.

Knows nothing of recipes.
"""

from __future__ import annotations

import json
import re
import sys
from bisect import bisect_left
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
    for name in path:
        try:
            values = values[int(name)] if isinstance(values, list) else values[name]
        except (LookupError, TypeError, ValueError):
            return None
    return values


def find_line(text: str, path: Sequence[str]) -> int:
    """The line (from 1) of a valid document that first names a table, key or array element, which it must hold.

    A beginning of a document is TOML where a statement ends and, once a bracket closes it, where an element of an
    array ends; the first one that holds the key is searched by halving. What is nested in an element of an array over
    several lines stands where the element begins.
    """
    lines = text.split("\n")

    def parse_beginning(end: int) -> tuple[int, dict[str, Any]]:
        """The longest beginning of at most `end` lines: its length and values."""
        while True:
            for bracket in ("", "]"):
                with suppress(TomlSyntaxError):
                    return end, parse_toml("\n".join([*lines[:end], bracket]))
            end -= 1

    def holds_key(end: int) -> bool:
        return value_at(parse_beginning(end)[1], path) is not None

    first = bisect_left(range(len(lines)), True, key=holds_key)
    return parse_beginning(first - 1)[0] + 1


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
