"""What is wrong with a recipe's values, in the user's words: pydantic's errors become findings.

Each key gets one finding, however many reasons pydantic has, with its fix where that can be known. Where the key stands
(file and line) is added by `load.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from titanlite.errors import Finding
from titanlite.recipe.explain import describe_type, holds_keys, key_schema, suggest_key
from titanlite.recipe.sections import recipe_class
from titanlite.recipe.toml import format_value, parse_value
from titanlite.registry import did_you_mean

_SHOWN_CHARACTERS = 60
_OF_A_TEXT = ("value_error", "string_unicode")


def to_findings(error: ValidationError, values: dict[str, Any]) -> list[Finding]:
    """One finding for each key that `error` complains about; `values` is what was validated."""
    faults: dict[tuple[str, ...], Any] = {}
    for fault in error.errors(include_url=False):
        path = _key_path(fault["loc"])
        # Of a value that may be text or a list, pydantic also reports why it is not the other one.
        if path not in faults or (fault["type"] in _OF_A_TEXT and faults[path]["type"] not in _OF_A_TEXT):
            faults[path] = fault
    return [_to_finding(path, fault, _value_at(values, path)) for path, fault in faults.items()]


def _key_path(location: tuple[int | str, ...]) -> tuple[str, ...]:
    """The key within the recipe; what pydantic adds to it (an index of a value, the arm of a union) is left off."""
    path: tuple[str, ...] = ()
    for part in location:
        schema = key_schema(path)
        if schema is None or not holds_keys(schema):
            break
        path = (*path, str(part))
    return path


def _value_at(values: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        values = values[int(name)] if isinstance(values, list) else values.get(name)
    return values


def _to_finding(path: tuple[str, ...], fault: Any, value: Any) -> Finding:
    key = ".".join(path)
    if fault["type"] == "extra_forbidden":
        return Finding(key, *_unknown(path, value))
    if fault["type"] == "missing" and fault["loc"][-1] == path[-1]:
        return Finding(".".join(path[:-1]), f"has no {path[-1]};", f"write {path[-1]} = …")
    if fault["type"] == "value_error":
        return Finding(key, str(fault["ctx"]["error"]))
    shown = "a table" if isinstance(value, dict) else format_value(value).encode("utf-8", "backslashreplace").decode()
    shown = shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}…"
    if fault["type"] == "string_unicode":
        return Finding(key, f"{shown} is not UTF-8;", "rename what it names, or name its folder, or use a glob.")
    schema = key_schema(path) or {}
    return Finding(key, f"must be {describe_type(schema)}, not {shown};", _find_fix(path, value, schema))


def _unknown(path: tuple[str, ...], value: Any) -> tuple[str, str]:
    """Problem and fix for a key or a section that does not exist."""
    *table, name = path
    known = list((key_schema(table) or {})["properties"])
    what = "unknown section" if not table and isinstance(value, dict) else "unknown key"
    where = f"[{'.'.join(table)}] has" if table else "a recipe has"
    return f"{what};", suggest_key(name, known, table) or f"{where}: {', '.join(known)}."


def _find_fix(path: tuple[str, ...], value: Any, schema: dict[str, Any]) -> str:
    if len(path) == 1 and "properties" in schema:
        return f"write a table: [{path[0]}]."
    if isinstance(value, str) and (near := did_you_mean(value, [*map(str, schema.get("enum", []))])):
        return near
    meanings = {format_value(each) for each in _readings(value) if _is_valid(path, each)}
    if len(meanings) == 1:
        return f"write {path[-1]} = {meanings.pop()}."
    return f"see titanlite check --explain {'.'.join(path)}"


def _readings(value: Any) -> Iterator[Any]:
    """What the user may have meant by a value of the wrong type: 10 for "10" or 10.0, true for "True", "5" for 5."""
    texts: list[str] = []
    if isinstance(value, str):
        texts = [value, value.lower()]
        if re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+", value):
            texts.append(value.replace(",", "_"))
        if re.fullmatch(r"[0-9]+,[0-9]+", value):  # 1,500 may be either
            texts.append(value.replace(",", "."))
    elif isinstance(value, float) and value.is_integer():
        texts = [str(int(value))]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        texts = [format_value(str(value))]
    for text in texts:
        with suppress(ValueError):
            yield parse_value(text)


def _is_valid(path: tuple[str, ...], value: Any) -> bool:
    try:
        recipe_class().model_validate(nest(path, value))
    except ValidationError:
        return False
    return True


def nest(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """`value` within the tables that `path` names: {"training": {"steps": 5}}."""
    *tables, name = path
    nested = {name: value}
    for table in reversed(tables):
        nested = {table: nested}
    return nested
