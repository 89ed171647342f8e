"""What chaos tests get: a nursery for processes, and an empty sandbox each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.chaos.nursery import Nursery
from support.chaos.sandbox import Sandbox


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.clear()


@pytest.fixture(scope="session")
def references() -> dict[tuple[Any, ...], Any]:
    """Uninterrupted runs, each trained once."""
    return {}


@pytest.fixture
def box(nursery: Nursery, references: dict[tuple[Any, ...], Any], tmp_path: Path) -> Iterator[Sandbox]:
    yield Sandbox(nursery, tmp_path, references)
    nursery.clear()  # what a failed test leaves running would slow down all others
