"""From a recipe file to a `Recipe`: its `extends` chain, the command line's overrides, and every error at once.

Also the way back: a recipe as TOML, complete, so that a run can be repeated from what it wrote. Rules that look at
several sections together are not here but in `titanlite/rules`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError

from titanlite.errors import CommandLineError, Finding, RecipeError, UsageError
from titanlite.recipe.explain import all_keys, key_schema, suggest_key
from titanlite.recipe.faults import findings_of
from titanlite.recipe.paths import expand
from titanlite.recipe.sections import Recipe, recipe_class
from titanlite.recipe.toml import KeyPath, TomlSyntaxError, find_lines, format_toml, parse_toml, parse_value
from titanlite.registry import did_you_mean, import_plugin, require_plugins

COMMAND_LINE = "command line"

ALTERNATIVES = (("training.steps", "training.tokens"),)
"""Keys of which a recipe gives one: where a nearer file or the command line gives one, an inherited other one goes."""

_SYNTAX_FIXES = {
    "invalid value": "text needs quotes, and booleans are true and false.",
    "cannot overwrite a value": "the key is given twice; keep one of them.",
    "expected newline or end of document after a statement": "one key a line; 1.5 has a point, not a comma.",
}
"""What is usually meant by a complaint of `tomllib`'s."""


@dataclass(frozen=True)
class Origin:
    """Where a key was last set: a file and its line (from 1), or `COMMAND_LINE` and line 0."""

    file: str
    line: int


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe, and where it came from."""

    recipe: Recipe
    path: Path
    files: tuple[Path, ...]
    """The file and what it extends, nearest first."""
    text: str
    """The resolved recipe as TOML: every key that has a value."""
    origins: Mapping[KeyPath, Origin] = field(repr=False)

    def locate(self, findings: Sequence[Finding]) -> list[Finding]:
        """The same findings, each with the file and line where its key was set."""
        return [_located(finding, self.origins, str(self.path)) for finding in findings]


@dataclass
class _Layer:
    """Values as one file, or one override, gives them, and where each stands."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)


def load_recipe(path: Path | str, overrides: Sequence[str] = (), *, stored: bool = False) -> LoadedRecipe:
    """Read a recipe with all it extends, apply `--section.key=value` overrides, and check every value.

    Plugins that it names are imported first; those of a `stored` recipe are not, and must have been. Raises
    `RecipeError` with all findings at once, each with its file and line.
    """
    try:
        return _load(Path(path), overrides, stored)
    except RecursionError:
        problem, fix = "keys or values are nested too deeply;", "no key of a recipe has more than a few parts."
        raise RecipeError([Finding("", problem, fix, str(path))]) from None


def _load(path: Path, overrides: Sequence[str], stored: bool) -> LoadedRecipe:
    files, layers, findings = _read_chain(path)
    given, override_findings = _parse_overrides(overrides)
    findings += override_findings
    merged = _Layer()
    for layer in [*reversed(layers), given]:
        _drop_alternatives(merged, layer)
        _overlay(merged, layer)
    if failures := list(_plugin_failures(merged.values, stored, str(path))):
        raise RecipeError(findings + [_located(failure, merged.origins, str(path)) for failure in failures])
    recipe = None
    try:
        recipe = recipe_class().model_validate(merged.values)
    except ValidationError as error:
        faults = [_located(fault, merged.origins, str(path)) for fault in findings_of(error, merged.values)]
        findings += sorted(faults, key=lambda fault: ([*map(str, files), fault.file].index(fault.file), fault.line))
    if findings or recipe is None:
        raise RecipeError(findings)
    return LoadedRecipe(recipe, path, tuple(files), to_toml(recipe), merged.origins)


def _plugin_failures(values: Mapping[str, Any], stored: bool, where: str) -> Iterator[Finding]:
    """Why plugins that a recipe names cannot be used; without them its other keys cannot be checked."""
    for module in plugin_modules(values):
        try:
            require_plugins([module], where) if stored else import_plugin(module)
        except UsageError as error:
            fix = "" if stored else "install it, or set PYTHONPATH to the folder that holds it."
            yield Finding("plugins.modules", f"{error};" if fix else str(error), fix)


def plugin_modules(values: Mapping[str, Any]) -> list[str]:
    """The modules that a recipe's values name as plugins, as far as they are names."""
    section = values.get("plugins")
    modules = section.get("modules") if isinstance(section, dict) else None
    return [name for name in modules if isinstance(name, str) and name] if isinstance(modules, list) else []


class RecipeParser(argparse.ArgumentParser):
    """Of a command that takes a recipe; raises `CommandLineError`, where argparse would print on every rank."""

    def error(self, message: str) -> NoReturn:
        raise CommandLineError(f"{message}\n{self.format_usage().rstrip()}")


def parse_with_overrides(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line of a command that takes a recipe: its own arguments, and the overrides for `load_recipe`.

    Raises `CommandLineError` for an option that is neither, and says which key was meant.
    """
    own: list[str] = []
    overrides: list[str] = []
    remaining = deque(argv)
    while remaining:
        word = remaining.popleft()
        flag, equals, _ = word.partition("=")
        if not (flag.startswith("--") and "." in flag):
            own.append(word)
            continue
        overrides.append(word)
        if not equals and remaining and not remaining[0].startswith("--"):
            overrides.append(remaining.popleft())
    arguments, unknown = parser.parse_known_args(own)
    for word in unknown:
        option = word.partition("=")[0]
        key = option.lstrip("-")
        hint = f"write --{key}=VALUE" if key in all_keys() else suggest_key(key) or f"see {parser.prog} --help"
        raise CommandLineError(f"{parser.prog} does not know '{option}'; {hint}")
    return arguments, overrides


def to_toml(recipe: Recipe) -> str:
    """The whole recipe as TOML, defaults included; reading it back gives an equal `Recipe`."""
    return "# The resolved recipe of a run: every key that has a value.\n\n" + format_toml(recipe.model_dump())


def recipe_differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, each with its old and new value; None stands for an absent one."""
    before, after = dict(_flat(old)), dict(_flat(new))
    keys = [*before, *(key for key in after if key not in before)]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def _flat(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _read_chain(path: Path) -> tuple[list[Path], list[_Layer], list[Finding]]:
    """The file and what it extends, nearest first. A link that cannot be followed ends the chain with a finding."""
    files: list[Path] = []
    layers: list[_Layer] = []
    named_by = Finding("", "")  # of the file that `extends` this one: how a failure to read it is reported
    while True:
        layer, finding = _read_file(path, named_by)
        if finding is not None:
            return files, layers, [finding]
        files.append(path)
        layers.append(layer)
        if "extends" not in layer.values:
            return files, layers, []
        named_by = Finding("extends", "", file=str(path), line=layer.origins[("extends",)].line)
        base = layer.values.pop("extends")
        if not isinstance(base, str) or not base or "\0" in base:
            problem = 'must be the path of one recipe, relative to this file, such as "base.toml"'
            return files, layers, [dataclasses.replace(named_by, problem=problem)]
        try:
            path = path.parent / expand(base)
        except UsageError as error:
            return files, layers, [dataclasses.replace(named_by, problem=str(error))]
        if os.path.realpath(path) in map(os.path.realpath, files):
            chain = " -> ".join([*map(str, files), str(path)])
            problem, fix = f"recipes extend each other in a circle: {chain};", "remove one of the links."
            return files, layers, [dataclasses.replace(named_by, problem=problem, fix=fix)]


def _read_file(path: Path, named_by: Finding) -> tuple[_Layer, Finding | None]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        siblings = [file.name for file in path.parent.glob("*.toml")]
        fix = did_you_mean(path.name, siblings) or "check the path (`extends` is relative to the file that says it)."
        return _Layer(), dataclasses.replace(named_by, problem=f"there is no recipe '{path}';", fix=fix)
    except OSError as error:
        problem = f"the recipe '{path}' cannot be read: {error.strerror}"
        return _Layer(), dataclasses.replace(named_by, problem=problem)
    try:
        text = content.decode("utf-8-sig")
        values = parse_toml(text)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        problem = f"byte 0x{content[error.start]:02x} is not UTF-8, which TOML files must be;"
        return _Layer(), Finding("", problem, "save the file as UTF-8.", str(path), line)
    except TomlSyntaxError as error:
        fix = next((fix for complaint, fix in _SYNTAX_FIXES.items() if str(error).startswith(complaint)), "")
        problem = f"not TOML: {error}"
        return _Layer(), Finding("", f"{problem};" if fix else problem, fix, str(path), error.line)
    origins = {key: Origin(str(path), line) for key, line in find_lines(text).items()}
    return _Layer(values, origins), None


def _parse_overrides(words: Sequence[str]) -> tuple[_Layer, list[Finding]]:
    """`--section.key=value`, or the two as separate words, as one layer."""
    layer = _Layer()
    findings: list[Finding] = []
    remaining = deque(words)
    while remaining:
        word = remaining.popleft()
        flag, equals, text = word.partition("=")
        key = flag[2:]
        if not flag.startswith("--") or not all(key.split(".")):
            problem, fix = f"'{word}' is not understood;", "overrides are written --section.key=value."
            findings.append(Finding("", problem, fix, COMMAND_LINE))
        elif equals:
            _overlay(layer, _override(tuple(key.split(".")), text))
        elif remaining and not remaining[0].startswith("--"):
            _overlay(layer, _override(tuple(key.split(".")), remaining.popleft()))
        else:
            findings.append(Finding(key, "has no value;", f"write {flag}=VALUE.", COMMAND_LINE))
    return layer, findings


def _override(path: tuple[str, ...], text: str) -> _Layer:
    value: Any = _override_value(path, text)
    for name in reversed(path):
        value = {name: value}
    return _Layer(value, {path[:length]: Origin(COMMAND_LINE, 0) for length in range(1, len(path) + 1)})


def _override_value(path: tuple[str, ...], text: str) -> Any:
    """A TOML value, or the bare text where it is none, or where the key takes text and `text` only looks like a number
    or a date (`--run.name=2024-11-21`)."""
    try:
        value = parse_value(text)
    except ValueError:
        return text
    takes_text = (key_schema(path) or {}).get("type") == "string"
    return text if takes_text and not isinstance(value, str) else value


def _overlay(below: _Layer, above: _Layer) -> None:
    """Lay `above` over `below`: tables merge key by key, anything else replaces what was there."""

    def merge(values: dict[str, Any], nearer: dict[str, Any], path: KeyPath) -> None:
        for key, value in nearer.items():
            if isinstance(value, dict) and isinstance(values.get(key), dict):
                merge(values[key], value, (*path, key))
            else:
                _forget(below, (*path, key))
                values[key] = copy.deepcopy(value)

    merge(below.values, above.values, ())
    below.origins.update(above.origins)


def _forget(layer: _Layer, path: KeyPath) -> None:
    for origin in [origin for origin in layer.origins if origin[: len(path)] == path]:
        del layer.origins[origin]


def _drop_alternatives(below: _Layer, above: _Layer) -> None:
    """Where `above` gives one of two alternative keys, take the other one out of `below`."""
    for pair in ALTERNATIVES:
        paths = [tuple(key.split(".")) for key in pair]
        given = [path for path in paths if _holds(above.values, path)]
        if len(given) == 1:
            for section, name in paths:
                if (section, name) not in given and _holds(below.values, (section, name)):
                    del below.values[section][name]
                    _forget(below, (section, name))


def _holds(values: Any, path: tuple[str, ...]) -> bool:
    for name in path:
        if not isinstance(values, dict) or name not in values:
            return False
        values = values[name]
    return True


def _located(finding: Finding, origins: Mapping[KeyPath, Origin], default_file: str) -> Finding:
    """`finding` with the place of its key; of the nearest table around it where the key itself is nowhere set."""
    path: KeyPath = tuple(int(name) if name.isdigit() else name for name in finding.key.split("."))
    while path and path not in origins:
        path = path[:-1]
    origin = origins.get(path, Origin(default_file, 0))
    heir = default_file if origin.file not in (default_file, COMMAND_LINE) else ""
    return dataclasses.replace(finding, file=origin.file, line=origin.line, extended_by=heir)
