"""The corpus and the runs of the parity tests, for float8 too."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# The pool's workers import the functions they are given by module name.
sys.path += [str(Path(__file__).parents[1] / "parity"), str(Path(__file__).parent)]

from parity_runs import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt")
