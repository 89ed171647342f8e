"""Names that recipes use, mapped to code that is imported when it is first asked for: `titanlite check` needs no torch.

A new model, optimizer or corpus reader is one file and one line, here or in a module that `[plugins] modules` names.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator
from typing import Any

from titanlite.errors import UsageError


def did_you_mean(word: str, known: list[str]) -> str:
    """`did you mean 'x'?` for the nearest known word, or an empty string when nothing is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else ""


class Registry:
    """`name -> "module:attribute"` for one kind of thing."""

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def add(self, name: str, target: str) -> None:
        """Register `target` ("module:attribute") under `name`. Raises `ValueError` if the name has another target."""
        if self._entries.get(name, target) != target:
            raise ValueError(f"{self.kind} '{name}' is registered already ({self._entries[name]})")
        self._entries[name] = target

    def get(self, name: str) -> Any:
        """Import and return what `name` stands for. Raises `UsageError` with the nearest known name."""
        if name not in self._entries:
            hint = did_you_mean(name, list(self._entries)) or f"known: {', '.join(self._entries)}"
            raise UsageError(f"unknown {self.kind} '{name}'; {hint}")
        module, _, attribute = self._entries[name].partition(":")
        return getattr(importlib.import_module(module), attribute)


PLUGINS: dict[str, None] = {}  # names of the plugin modules that this process has imported, in order


def import_plugin(module: str) -> None:
    """Import a module that registers what it offers. Raises `UsageError` if that fails, whatever the cause."""
    try:
        importlib.import_module(module)
    except Exception as error:
        cause = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise UsageError(f"plugin '{module}' cannot be imported: {cause}") from error
    PLUGINS[module] = None


def require_plugins(modules: Iterable[str], where: str) -> None:
    """Raise `UsageError` if a stored recipe, that of `where`, names a module which this process was not given.

    What a stored recipe names is never imported on its word: whoever can write the file could run code.
    """
    if missing := [module for module in modules if module not in PLUGINS]:
        names = ",".join(missing)
        raise UsageError(
            f"the recipe of {where} needs the plugin {names}, which is not imported from what is stored; "
            f"if you trust it, add --plugins {names} (to train: [plugins] modules in the recipe)."
        )
