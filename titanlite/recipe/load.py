"""From a recipe file to a `Recipe`, by what it extends and the command line's overrides, or to every error at once.

Also the way back: a recipe as TOML, complete. Rules that look at several sections together are in `plan/rules`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError

from titanlite.errors import CommandLineError, Finding, RecipeError, UsageError
from titanlite.recipe import toml
from titanlite.recipe.explain import all_keys, describe_type, is_tables, key_schema, suggest_key
from titanlite.recipe.paths import expand
from titanlite.recipe.sections import Recipe, recipe_class
from titanlite.recipe.toml import format_value, parse_value
from titanlite.registry import did_you_mean, import_plugin, require_plugins

COMMAND_LINE = "command line"
_SHOWN_CHARACTERS = 60
_OF_A_TEXT = ("value_error", "string_unicode")  # complaints of pydantic about a value that is a text
_SYNTAX_FIXES = {  # the usual fix for a complaint of `tomllib`'s
    "invalid value": "text needs quotes, and booleans are true and false.",
    "cannot overwrite a value": "the key is given twice; keep one of them.",
    "expected newline or end of document after a statement": "one key a line; 1.5 has a point, not a comma.",
}


@dataclass(frozen=True)
class _Layer:
    """Values as one file, or the command line, gives them."""

    file: str
    values: dict[str, Any]
    text: str = ""


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe, and where it came from."""

    recipe: Recipe
    path: Path
    text: str  # the resolved recipe as TOML: every key that has a value
    layers: Sequence[_Layer] = field(repr=False)  # what gave its keys: the command line, the file, what that extends

    def locate(self, findings: Iterable[Finding]) -> list[Finding]:
        """The same findings, each with the file and line where its key was set."""
        return [_locate(finding, self.layers, str(self.path)) for finding in findings]


def load_recipe(path: Path | str, overrides: Sequence[str] = (), *, stored: bool = False) -> LoadedRecipe:
    """Read a recipe with all it extends, apply `--section.key=value` overrides, and check every value.

    Plugins that it names are imported first; those of a `stored` recipe are not, and must have been. Raises
    `RecipeError` with all findings at once, each with its file and line.
    """
    path = Path(path)
    try:
        files, findings = _read_chain(path)
        given, malformed = _parse_overrides(overrides)
        layers = [given, *files]
        values: dict[str, Any] = {}
        for layer in reversed(layers):
            values = _merge(values, layer.values)
            nearer = layer.values.get("training")
            if isinstance(nearer, dict) and ("steps" in nearer) != ("tokens" in nearer):
                values["training"].pop("tokens" if "steps" in nearer else "steps", None)  # the amount that a base gives
        failures = _import_plugins(values, stored, str(path))
        if not failures:  # without them, other keys cannot be checked
            try:
                recipe = recipe_class().model_validate(values)
            except ValidationError as error:
                failures = _to_findings(error, values)
        order = [*(layer.file for layer in files), COMMAND_LINE, str(path)]
        located = (_locate(failure, layers, str(path)) for failure in failures)
        findings += malformed + sorted(located, key=lambda finding: (order.index(finding.file), finding.line))
        if findings:
            raise RecipeError(findings)
        return LoadedRecipe(recipe, path, to_toml(recipe), layers)
    except RecursionError:
        problem, fix = "keys or values are nested too deeply;", "no key of a recipe has more than a few parts."
        raise RecipeError([Finding("", problem, fix, str(path))]) from None


def load_run_recipe(run: Path) -> Recipe:
    """The resolved recipe of a run folder. Raises `UsageError`."""
    file = run / "recipe.toml"
    if not os.path.isfile(file):
        raise UsageError(f"{run} is no run folder: it has no recipe.toml that can be read.")
    return load_recipe(file, stored=True).recipe


def _import_plugins(values: Mapping[str, Any], stored: bool, where: str) -> list[Finding]:
    """Why plugins that a recipe names cannot be used."""
    findings = []
    for module in plugin_modules(values):
        try:
            require_plugins([module], where) if stored else import_plugin(module)
        except UsageError as error:
            fix = "" if stored else "install it, or set PYTHONPATH to the folder that holds it."
            findings.append(Finding("plugins.modules", f"{error}{';' * bool(fix)}", fix))
    return findings


def plugin_modules(values: Mapping[str, Any]) -> list[str]:
    """The modules that a recipe's values name as plugins, as far as they are names."""
    modules = toml.value_at(values, ("plugins", "modules"))
    return [name for name in modules if isinstance(name, str) and name] if isinstance(modules, list) else []


class RecipeParser(argparse.ArgumentParser):
    """Of a command that takes a recipe; raises `CommandLineError`, where argparse would print on every rank."""

    def __init__(self, command: str, usage: str, description: str, *, nargs: str | None = None) -> None:
        prog, recipe = f"titanlite {command}", "RECIPE [--section.key=value ...]"
        super().__init__(prog, f"{prog} {recipe} {usage}", description, allow_abbrev=False)
        self.add_argument("recipe", nargs=nargs, help="recipe file (TOML)")

    def error(self, message: str) -> NoReturn:
        raise CommandLineError(f"{message}\n{self.format_usage().rstrip()}")


def parse_with_overrides(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """A command's own arguments, and the overrides for `load_recipe`; `CommandLineError` for what is neither."""
    own: list[str] = []
    overrides: list[str] = []
    remaining = deque(argv)
    while remaining:
        word = remaining.popleft()
        is_override = word.startswith("--") and "." in word.partition("=")[0]
        if is_override and "=" not in word and remaining and not remaining[0].startswith("--"):
            word = f"{word}={remaining.popleft()}"
        (overrides if is_override else own).append(word)
    arguments, unknown = parser.parse_known_args(own)
    for word in unknown:
        option = word.partition("=")[0]
        key = option.lstrip("-")
        hint = f"write --{key}=VALUE" if key in all_keys() else suggest_key(key) or f"see {parser.prog} --help"
        raise CommandLineError(f"{parser.prog} does not know '{option}'; {hint}")
    return arguments, overrides


def to_toml(recipe: Recipe) -> str:
    """The whole recipe as TOML, defaults included; reading it back gives an equal `Recipe`."""
    return "# The resolved recipe of a run: every key that has a value.\n\n" + toml.format_toml(recipe.model_dump())


def recipe_differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, each with its old and new value; None stands for an absent one."""
    before, after = dict(_flat(old)), dict(_flat(new))
    return {key: (before.get(key), after.get(key)) for key in before | after if before.get(key) != after.get(key)}


def _flat(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section:
        if isinstance(value, BaseModel):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _read_chain(path: Path) -> tuple[list[_Layer], list[Finding]]:
    """The file and what it extends, nearest first. A link that cannot be followed ends the chain with a finding."""
    layers: list[_Layer] = []
    named_by = Finding("", "")  # the `extends` that led to this file
    try:
        while True:
            layer = _read_file(path)
            layers.append(layer)
            if "extends" not in layer.values:
                return layers, []
            named_by = Finding("extends", "", file=layer.file, line=toml.find_line(layer.text, ["extends"]))
            base, chain = layer.values.pop("extends"), [layer.file for layer in layers]
            if not isinstance(base, str) or not base or "\0" in base:
                raise UsageError('must be the path of one recipe, relative to this file, such as "base.toml"')
            path = path.parent / expand(base)
            if os.path.realpath(path) in map(os.path.realpath, chain):
                names = " -> ".join([*chain, str(path)])
                raise UsageError(f"recipes extend each other in a circle: {names}; remove one of the links.")
    except UsageError as error:
        return layers, [dataclasses.replace(named_by, problem=str(error))]
    except RecipeError as error:
        return layers, error.findings


def _read_file(path: Path) -> _Layer:
    """Raises `UsageError` if it is not there or cannot be read, and `RecipeError` if it is not TOML."""
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
        return _Layer(str(path), toml.parse_toml(text), text)
    except FileNotFoundError:
        siblings = [file.name for file in path.parent.glob("*.toml")]
        fix = did_you_mean(path.name, siblings) or "check the path (`extends` is relative to the file that has it)."
        raise UsageError(f"there is no recipe '{path}'; {fix}") from None
    except OSError as error:
        raise UsageError(f"the recipe '{path}' cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        problem, fix = f"byte 0x{content[error.start]:02x} is not UTF-8, which TOML is;", "save the file as UTF-8."
    except toml.TomlSyntaxError as error:
        fix = next((fix for complaint, fix in _SYNTAX_FIXES.items() if complaint in str(error)), "")
        line, problem = error.line, f"not TOML: {error}{';' * bool(fix)}"
    raise RecipeError([Finding("", problem, fix, str(path), line)])


def _parse_overrides(words: Sequence[str]) -> tuple[_Layer, list[Finding]]:
    """What `--section.key=value` words give."""
    values: dict[str, Any] = {}
    findings: list[Finding] = []
    for word in words:
        flag, equals, text = word.partition("=")
        path = flag[2:].split(".")
        if not flag.startswith("--") or not all(path):
            problem, fix = f"'{word}' is not understood;", "overrides are written --section.key=value."
            findings.append(Finding("", problem, fix, COMMAND_LINE))
        elif not equals:
            findings.append(Finding(flag[2:], "has no value;", f"write {flag}=VALUE.", COMMAND_LINE))
        else:
            value: Any = text  # if it is no TOML, or only looks like a number or a date (`--run.name=2024-11-21`)
            takes_text = key_schema(path).get("type") == "string"
            with suppress(ValueError):
                parsed = parse_value(text)
                value = text if takes_text and not isinstance(parsed, str) else parsed
            values = _merge(values, _nest(path, value))
    return _Layer(COMMAND_LINE, values), findings


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Tables merge key by key, anything else replaces what was there."""
    merged = dict(below)
    for key, value in above.items():
        old = below.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _locate(finding: Finding, layers: Sequence[_Layer], default_file: str) -> Finding:
    """`finding` with the place of its key; of the nearest table around it where the key itself is nowhere set."""
    path = finding.key.split(".")
    tables = [path[:length] for length in range(len(path), 0, -1)]
    nearest = (layer for table in tables for layer in layers if toml.value_at(layer.values, table) is not None)
    layer = next(nearest, _Layer(default_file, {}))
    line = toml.find_line(layer.text, path)
    extended_by = default_file if layer.file not in (default_file, COMMAND_LINE) else ""
    return dataclasses.replace(finding, file=layer.file, line=line, extended_by=extended_by)


def _to_findings(error: ValidationError, values: dict[str, Any]) -> list[Finding]:
    """One finding for each key of `values` that `error` complains about, however many reasons pydantic has."""
    faults: dict[tuple[str, ...], Any] = {}
    for fault in error.errors(include_url=False):
        path = _key_path(fault["loc"])
        # Of a value that may be text or a list, pydantic also reports why it is not the other one.
        if path not in faults or (fault["type"] in _OF_A_TEXT and faults[path]["type"] not in _OF_A_TEXT):
            faults[path] = fault
    return [_to_finding(path, fault, values) for path, fault in faults.items()]


def _key_path(location: tuple[int | str, ...]) -> tuple[str, ...]:
    """The key within the recipe; what pydantic adds to it (an index of a value, the arm of a union) is left off."""
    path: tuple[str, ...] = ()
    for part in location:
        schema = key_schema(path)
        if not (is_tables(schema) or {"properties", "additionalProperties"} & schema.keys()):
            break
        path = (*path, str(part))
    return path


def _to_finding(path: tuple[str, ...], fault: Any, values: dict[str, Any]) -> Finding:
    key = ".".join(path)
    if fault["type"] == "missing" and fault["loc"][-1] == path[-1]:
        return Finding(".".join(path[:-1]), f"has no {path[-1]};", f"write {path[-1]} = …")
    if fault["type"] == "value_error":
        return Finding(key, str(fault["ctx"]["error"]))
    value = toml.value_at(values, path)
    if fault["type"] == "extra_forbidden":
        *table, name = path
        known = list(key_schema(table)["properties"])
        what = "unknown section" if not table and isinstance(value, dict) else "unknown key"
        where = f"[{'.'.join(table)}] has" if table else "a recipe has"
        return Finding(key, f"{what};", suggest_key(name, known, table) or f"{where}: {', '.join(known)}.")
    shown = "a table" if isinstance(value, dict) else format_value(value).encode("utf-8", "backslashreplace").decode()
    shown = shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}…"
    if fault["type"] == "string_unicode":
        return Finding(key, f"{shown} is not UTF-8;", "rename what it names, or name its folder, or use a glob.")
    schema = key_schema(path)
    return Finding(key, f"must be {describe_type(schema)}, not {shown};", _find_fix(path, value, schema))


def _find_fix(path: tuple[str, ...], value: Any, schema: dict[str, Any]) -> str:
    if len(path) == 1 and "properties" in schema:
        return f"write a table: [{path[0]}]."
    if isinstance(value, str) and (near := did_you_mean(value, [*map(str, schema.get("enum", []))])):
        return near
    # What the user may have meant by a value of the wrong type: 10 for "10" or 10.0, true for "True", "5" for 5.
    text = value if isinstance(value, str) else "" if isinstance(value, list | dict) else format_value(value)
    texts = [text, text.lower(), text.replace(",", "."), text.removesuffix(".0"), format_value(text)]
    if re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+", text):  # 1,500 may be either
        texts.append(text.replace(",", ""))
    meanings = set()
    for text in texts:
        with suppress(ValueError):  # no TOML; or, as pydantic's, no value of this key
            meaning = parse_value(text)
            recipe_class().model_validate(_nest(path, meaning))
            meanings.add(format_value(meaning))
    if len(meanings) == 1:
        return f"write {path[-1]} = {meanings.pop()}."
    return f"see titanlite check --explain {'.'.join(path)}"


def _nest(path: Sequence[str], value: Any) -> dict[str, Any]:
    """`value` within the tables that `path` names: {"training": {"steps": 5}}."""
    *tables, name = path
    return reduce(lambda inner, table: {table: inner}, reversed(tables), {name: value})
