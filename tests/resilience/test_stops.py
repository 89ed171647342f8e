"""Ways to end a run between two steps: limits, signals at awkward moments, guards that remember an earlier life."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import runs
from support.runs import rows
from support.tiny import train

from titanlite.recipe.sections import Resilience
from titanlite.resilience.guards import Guards

SIGNALLED_WHILE_SAVING = """
import os, signal, sys, time
from titanlite.checkpoint import manager
from titanlite.cli.main import run_command
from titanlite.resilience import signals as listening
from titanlite.cli.train import main

save_state, step, signals, pause = manager.save_state, int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
if not pause:
    listening._ECHO_SECONDS = 60.0  # on a busy machine "at once" may take a second

def save(final, portion, facts, ranks):
    if facts.step == step:
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(pause)
    return save_state(final, portion, facts, ranks)

manager.save_state = save
sys.exit(run_command(main, ["recipe.toml", *sys.argv[4:]]))
"""


def status() -> tuple[object, object, object]:
    fields = runs.status()
    return fields["state"], fields["exit_code"], fields["step"]


def test_a_step_limit_that_is_already_reached_trains_no_further(folder: Path) -> None:
    assert train("--run.stop_after_step=3") == 75
    for limit in (3, 2):
        assert train(f"--run.stop_after_step={limit}") == 75
        assert status() == ("stopped", 75, 3)
    assert train() == 0
    assert train("--run.stop_after_step=3") == 0, "a run that is done stays done"


@pytest.mark.parametrize(
    ("step", "signals", "pause", "code"),
    [
        pytest.param(6, 1, 0.0, 0, id="in the last save: it is finished, and so is the run"),
        pytest.param(2, 2, 0.0, 75, id="twice at once: the launcher's echo"),
        pytest.param(2, 20, 1.2, 128 + signal.SIGTERM, id="again after a while: at once", marks=pytest.mark.slow),
    ],
)
def test_signals_during_a_save(folder: Path, step: int, signals: int, pause: float, code: int) -> None:
    words = [sys.executable, "-c", SIGNALLED_WHILE_SAVING, str(step), str(signals), str(pause)]
    process = subprocess.run(
        [*words, "--checkpoint.every_steps=2", "--checkpoint.mode=sync"], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.returncode == code
    saved = sorted(path.name for path in Path("runs/tiny/checkpoints").iterdir() if not path.name.startswith("."))
    assert saved == {0: ["step-00000004", "step-00000006"], 75: ["step-00000002"]}.get(code, [])


def test_steps_skipped_before_a_resume_are_neither_told_again_nor_fatal(
    folder: Path, poison: Callable[[int], None]
) -> None:
    poison(2)
    assert train("--resilience.on_nonfinite=skip", "--run.stop_after_step=3") == 75
    told = rows("tiny", "nonfinite")
    assert len(told) == 1, "one for the bad step, which is a logged one too"
    assert "skip (1 of at most 10)" in str(told[0]["detail"])
    assert train("--resilience.on_nonfinite=skip", "--run.stop_after_step=4") == 75
    assert rows("tiny", "nonfinite") == told
    assert train("--resilience.on_nonfinite=stop") == 0
    assert status() == ("done", 0, 6) and rows("tiny", "nonfinite") == told


def test_a_corpus_that_changed_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--run.stop_after_step=3") == 75
    text = Path("corpus.txt").read_text()
    Path("corpus.txt").write_text(text.replace("1 squared", "2 squared", 1))
    rows = Path("runs/tiny/metrics.jsonl").read_bytes()
    assert train() == 2
    said = capsys.readouterr().err
    assert "data.corpus" in said and "step 3" in said and Path("runs/tiny/metrics.jsonl").read_bytes() == rows
    Path("corpus.txt").write_text(text)
    assert train() == 0


def test_stop_still_stops_after_a_resume(folder: Path, poison: Callable[[int], None]) -> None:
    poison(2)
    assert train("--resilience.on_nonfinite=skip", "--run.stop_after_step=3") == 75
    poison(2)  # counted from the resume: step 5
    assert train("--resilience.on_nonfinite=stop") == 3
    assert "step 5:" in json.loads(Path("runs/tiny/status.json").read_text())["reason"]


def test_the_search_for_what_went_wrong_can_be_switched_on_in_the_run_that_did(
    folder: Path, poison: Callable[[int], None]
) -> None:
    """It is what the message of the guard advises."""
    poison(4)
    assert train("--checkpoint.every_steps=2") == 3
    assert "debug.find_nonfinite" in json.loads(Path("runs/tiny/status.json").read_text())["reason"]
    poison(0)
    assert train("--debug.find_nonfinite=true") == 0


def test_nothing_is_taken_after_the_first_bad_step_until_the_host_hears_of_it() -> None:
    guards = Guards(Resilience(on_nonfinite="stop"), torch.device("cpu"))
    good, bad = torch.tensor(1.0), torch.tensor(float("inf"))
    assert [bool(guards.judge(step, loss, good)) for step, loss in enumerate((good, bad, good), 1)] == [1, 0, 0]
