"""What ranks that were started together decide together."""

from __future__ import annotations

import shutil

import pytest
from support.chaos.sandbox import Job, Sandbox
from support.ports import free_port


def start_apart(box: Sandbox, other: Sandbox, *words: str) -> Job:
    """Two ranks, each in a folder of its own."""
    port = free_port()
    return Job([each.start_rank(rank, 2, port, *words) for rank, each in enumerate((box, other))])


@pytest.mark.slow
def test_machines_that_share_no_disk_are_refused(box: Sandbox) -> None:
    """The second rank's folder has no checkpoint: it would begin with fresh weights beside trained ones."""
    box.start("--run.stop_after_step=2").ended(75)
    other = box.another("elsewhere")
    said = [child.said for child in start_apart(box, other).ended(4).children]
    assert "rank 1 finds" in said[0] and str(box.run_folder().name) in said[0] and "error" not in said[1], said
    with (other.folder / "corpus.txt").open("a") as file:
        file.write("one more line.\n" * 20)
    shutil.rmtree(box.run_folder())
    job = start_apart(box, other, f"--run.output_dir={box.folder / 'runs'}").ended(2)
    assert "corpus" in job.children[1].said


@pytest.mark.slow
def test_ranks_save_together_by_the_first_ones_clock(box: Sandbox) -> None:
    """What the first asks for, once a second, reaches all one step later; the last step is saved anyway."""
    by_the_clock = ("--checkpoint.every_steps=0", "--checkpoint.every_minutes=1e-9", "--checkpoint.mode=sync")
    box.train(*by_the_clock, "--checkpoint.keep_last=0", "--training.steps=6", ranks=2)
    assert box.steps()[0] == 2 and set(box.steps()) <= {2, 4, 6}
