"""TOML with line numbers, and TOML written back: what the standard library's reader does not offer.

Knows nothing of recipes. A document is read by `tomllib`; a second, lax pass over text known to be valid finds the
line of each key.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KeyPath = tuple[str | int, ...]
"""Where a value stands: names of tables and keys, and indices into arrays."""


@dataclass(frozen=True)
class TomlDocument:
    """A parsed file: its values, and the line (from 1) that first names each table, key and array element."""

    values: dict[str, Any]
    lines: dict[KeyPath, int]


class TomlSyntaxError(ValueError):
    """Text that is no TOML; `line` and `column` count from 1."""

    def __init__(self, message: str, line: int, column: int) -> None:
        super().__init__(message)
        self.line = line
        self.column = column


def parse_toml(text: str) -> TomlDocument:
    """Parse a TOML document. Raises `TomlSyntaxError` at the first place that is not TOML."""
    try:
        values = tomllib.loads(text)
        return TomlDocument(values, _Locator(text).locate())
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(str(error), text) from None
    except RecursionError:
        raise TomlSyntaxError("values are nested too deeply", 1, 1) from None


def parse_value(text: str) -> Any:
    """The TOML value that `text` writes (`3`, `"a"`, `[1, 2]`). Raises `ValueError` when it is not exactly one."""
    try:
        values = tomllib.loads(f"value = {text}")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if set(values) != {"value"}:
        raise ValueError(f"{text!r} is not one TOML value")
    return values["value"]


def _syntax_error(message: str, text: str) -> TomlSyntaxError:
    """tomllib names the place only in its message: '… (at line 3, column 5)', or '… (at end of document)'."""
    where = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", message)
    if where is None or where.group(1) is None:
        lines = text.splitlines() or [""]
        line, column = len(lines), len(lines[-1]) + 1
    else:
        line, column = int(where.group(1)), int(where.group(2))
    reason = message[: where.start()] if where else message
    return TomlSyntaxError(reason[:1].lower() + reason[1:], line, column)


_SPACE = re.compile(r"[ \t]*")
_BLANK = re.compile(r"(?:\s|#[^\n]*)*")
_KEY_PART = re.compile(r"""[ \t]*(?:([A-Za-z0-9_-]+)|("(?:\\.|[^"\\])*"|'[^']*'))[ \t]*(\.?)""")
_STRING = re.compile(
    r'''"""(?:\\.|[^\\])*?"""(?:"{0,2})'''  # up to two quotes may stand just before the closing three
    r"""|'''.*?'''(?:'{0,2})"""
    r'''|"(?:\\.|[^"\\])*"'''
    r"""|'[^']*'""",
    re.DOTALL,
)
_SCALAR = re.compile(r"[^,\]}#\n]+")


class _Locator:
    """One pass over a valid TOML text that notes the line of each key; values are skipped, not read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.lines: dict[KeyPath, int] = {}
        self.array_tables: dict[KeyPath, int] = {}  # path of a [[table]] -> index of its latest element

    def locate(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        while self.skip(_BLANK) < len(self.text):
            if self.take("[["):
                table = self.array_table()
                self.take("]]")
            elif self.take("["):
                table = self.resolved(self.keys())
                self.mark(table)
                self.take("]")
            else:
                self.pair(table)
        return self.lines

    def skip(self, pattern: re.Pattern[str]) -> int:
        match = pattern.match(self.text, self.position)
        assert match is not None, f"the locator lost its way at character {self.position}"
        self.position = match.end()
        return self.position

    def take(self, sign: str) -> bool:
        found = self.text.startswith(sign, self.position)
        self.position += len(sign) if found else 0
        return found

    def mark(self, path: KeyPath) -> None:
        """Note the current line for `path` and for the tables it opens on the way; the first mention stays."""
        line = self.text.count("\n", 0, self.position) + 1
        for length in range(1, len(path) + 1):
            self.lines.setdefault(path[:length], line)

    def keys(self) -> list[str]:
        """A dotted key, from the current position."""
        parts: list[str] = []
        while True:
            match = _KEY_PART.match(self.text, self.position)
            assert match is not None, f"the locator found no key at character {self.position}"
            bare, quoted, dot = match.groups()
            self.position = match.end()
            parts.append(bare if bare is not None else parse_value(quoted))
            if not dot:
                return parts

    def resolved(self, keys: list[str]) -> KeyPath:
        """A header's keys as a path: a name that is an array of tables means its latest element."""
        path: KeyPath = ()
        for key in keys:
            path = (*path, key)
            if path in self.array_tables:
                path = (*path, self.array_tables[path])
        return path

    def array_table(self) -> KeyPath:
        keys = self.keys()
        array = (*self.resolved(keys[:-1]), keys[-1])
        self.array_tables[array] = self.array_tables.get(array, -1) + 1
        table = (*array, self.array_tables[array])
        self.mark(table)
        return table

    def pair(self, table: KeyPath) -> None:
        path = (*table, *self.keys())
        self.mark(path)
        self.take("=")
        self.value(path)

    def value(self, path: KeyPath) -> None:
        self.skip(_SPACE)
        if self.take("["):
            index = 0
            while self.skip(_BLANK) and not self.take("]"):
                self.mark((*path, index))
                self.value((*path, index))
                self.skip(_BLANK)
                self.take(",")
                index += 1
        elif self.take("{"):
            while self.skip(_BLANK) and not self.take("}"):
                self.pair(path)
                self.skip(_BLANK)
                self.take(",")
        elif self.text.startswith(('"', "'"), self.position):
            self.skip(_STRING)
        else:
            self.skip(_SCALAR)


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
