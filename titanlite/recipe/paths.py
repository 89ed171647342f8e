"""Paths as recipes and command lines write them.

What no file system takes is refused when a recipe is read. `~` stays in it, and is expanded where the path is used:
a stored recipe may be read on another machine, by another user. No pydantic here: data workers need none.
"""

from __future__ import annotations

import argparse
import os
import unicodedata
from pathlib import Path

from titanlite.errors import UsageError

_LONGEST_PATH, _LONGEST_NAME = 4095, 255  # bytes that Linux takes (`limits.h`)


def check_path(path: str) -> str:
    """`path` as it is. Raises `ValueError` for characters that cannot be printed and for what is too long."""
    if any(unicodedata.category(sign) in ("Cc", "Cs") for sign in path):  # control characters, bytes that are no UTF-8
        raise ValueError(f"{path!r} has characters that cannot be printed; use a path without them.")
    names = path.split("/")
    if len(os.fsencode(path)) > _LONGEST_PATH or any(len(os.fsencode(name)) > _LONGEST_NAME for name in names):
        problem = f"no path is longer than {_LONGEST_PATH:,} bytes, and no name in one than {_LONGEST_NAME};"
        raise ValueError(f"'{path[:40]}…': {problem} use a shorter one.")
    return path


def check_name(name: str) -> str:
    """As `check_path`, for what becomes the name of one folder."""
    if name in ("", ".", "..") or any(sign in name for sign in "/\\"):
        raise ValueError(f"{name[:40]!r} cannot be the name of a folder; use no slashes (run.output_dir takes a path).")
    return check_path(name)


def expand(path: str | Path) -> Path:
    """With the home folder for `~` or `~user`. Raises `UsageError` where this machine knows of none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = str(path).partition("/")[0]
        raise UsageError(f"'{path}': this machine knows no home folder '{user}'; write the path in full.") from error


def path_argument(text: str) -> Path:
    """A path of the command line, which may have any characters, expanded; for `argparse`."""
    return expand(input_argument(text))


def input_argument(text: str) -> str:
    """As `path_argument`, but as it was written: it may be a glob."""
    return text_argument(text, "".join(sign for sign in text if sign.isprintable()))


def text_argument(text: str, checked: str | None = None) -> str:
    """A path of the command line that is kept in files of text, `checked` instead of it; for `argparse`."""
    try:
        if not text:  # what a variable that is not set leaves: it would be the current folder
            raise ValueError("the path is empty; give one, or '.' for the current folder.")
        expand(text)
        check_path(text if checked is None else checked)
    except (UsageError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text
