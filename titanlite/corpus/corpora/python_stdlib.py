"""The embedded corpus: the source of the standard library of the Python that runs, its tests included.

Always there, no download, and real text. Other versions of Python have other files; two installations of the same
version differ at most by what their distributors patch or leave out.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from titanlite.corpus.corpora import Document, wrap_os_errors
from titanlite.errors import DataError
from titanlite.recipe.sections import Data

_SKIPPED_FOLDERS = ("site-packages", "dist-packages", "__pycache__", "config-")
"""Beginnings of folder names: other people's code, and the build's own configuration."""
_SKIPPED_FILES = ("_sysconfigdata", "sitecustomize.py", "usercustomize.py")
"""Beginnings of file names: written by the build or by the site."""


def read_stdlib(section: Data) -> Iterator[Document]:
    """Every `.py` file that is not empty, in the order of its path; names are paths such as `json/decoder.py`.

    Raises `DataError` where Python was installed without its source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(_python_files(root))
    if not paths:
        raise DataError(
            f"{root}: this Python was installed without the source of its standard library, which "
            '`data.corpus = "python-stdlib"` reads; use a Python that has it, or set data.corpus to a text file.'
        )
    for path in paths:
        with wrap_os_errors(root / path):
            content = (root / path).read_bytes()
        if content:
            yield Document(path, content)


def _python_files(root: Path) -> Iterator[str]:
    """Paths below `root`, relative to it, with forward slashes; links to folders are not followed."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(_SKIPPED_FOLDERS)]
        for name in files:
            if name.endswith(".py") and not name.startswith(_SKIPPED_FILES):
                yield Path(folder, name).relative_to(root).as_posix()
