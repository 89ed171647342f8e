"""What a line of the fault matrix is: how something is broken, what must hold, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from support.chaos.sandbox import Sandbox

EQUAL = "equal"


@dataclass(frozen=True)
class Outcome:
    """What was seen."""

    lost_steps: int | None  # steps that were trained again; None where nothing was being trained
    curve: str
    """`EQUAL` where the whole curve and the last state were compared bit for bit with those of an uninterrupted run;
    otherwise how they were compared, or why not."""
    message: str  # what was printed or logged


@dataclass(frozen=True)
class Fault:
    """One line."""

    row: int  # number of the kind of fault
    what: str
    how: str  # how it is brought about
    run: Callable[[Sandbox], Outcome]  # brings it about and raises `AssertionError` where a promise is broken
    slow: bool = False  # left out of the default suite

    @property
    def name(self) -> str:
        return f"{self.row}: {self.what}"
