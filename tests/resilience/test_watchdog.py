"""Who is said to hold up a run or to slow it down; ranks that hang leave their stacks, and the run goes on."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from support import waiting_ranks
from support.pool import Pool
from support.tiny import write_tiny
from torch.distributed import HashStore

from titanlite.checkpoint import save
from titanlite.checkpoint.format import FileEntry
from titanlite.checkpoint.manager import CheckpointManager
from titanlite.checkpoint.save import Facts
from titanlite.errors import CheckpointError
from titanlite.models.shard import Shard
from titanlite.plan.rules.run import watching
from titanlite.recipe.sections import Parallel, Recipe, Resilience
from titanlite.resilience import board
from titanlite.resilience.board import Verdict
from titanlite.resilience.crashes import history
from titanlite.resilience.progress import (
    LEFT,
    Progress,
    Shares,
    accusation,
    laggards,
    stragglers,
    table,
    unheard,
    wakers,
)
from titanlite.resilience.sampling import Sampler, where
from titanlite.resilience.watchdog import Beat, _Silence

RANK = """
import os, runpy, signal, sys, time
from titanlite.training.train_state import TrainState
from titanlite.resilience import watchdog

step, fault, rank = TrainState.step, sys.argv[1], sys.argv[2]
watchdog.WINDOW_LOOKS = 15

def slow_disk():
    time.sleep(0.6)

def faulty(self, number, batch, factor):
    if os.environ["RANK"] == rank:
        if fault == "slow":
            slow_disk()
        elif number == 5 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGSTOP)
    return step(self, number, batch, factor)

TrainState.step = faulty
sys.argv[1:] = ["recipe.toml", *sys.argv[3:]]
runpy.run_module("titanlite.train", run_name="__main__")
"""

HANGS = """
import sys, time
from pathlib import Path
from titanlite.resilience.watchdog import Watchdog

def on_and_on():
    while True:
        time.sleep(0.1)
        if not Path("hang").exists():
            watchdog.beat(7)

def words(hang):
    Path("words").write_text(f"{hang.step} {hang.rank} {hang.stacks} {hang.verdict}")

with Watchdog(float(sys.argv[1]), Path("."), last_words=words) as watchdog:
    watchdog.beat(7)
    print("watched", flush=True)
    on_and_on()
"""


def rank(number: int, **fields: object) -> Progress:
    return replace(Progress(number, "node", "node pids", 100 + number, 4, "training", waits=True), **fields)


some_shares = some.none() | some.builds(Shares, some.floats(0, 1), some.text(max_size=5), some.floats(0, 1))
some_progress = some.builds(
    Progress,
    some.integers(0, 99), some.text(max_size=5), some.sampled_from("ab"), some.integers(1, 2**22), some.integers(0, 9),
    some.sampled_from(["training", "saving", LEFT]), some.floats(0, 1e6), some.booleans(), some.text(max_size=5),
    some_shares, some.integers(0, 3),
)  # fmt: skip
some_ranks = some.lists(some_progress, min_size=1, max_size=6).map(
    lambda ranks: [replace(one, rank=number, pid=100 + number) for number, one in enumerate(ranks)]
)


@given(some_progress)
def test_progress_comes_back_from_json(progress: Progress) -> None:
    assert Progress.from_json(progress.to_json()) == progress


def test_laggards_are_those_that_do_not_run_then_those_that_do_not_wait_then_those_behind() -> None:
    ranks = [rank(0), rank(1, waits=False, place="a.py:read"), rank(2, step=3), rank(3)]
    assert list(laggards(ranks, {3})) == [3]
    assert list(laggards(ranks, ())) == [1] and "a.py:read" in laggards(ranks, ())[1]
    ranks[1] = rank(1)
    assert list(laggards(ranks, ())) == [2] and "step 4" in laggards(ranks, ())[2]
    ranks[2] = rank(2)
    assert laggards(ranks, ()) == {} and "no rank stands out" in accusation(ranks, {})
    ranks[2] = rank(2, doing=LEFT, waits=False)
    assert laggards(ranks, ()) == {2: "it has left the run"}


@given(some_ranks, some.data())
def test_nobody_is_blamed_in_vain(ranks: list[Progress], data: some.DataObject) -> None:
    silent = data.draw(some.sets(some.sampled_from(range(len(ranks)))))
    named = laggards(ranks, silent)
    if silent:
        assert set(named) == silent
    else:
        assert len(named) < len(ranks), "of ranks that all run, some wait for the others"
        assert all(not ranks[number].waits or ranks[number].step < max(one.step for one in ranks) for number in named)
    said = accusation(ranks, named)
    assert all((one.name in said) == (one.rank in named) for one in ranks)
    assert all(one.name in table(ranks) for one in ranks)


@given(some_ranks, some.data())
def test_who_does_not_run_is_woken_by_one_neighbour(ranks: list[Progress], data: some.DataObject) -> None:
    silent = data.draw(some.sets(some.sampled_from(range(len(ranks)))))
    expected = set()
    for number in silent:
        neighbours = [one.rank for one in ranks if one.rank not in silent and one.pids == ranks[number].pids]
        expected |= {(min(neighbours), 100 + number)} if neighbours else set()
    assert len(wakers(ranks, silent)) == len(expected) and set(wakers(ranks, silent)) == expected


def test_a_verdict_says_which_rank_is_to_blame_and_where_it_is() -> None:
    before = [rank(0), rank(1, waits=False, host="elsewhere"), rank(2)]
    after = [replace(one, count=1) for one in before]
    assert Verdict.of(before, after).blamed == [(1, "elsewhere")]
    assert Verdict.of(before[::2], after[::2]).blamed == []


def test_who_tells_nothing_new_does_not_run() -> None:
    before = [rank(0, count=3), rank(1, count=5), rank(2, count=7)]
    after = [rank(0, count=4), rank(1, count=5), rank(2, count=7, doing=LEFT), rank(3, count=1)]
    assert unheard(before, after) == {1}


@given(some_ranks)
def test_stragglers_wait_a_fifth_less_than_most(ranks: list[Progress]) -> None:
    named = stragglers(ranks)
    waiting = {one.rank: one.shares.waiting for one in ranks if one.shares is not None}
    for number, share in waiting.items():
        others = [other for rank, other in waiting.items() if rank != number]
        assert (number in named) == (bool(others) and median(others) >= share + 0.2), (others, share)
    assert set(named) <= set(waiting) and set(stragglers(ranks[::-1])) == set(named)


def test_a_straggler_is_described() -> None:
    fast, slow = Shares(0.64, "a.py:step", 0.3), Shares(0.02, "loader.py:read", 0.71)
    named = stragglers([rank(number, shares=slow if number == 2 else fast) for number in range(4)])
    assert list(named) == [2]
    assert all(part in named[2] for part in ("rank 2 (node, process 102)", "2%", "64%", "71% in loader.py:read"))


def test_a_process_that_was_stopped_was_not_silent_meanwhile() -> None:
    beat = Beat(3, "training")
    silence, start = _Silence(beat), time.monotonic()
    assert silence.after(beat, start + 0.5) == pytest.approx(0.5, abs=0.1)
    assert silence.after(beat, start + 1000) == pytest.approx(1.5, abs=0.1)
    assert silence.after(Beat(3, "training"), start + 1001) == 0, "an equal beat is a new one all the same"
    assert silence.after(beat, start + 1001) == 0


def test_where_a_thread_is() -> None:
    class Waits:
        def wait(self) -> None:
            seen.append(where(sys._getframe(1)))

    def elsewhere() -> None:
        seen.append(where(sys._getframe()))

    seen: list[tuple[bool, str]] = []
    Waits().wait()
    elsewhere()
    sorted([1], key=lambda _: elsewhere())
    json.loads("1", parse_int=lambda _: seen.append(where(sys._getframe(1))))
    name = "test_watchdog.py:test_where_a_thread_is"
    assert seen == [(True, name), *2 * [(False, "test_watchdog.py:elsewhere")], (False, name)]


def test_a_thread_that_waits_for_a_save_is_where_the_save_is_held_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()

    def hung_disk(*arguments: object) -> FileEntry:
        begun.set()
        go.wait(timeout=60)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def wait() -> None:
        with pytest.raises(CheckpointError):
            checkpoints.wait()

    monkeypatch.setattr(save, "write_tensors", hung_disk)
    checkpoints = CheckpointManager(tmp_path, pytest.fail, background=True)
    checkpoints.begin({"w": Shard.whole(torch.zeros(3))}, Facts(1, 0, 0, ""))
    trainer = threading.Thread(target=wait)
    trainer.start()
    try:
        assert begun.wait(timeout=60) and trainer.ident is not None
        sampler, until, expected = Sampler(trainer.ident), time.monotonic() + 20, "test_watchdog.py:hung_disk"
        while (seen := sampler.look().place) != expected and time.monotonic() < until:
            time.sleep(0.01)  # until it has come to wait
    finally:
        go.set()
        trainer.join()
    assert seen == expected


@pytest.mark.parametrize("way", waiting_ranks.WAYS)
def test_a_rank_that_waits_is_told_from_one_that_is_held_up(pool: Pool, tmp_path: Path, way: str) -> None:
    waiting, busy = pool.run(waiting_ranks.seen, 2, way, str(tmp_path / "seen"))
    assert waiting[0] and not busy[0]
    assert busy[1] == "waiting_ranks.py:held_up"


def test_a_watchdog_slower_than_the_process_group_is_warned_of() -> None:
    def warned(seconds: float, timeout: float, world: int = 2) -> bool:
        parallel, resilience = Parallel(timeout_seconds=timeout), Resilience(watchdog_seconds=seconds)
        return bool(list(watching(Recipe(parallel=parallel, resilience=resilience), world)))

    assert warned(300, 300) and warned(150, 600)  # a save may take four times as long
    assert not warned(120, 600) and not warned(0, 600) and not warned(900, 600, world=1)


def boards(monkeypatch: pytest.MonkeyPatch, count: int) -> list[board.Board]:
    """Those of so many ranks, at work."""
    store = HashStore()
    monkeypatch.setattr(board, "_get_default_store", lambda: store)
    made = [board.Board(rank(number), count, 0.02) for number in range(count)]
    for one in made:
        threading.Thread(target=one.run, daemon=True).start()
    return made


def test_no_rank_ends_before_all_have_left_their_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "_PARTING_SECONDS", 120.0)
    ranks, events = boards(monkeypatch, 3), list[str]()
    ranks[1].ending = True

    def end(number: int) -> None:
        assert ranks[number].heard() is not None
        events.append("evidence")
        ranks[number].part()
        events.append("end")

    ending = [threading.Thread(target=end, args=(number,)) for number in range(3)]
    for number in (0, 1):
        ending[number].start()
    while ranks[0]._store.add("ready", 0) < 2:
        time.sleep(0.01)
    ending[2].start()  # a process that was stopped, and is woken
    for thread in ending:
        thread.join()
    assert events == ["evidence"] * 3 + ["end"] * 3


def test_a_rank_that_leaves_no_evidence_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "_PARTING_SECONDS", 0.1)
    ranks = boards(monkeypatch, 2)
    ranks[0].ending = True
    assert ranks[0].heard() is not None
    ranks[0].part()
    ranks[1].stop()


def test_evidence_is_expected_of_ranks_that_run_or_are_woken() -> None:
    before = [rank(0, count=1), rank(1, count=1), rank(2, count=1, pids="dead"), rank(3, doing=LEFT)]
    after = [replace(before[0], count=2), *before[1:]]
    verdict = board.Verdict.of(before, after)
    assert (verdict.wakers, verdict.parting) == ([[0, 101]], 2)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def log(folder: Path, number: int) -> str:
    return (folder / f"rank-{number:05d}.log").read_text()


def test_a_process_writes_its_stacks_when_asked_and_ends_when_it_hangs(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HANGS, "2.0"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as one:
        assert one.stdout is not None
        one.stdout.readline()
        until = time.monotonic() + 120
        while "in on_and_on" not in log(tmp_path, 0) and time.monotonic() < until:
            one.send_signal(signal.SIGUSR2)  # the first may come before the loop has begun
            time.sleep(0.1)
        (tmp_path / "hang").touch()
        _, errors = one.communicate(timeout=240)
    assert one.returncode == 1
    written = log(tmp_path, 0)
    asked, _, hung = written.partition("no sign of life")
    assert "in on_and_on" in asked and "in on_and_on" in hung and f"process {one.pid}" in hung
    report = (tmp_path / "watchdog.log").read_text()
    assert report == errors.decode() and "after step 7, training" in report and "<string>:on_and_on" in report
    assert (tmp_path / "words").read_text() == "7 0 rank-00000.log " + report.partition(" ")[2].rstrip("\n")


def test_a_fatal_signal_leaves_stacks(tmp_path: Path) -> None:
    program = HANGS.replace("time.sleep(0.1)", "import os; os.abort()")
    subprocess.run([sys.executable, "-c", program, "9.0"], cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL)
    assert "Fatal Python error: Aborted" in log(tmp_path, 0) and "in on_and_on" in log(tmp_path, 0)


def torchrun(folder: Path, fault: str, number: int, name: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    return subprocess.run(
        [*command, "rank.py", fault, str(number), f"--run.name={name}"],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def rows(folder: Path, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path, name: str) -> list[tuple[object, ...]]:
    return [(row["step"], row["samples"], row["loss"], row["grad_norm"]) for row in rows(folder, name) if "loss" in row]


@pytest.mark.slow
def test_a_slow_rank_is_named_and_a_stopped_one_is_left_behind(tmp_path: Path) -> None:
    """The slow run ends undisturbed, and is the curve that the other one, interrupted, must come back to."""
    write_tiny(
        tmp_path,
        lines=500,
        training={"steps": 18, "global_batch": 4},
        checkpoint={"every_steps": 3},
        resilience={"watchdog_seconds": 8},
    )
    (tmp_path / "rank.py").write_text(RANK)
    slow = torchrun(tmp_path, "slow", 1, "slow")
    assert slow.returncode == 0, slow.stderr
    told = [str(row["detail"]) for row in rows(tmp_path, "slow") if row.get("event") == "straggler"]
    assert len(told) == 1, "once for as long as it lasts"
    assert told[0].startswith("rank 1 ") and "rank.py:slow_disk" in told[0]

    stopped = torchrun(tmp_path, "stop", 1, "stopped")
    assert stopped.returncode == 0, stopped.stderr
    logs = tmp_path / "runs" / "stopped" / "logs"
    report = (logs / "watchdog.log").read_text()
    accused = report.splitlines()[0]
    assert "rank 1 " in accused and "does not run" in accused and "rank 0 " not in accused and report in stopped.stderr
    assert "in all_reduce" in log(logs, 0) and 'rank.py", line' in log(logs, 1) and "in faulty" in log(logs, 1)
    for number in range(2):
        assert log(logs, number).count("watched from now on") == 2, "a restart adds to what is there"
    for flight in logs.glob("flight-*.json"):
        assert json.loads(flight.read_text())["entries"]
    hung = [row for row in rows(tmp_path, "stopped") if row.get("event") == "hung"]
    assert [(row["step"], "rank 1 " in str(row["detail"])) for row in hung] == [(4, True)]
    (crash,) = history(logs / "crashes")
    assert (crash.kind, crash.step, crash.samples, crash.rank, crash.ranks) == ("Hang", 5, (16, 19), 1, 2)
    assert crash.message == hung[0]["detail"] and crash.traceback.endswith("runs/stopped/logs/rank-00001.log")
    assert curve(tmp_path, "stopped") == curve(tmp_path, "slow")


def test_a_look_keeps_nothing_alive() -> None:
    """Trainers leave Python's collector of cycles off."""

    class Activations:
        pass

    def looked_at() -> weakref.ref[Activations]:
        held = Activations()
        looker = threading.Thread(target=Sampler(threading.get_ident()).look)
        looker.start()
        looker.join()
        return weakref.ref(held)

    gc.disable()
    try:
        assert looked_at()() is None
    finally:
        gc.enable()
