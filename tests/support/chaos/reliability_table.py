"""Breaks everything once and writes what came of it.

`PYTHONPATH=tests python -m support.chaos.reliability_table docs/reliability.md`

Takes a quarter of an hour. Exits with 1 if a promise is not kept.
"""

from __future__ import annotations

import platform
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from support.chaos.fault import Fault
from support.chaos.fault_matrix import MATRIX
from support.chaos.nursery import Nursery
from support.chaos.sandbox import EVERY, Sandbox

_HEAD = f"""# Reliability

Written by `PYTHONPATH=tests python -m support.chaos.reliability_table docs/reliability.md`
with torch {{torch}}; do not edit.

Each line is a fault that was really brought about in a small run, which saves every {EVERY} steps. *Lost* is how many
steps were trained again; what a checkpoint was committed of is never lost. *Curve* tells whether the whole curve (loss
and gradient norm of each step, all digits) and the last state (every bit of the weights and of the optimizer) are those
of a run that nothing befell, on the same layout. *Said* is what the user was told, run folders as they are seen from
where the command was started.

| # | fault | how | lost | curve | said |
|---|---|---|---|---|---|
"""


def line(
    number: int, fault: Fault, nursery: Nursery, folder: Path, references: dict[tuple[object, ...], object]
) -> str:
    """The fault's line of the table."""
    try:
        outcome = fault.run(Sandbox(nursery, folder / str(number), references))
        seen = ("-" if outcome.lost_steps is None else str(outcome.lost_steps), outcome.curve, outcome.message)
    except AssertionError as error:
        seen = ("", "", f"**failed**: {(str(error).splitlines() or ['?'])[0]}")
    cells = [str(fault.row), fault.what, fault.how, *(plain(text, folder / str(number)) for text in seen)]
    return f"| {' | '.join(cells)} |"


def plain(text: str, folder: Path) -> str:
    """Text for a cell, without what is another each time: the folder that the run was in, machine and process."""
    text = re.sub(rf"\b{re.escape(platform.node())}\b", "node-a", text)
    text = re.sub(r"\b(process) [0-9]+", r"\1 4711", text)
    text = re.sub(r"\[/\S*/gloo/\S*\].*", "(gloo)", text)
    text = text.replace(f"{folder}/", "").replace(str(folder), ".").replace("|", "\\|").replace("\n", " ")
    return re.sub(r"(.)\1{60,}", r"\1…\1", re.sub(r"\s+", " ", text)).strip()


def main(target: Path) -> int:
    nursery, lines = Nursery(), []
    references: dict[tuple[Any, ...], Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, fault in enumerate(MATRIX):
            lines.append(line(number, fault, nursery, Path(folder), references))
            print(lines[-1], flush=True)
            nursery.clear()
    failed = sum("**failed**" in text for text in lines)
    end = f"\n{len(lines)} faults, {failed} of them with a promise that was not kept.\n"
    target.write_text(_HEAD.format(torch=torch.__version__) + "\n".join(lines) + "\n" + end)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
