"""What a step enters, as docs/step.md tells it; and which steps a run logs."""

from __future__ import annotations

import re
from pathlib import Path

from support.runs import rows
from support.step_trace import traced_steps
from support.tiny import train

DOCS = Path(__file__).parents[2] / "docs" / "step.md"
# The optimizer is that of configs/debug.toml. No step but the first and the last has a row.
TINY = {"optimizer": {"name": "muon"}, "metrics": {"log_every": 100, "tensorboard": False}}


def printed(section: str) -> list[str]:
    """The files that begin the lines of a list in docs/step.md."""
    text = DOCS.read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"^(?:\d+\.|-) \[[^\]]*\]\(\.\./titanlite/([^)]*)\)", text, re.MULTILINE)


def test_a_step_enters_the_files_that_the_documentation_prints(folder: Path) -> None:
    """Those between the second step and the last but one: no clock falls due within so short a run."""
    with traced_steps() as trace:
        assert train("--training.steps=10") == 0
    ordinary, listed = trace.entered[2:8], printed("The files of a step")
    assert len(listed) <= 12 and len(set(listed)) == len(listed)
    assert [sorted(files) for files in ordinary] == [sorted(listed)] * len(ordinary)
    for files in trace.reading[2:8]:
        assert files <= set(printed("Reading a batch")), "without worker processes, the trainer's own reads"


def test_with_worker_processes_only_the_loader_is_entered_beside(folder: Path) -> None:
    with traced_steps() as trace:
        assert train("--training.steps=10", "--data.workers=1") == 0
    assert set().union(*trace.entered[2:8]) == set(printed("The files of a step"))
    assert set().union(*trace.reading[2:8]) <= {"data/loader.py", "plan/layout.py"}


def test_a_resumed_run_logs_the_steps_that_an_uninterrupted_one_does(folder: Path) -> None:
    words = ("--training.steps=8", "--metrics.log_every=3")
    assert train(*words, "--run.stop_after_step=4") == 75
    assert [row["step"] for row in rows(key="loss")] == [1, 3]
    assert train(*words) == 0
    assert [row["step"] for row in rows(key="loss")] == [1, 3, 6, 8]
