"""Runs that fail: the crash records, the rank that is blamed, when a run is given up, and the launcher's exit code."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import runs
from support.failing_ranks import RUN, SECTIONS, ended, program, started
from support.tiny import train

from titanlite.cli.main import _launcher_exit_code
from titanlite.errors import GuardStop, StoppedEarly, UsageError
from titanlite.resilience import watchdog
from titanlite.resilience.crashes import Crash, attempts, digest, history, record, refuse_loop
from titanlite.training import trainer
from titanlite.training.train_state import TrainState

TINY = SECTIONS

CRASH = Crash(
    attempt=1, restart=0, time="2026-01-01T00:00:00+00:00", step=7, samples=(24, 27), rank=1, ranks=4, host="node7",
    kind="ValueError", message="no", traceback="", recipe=digest("r"),
)  # fmt: skip


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Makes a step of every run from now on fail; None: none."""
    take_step = trainer.take_step

    def at(step: int | None) -> None:
        def failing_step(self: TrainState, number: int, *rest: Any) -> Any:
            if number == step:
                raise ValueError("the sample is poisoned")
            return take_step(self, number, *rest)

        monkeypatch.setattr(trainer, "take_step", failing_step)

    return at


def fails(*arguments: str) -> None:
    with pytest.raises(ValueError, match="poisoned"):
        train(*arguments)


def status() -> dict[str, Any]:
    return runs.status()


def starts() -> list[str]:
    return [row["detail"] for row in runs.rows("tiny", "started")]


@pytest.mark.parametrize(
    ("steps", "limit", "committed", "stops"),
    [
        pytest.param([7, 7], 3, 6, False, id="too few"),
        pytest.param([7, 7, 7], 3, 6, True, id="enough"),
        pytest.param([5, 7, 7, 7], 3, 6, True, id="what failed before does not matter"),
        pytest.param([7, 7, 5, 7], 3, 4, False, id="not in a row"),
        pytest.param([7, 7, 7], 3, 7, False, id="a checkpoint is past it"),
        pytest.param([7, 7, 7], 0, 0, False, id="switched off"),
        pytest.param([1], 1, 0, True, id="once is enough"),
        pytest.param([], 1, 0, False, id="never"),
    ],
)
def test_when_a_run_is_given_up(tmp_path: Path, steps: list[int], limit: int, committed: int, stops: bool) -> None:
    for attempt, step in enumerate(steps, 1):
        record(tmp_path, replace(CRASH, attempt=attempt, step=step))
    refuse_loop(tmp_path, limit, committed, "another")
    if not stops:
        refuse_loop(tmp_path, limit, committed, "r")
        return
    with pytest.raises(GuardStop) as refused:
        refuse_loop(tmp_path, limit, committed, "r")
    said = str(refused.value)
    assert all(word in said for word in ("samples 24 to 27", "rank 1 of 4 on node7", "ValueError: no"))


def test_the_first_record_of_a_start_stays(tmp_path: Path) -> None:
    for crash in (CRASH, replace(CRASH, rank=3), replace(CRASH, attempt=2, samples=())):
        record(tmp_path, crash)
    (tmp_path / "attempt-00003.json").write_text('{"attempt": 3, "ste')  # cut off by a kill
    assert history(tmp_path) == [CRASH, replace(CRASH, attempt=2, samples=())]


@pytest.mark.parametrize(
    "damage",
    [{"step": "seven"}, {"samples": [1]}, {"samples": 7}, {"rank": None}, {"attempt": 1.5}, {"message": ["no"]}],
)
def test_a_damaged_record_is_none(tmp_path: Path, damage: dict[str, Any]) -> None:
    record(tmp_path, CRASH)
    (file,) = tmp_path.iterdir()
    for number in ("00002", "\u00b2", "99999999999", "-1"):
        (tmp_path / f"attempt-{number}.json").write_text(json.dumps({**json.loads(file.read_text()), **damage}))
    (tmp_path / "attempt-00003.json").write_text("[" * 10**6)
    os.mkfifo(tmp_path / "attempt-00004.json")
    assert history(tmp_path) == [CRASH] and attempts(tmp_path) == [1, 2, 3, 4]


def test_a_step_that_fails_again_and_again_ends_the_run(
    folder: Path, failing: Callable[[int | None], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(4)
    for _ in range(3):
        fails()
    rows = (RUN / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert train() == 3
    said = capsys.readouterr().err
    for words in ("step 4 (samples 12 to 15)", "3 times in a row", "rank 0 of 1 on ", "ValueError: the sample is pois"):
        assert words in said and words in status()["reason"]
    assert (status()["state"], status()["exit_code"]) == ("failed", 3)
    assert (RUN / "metrics.jsonl").read_bytes() == rows, "nothing was trained"
    crashes = history(RUN / "logs" / "crashes")
    assert [(crash.attempt, crash.step, crash.samples) for crash in crashes] == [(n, 4, (12, 15)) for n in (1, 2, 3)]
    assert "in failing_step" in crashes[0].traceback and crashes[0].recipe == crashes[2].recipe
    fails("--optimizer.eps=1e-8", "--resilience.max_skips=11")
    fails("--resilience.max_crashes=0")
    failing(None)
    assert train("--resilience.max_crashes=0") == 0


def test_a_crash_that_cannot_be_recorded_is_printed(
    folder: Path, failing: Callable[[int | None], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Issue 14, section D: a file in place of the folder let no crash count, in silence."""
    failing(4)
    fails()
    shutil.rmtree(RUN / "logs" / "crashes")
    (RUN / "logs" / "crashes").touch()
    capsys.readouterr()
    fails()
    said = capsys.readouterr().err
    assert said.count(str(RUN / "logs" / "crashes")) == 1 and "resilience.max_crashes" in said


def test_the_count_begins_anew_without_the_records_and_past_the_step(
    folder: Path, failing: Callable[[int | None], None]
) -> None:
    failing(3)
    fails("--resilience.max_crashes=1")
    assert train("--resilience.max_crashes=1") == 3
    shutil.rmtree(RUN / "logs" / "crashes")
    failing(5)  # the checkpoint of step 4 comes before
    fails("--resilience.max_crashes=1")
    assert train("--resilience.max_crashes=1") == 3
    shutil.rmtree(RUN / "logs" / "crashes")
    failing(None)
    assert train("--resilience.max_crashes=1") == 0
    assert starts()[0].startswith("start 1 of this run, 1 rank on ")
    assert [text.split(" of ")[0] for text in starts()] == ["start 1", "start 3", "start 5"]
    assert "failed: ValueError: the sample is poisoned" not in starts()[0] and "failed: step 5" in starts()[2]


def test_a_step_that_hangs_again_and_again_ends_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Instead of the process, the step ends here; what is not a process's end no clock decides."""

    class EndedError(Exception):
        pass

    def hang(self: TrainState, number: int, *rest: Any) -> Any:
        if number != 4:
            return take_step(self, number, *rest)
        ended.clear()
        hangs.set()
        assert ended.wait(timeout=60)
        hangs.clear()
        raise EndedError

    take_step, hangs, ended = trainer.take_step, threading.Event(), threading.Event()
    monkeypatch.setattr(trainer, "take_step", hang)
    monkeypatch.setattr(watchdog, "silence", lambda *_: math.inf if hangs.is_set() else 0.0)
    monkeypatch.setattr(watchdog, "_ENDING_SECONDS", 600.0)
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    for _ in range(2):
        with pytest.raises(EndedError):
            train("--resilience.max_crashes=2")
    first, second = history(RUN / "logs" / "crashes")
    assert (first.kind, first.step, first.samples, second.attempt) == ("Hang", 4, (12, 15), 2)
    assert "rank 0 (" in first.message and first.traceback.endswith("runs/tiny/logs/rank-00000.log")
    capsys.readouterr()
    assert train("--resilience.max_crashes=2") == 3
    said = capsys.readouterr().err
    assert "step 4 (samples 12 to 15) has failed 2 times in a row" in said and "Hang: no progress" in said


def test_what_the_user_got_wrong_is_no_crash(folder: Path) -> None:
    assert train("--run.stop_after_step=2") == 75
    corpus = Path("corpus.txt").read_text()
    for _ in range(2):
        Path("corpus.txt").write_text(f"changed. {corpus}")
        assert train("--resilience.max_crashes=1") == 2
    Path("corpus.txt").write_text(corpus)
    assert train("--resilience.max_crashes=1") == 0


def test_kills_are_no_crashes_and_are_reported(folder: Path) -> None:
    process = subprocess.Popen(program("kill@3@0", "--resilience.max_crashes=1"))
    assert process.wait() == -signal.SIGKILL
    assert status()["state"] == "running" and status()["pid"] == process.pid
    assert train("--resilience.max_crashes=1") == 0
    assert f"process {process.pid} on " in starts()[1] and "killed" in starts()[1]
    assert not (RUN / "logs" / "crashes").exists()


@pytest.mark.slow
def test_the_rank_that_failed_is_the_one_that_is_reported(folder: Path) -> None:
    (first_code, first), (second_code, second) = ended(started("raise@4@1", "--resilience.max_crashes=1"))
    assert (first_code, second_code) == (1, 1)
    assert second.count("Traceback") == 1 and "ValueError: the sample is poisoned" in second
    assert "Traceback" not in first and first.count("rank 0 ends because rank 1 of 2 on ") == 1, first
    assert status()["reason"] in first and "failed in step 4: ValueError: the sample is poisoned" in first
    (crash,) = history(RUN / "logs" / "crashes")
    assert (crash.rank, crash.ranks, crash.step, crash.kind) == (1, 2, 4, "ValueError")
    verdicts = ended(started("", "--resilience.max_crashes=1"))
    assert [code for code, _ in verdicts] == [3, 3], "no rank is left waiting"
    assert "step 4 (samples 12 to 15) has failed once" in verdicts[0][1] and not verdicts[1][1]


@pytest.mark.slow
def test_memory_that_runs_out_on_one_rank(folder: Path) -> None:
    (first_code, first), (second_code, second) = ended(started("memory@3@1"))
    assert (first_code, second_code) == (1, 2)
    assert "memory is full" in second and "3.00 GiB" in second and "training.microbatch" in second
    assert "Traceback" not in first + second and "rank 0 ends because rank 1 of 2 on " in first
    assert [path.name for path in (RUN / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.slow
def test_a_rank_that_is_killed_leaves_one_line_on_the_others(folder: Path) -> None:
    (first_code, first), (second_code, second) = ended(started("kill@3@1"))
    assert (first_code, second_code) == (1, -signal.SIGKILL)
    assert "rank 0 has lost another rank" in first and "Traceback" not in first and not second
    assert not (RUN / "logs" / "crashes").exists()


@pytest.mark.slow
def test_torchrun_does_not_go_on_after_the_verdict(folder: Path) -> None:
    codes = folder / "codes"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=5"]
    process = subprocess.run(
        [*launcher, *program("raise@4@1", "--resilience.max_crashes=1")[1:]],
        env={**os.environ, "TITANLITE_EXIT_CODE_FILE": str(codes)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    assert (
        "torchrun makes none" in process.stderr
        and process.stderr.count("step 4 (samples 12 to 15) has failed once") == 1
    )
    assert (status()["exit_code"], status()["attempt"]) == (3, 2)
    assert codes.read_text().split()[-2:] == ["3", "3"]
    assert [text.split(",")[0] for text in starts()] == ["start 1 of this run (restart 0 by torchrun)"]


@pytest.mark.parametrize(
    ("error", "code", "launcher_code", "left"),
    [
        pytest.param(None, 0, 0, 1, id="done"),
        pytest.param(StoppedEarly(), 75, 0, 0, id="a planned stop"),
        pytest.param(GuardStop(), 3, 0, 1, id="a guard, with restarts left"),
        pytest.param(GuardStop(), 3, 3, 0, id="a guard, without"),
        pytest.param(UsageError(), 2, 2, 1, id="what one rank met alone"),
        pytest.param(ValueError(), 1, 1, 1, id="our mistake"),
    ],
)
def test_exit_code_for_torchrun(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, code: int, launcher_code: int, left: int
) -> None:
    monkeypatch.delenv("TITANLITE_EXIT_CODE_FILE", raising=False)
    assert _launcher_exit_code(code, error) == code
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(2 + left))
    assert _launcher_exit_code(code, error) == launcher_code


@pytest.mark.parametrize(
    ("agents", "elastic", "received", "launcher_code"),
    [
        pytest.param(2, "1", False, 75, id="a machine leaves; this one is to be started again without it"),
        pytest.param(2, "1", True, 0, id="this machine leaves"),
        pytest.param(2, "0", False, 0, id="the whole run is to stop"),
        pytest.param(1, "1", False, 0, id="another process of this machine was signalled"),
    ],
)
def test_exit_code_for_torchrun_after_a_signal(
    monkeypatch: pytest.MonkeyPatch, agents: int, elastic: str, received: bool, launcher_code: int
) -> None:
    monkeypatch.setattr("titanlite.cli.main._AGENT_SECONDS", 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("GROUP_WORLD_SIZE", str(agents))
    monkeypatch.setenv("TITANLITE_ELASTIC", elastic)
    stop = StoppedEarly()
    stop.signalled, stop.received = True, received
    assert _launcher_exit_code(75, stop) == launcher_code


def test_recipes_have_different_digests() -> None:
    assert digest("a") == digest("a") != digest("b")
