"""Processes that are stuck still end: for the time, or at the second signal."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from support.clone import wait_until
from support.failing_ranks import RUN, SECTIONS, ended, program, started

TINY = SECTIONS


def test_the_run_ends_when_its_grace_is_over(folder: Path) -> None:
    """Step 4 never ends; that of step 2 is the last checkpoint, step 3 is lost."""
    command = program("hang@4@0", "--resilience.grace_seconds=0.5", "--checkpoint.mode=sync")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_until(Path("hangs").exists)
    process.send_signal(signal.SIGUSR1)
    ((code, said),) = ended([process])
    assert code == 128 + signal.SIGUSR1
    assert "grace_seconds = 0.5 are over: up to step 2 is saved; what came after, up to step 3, is lost" in said
    assert [path.name for path in (RUN / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.slow
def test_a_second_signal_ends_a_rank_that_waits_for_another(folder: Path) -> None:
    """Python's own handlers would never run: the main thread is inside a collective."""
    processes = started("hang@4@1")
    wait_until(Path("hangs").exists)
    try:
        processes[0].send_signal(signal.SIGTERM)
        time.sleep(1.5)
        assert processes[0].poll() is None
        for _ in range(20):  # one is enough, unless it came so soon after the first was heard that it is its echo
            processes[0].send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                processes[0].wait(1.5)
                break
        assert processes[0].wait(60) == 128 + signal.SIGTERM
    finally:
        for process in processes:
            process.kill()
            process.communicate()


BUSY = """
import time
from titanlite.resilience.signals import StopRequests

with StopRequests(grace_seconds=0.2, lost=lambda: ""):
    print("begun", flush=True)
    time.sleep(300)
"""


def test_where_nothing_is_lost_the_end_of_the_grace_is_a_stop(tmp_path: Path) -> None:
    """The state is saved, and the process is busy with something else."""
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as one:
        assert one.stdout is not None and one.stdout.readline()
        one.send_signal(signal.SIGTERM)
        _, said = one.communicate(timeout=60)
    assert one.returncode == 75 and "0.2 are over: all is saved" in said
