"""Texts that vanish or change under a run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from fault import EQUAL, Fault, Outcome
from sandbox import EVERY, Sandbox


def lost_while_running(what: str, act: Callable[[Path], None]) -> Fault:
    """A corpus is read whole when a run starts: there is nothing to lose, and nothing to tell."""

    def run(box: Sandbox) -> Outcome:
        text = (box.folder / "corpus.txt").read_text()
        job = box.paused()
        act(box.folder / "corpus.txt")
        box.go()
        job.done()
        (box.folder / "corpus.txt").write_text(text)
        box.require_whole()
        return Outcome(0, EQUAL, "(nothing: texts are read whole when a run starts)")

    return Fault(25, f"text {what} while a run trains on it", "rm, truncate", run)


def lost_before_a_restart(what: str, act: Callable[[Path], None], said: str) -> Fault:
    """Refused by name, with every checkpoint where it was; put back, the run goes on."""

    def run(box: Sandbox) -> Outcome:
        box.prepared()
        text = (box.folder / "corpus.txt").read_text()
        act(box.folder / "corpus.txt")
        refusal = box.start().ended(2).said
        (box.folder / "corpus.txt").write_text(text)
        box.train()
        assert box.resumed() == 3 * EVERY
        box.require_whole()
        return Outcome(0, EQUAL, box.message(refusal, said))

    return Fault(25, f"text {what} before a run goes on", "rm, truncate; then put back", run)


def _halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


FAULTS = [
    lost_while_running("removed", Path.unlink),
    lost_while_running("cut", _halve),
    lost_before_a_restart("removed", Path.unlink, "corpus.txt"),
    lost_before_a_restart("cut", _halve, "is not what it was"),
]
