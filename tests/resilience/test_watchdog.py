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
from collections import Counter
from collections.abc import Collection, Iterator
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
from titanlite.checkpoint.format import CheckpointMetadata, FileEntry
from titanlite.checkpoint.manager import CheckpointManager
from titanlite.errors import CheckpointError
from titanlite.models.shard import Shard
from titanlite.parallel.ranks import Ranks
from titanlite.plan.rules import apply_rules
from titanlite.recipe.sections import Checkpoint, Parallel, Recipe, Resilience
from titanlite.resilience.crashes import history
from titanlite.resilience.rank_table import (
    LEFT,
    HangReport,
    Location,
    RankStatus,
    find_stragglers,
    lagging_ranks,
    locate,
    look_at,
    summarize,
)
from titanlite.resilience.watchdog import HangCoordinator, silence

RANK = """
import os, runpy, signal, sys, time
from titanlite.training import trainer
from titanlite.training.train_state import TrainState
from titanlite.resilience import watchdog

step, fault, rank = trainer.take_step, sys.argv[1], sys.argv[2]
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

trainer.take_step = faulty
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
            steps.append(None)

def write(step, report):
    Path("hung").write_text(f"{step} {report.rank} {report.reason}")

steps = []
with Watchdog(float(sys.argv[1]), Path("."), steps_taken=lambda: len(steps), on_hang=write):
    print("watched", flush=True)
    on_and_on()
"""


def rank(number: int, **fields: object) -> RankStatus:
    return replace(RankStatus(number, "node", 100 + number, "node pids", 4, "training", waits=True), **fields)


some_table = some.lists(
    some.builds(
        RankStatus,
        rank=some.just(0),
        host=some.text(max_size=5),
        pid=some.just(0),
        pid_namespace=some.sampled_from("ab"),
        step=some.integers(0, 9),
        phase=some.sampled_from(["training", "saving", LEFT]),
        waits=some.booleans(),
        waited=some.none() | some.floats(0, 1),
    ),
    min_size=1,
    max_size=6,
).map(lambda table: [replace(row, rank=number, pid=100 + number) for number, row in enumerate(table)])


def lagging(table: list[RankStatus], stopped: Collection[int] = ()) -> tuple[str, list[int]]:
    why, rows = lagging_ranks(table, stopped)
    return why, [row.rank for row in rows]


def test_lagging_are_those_that_do_not_run_then_those_that_do_not_wait_then_those_behind() -> None:
    table = [rank(0), rank(1, waits=False), rank(2, step=3), rank(3)]
    assert lagging(table, {3})[1] == [3] and "does not run" in lagging(table, {3})[0]
    assert lagging(table)[1] == [1] and "waits for no other" in lagging(table)[0]
    table[1] = rank(1)
    assert lagging(table)[1] == [2] and "fewer steps" in lagging(table)[0]
    table[2] = rank(2)
    assert lagging(table) == ("", [])
    table[2] = rank(2, phase=LEFT, waits=False)
    assert lagging(table)[1] == [2]
    assert lagging([rank(0)])[1] == [0], "a single rank holds itself up"


def test_the_table_of_many_ranks_is_not_read_once_for_each() -> None:
    class Table(list[RankStatus]):
        readings = 0

        def __iter__(self) -> Iterator[RankStatus]:
            self.readings += 1
            return super().__iter__()

    table = Table(rank(number, step=9 - number % 2) for number in range(100))
    assert len(lagging(table)[1]) == 50 and table.readings < 10


@given(some_table, some.data())
def test_the_report_names_the_lagging_ranks_and_one_neighbour_signals_those_that_do_not_run(
    table: list[RankStatus], data: some.DataObject
) -> None:
    stopped = data.draw(some.sets(some.sampled_from([row.rank for row in table if row.phase != LEFT] or [-1]))) - {-1}
    late = lagging(table, stopped)[1]
    if stopped:
        assert set(late) == stopped
    elif len(table) > 1:
        assert len(late) < len(table), "of ranks that all run, some wait for the others"
        assert all(not table[one].waits or table[one].step < max(row.step for row in table) for one in late)
    report = HangReport.of(table, [replace(row, updates=int(row.rank not in stopped)) for row in table])
    assert all((row.name in report.reason) == (row.rank in late) and row.name in report.table for row in table)
    assert report.rank in late or not late
    expected = set()
    for one in stopped:
        running = (row for row in table if row.rank not in stopped)
        beside = [row.rank for row in running if row.pid_namespace == table[one].pid_namespace]
        expected |= {(min(beside), 100 + one)} if beside else set()
    assert len(report.to_signal) == len(expected) and set(report.to_signal) == expected


def test_a_rank_without_updates_does_not_run() -> None:
    before = [rank(0, updates=3), rank(1, updates=5, host="elsewhere"), rank(2, updates=7)]
    after = [rank(0, updates=4), before[1], rank(2, updates=7, phase=LEFT), rank(3, updates=1)]
    report = HangReport.of(before, after)
    assert (report.rank, report.host, report.to_signal) == (1, "elsewhere", [(0, 101)])
    assert "after step 4, training" in report.reason
    assert "no rank stands out" in HangReport.of(before[:1], after[:1] + after[3:]).reason


@given(some_table)
def test_stragglers_wait_a_fifth_less_than_most(table: list[RankStatus]) -> None:
    found = find_stragglers(table)
    waited = {row.rank: row.waited for row in table if row.waited is not None}
    for number, share in waited.items():
        others = [other for rank, other in waited.items() if rank != number]
        assert (number in found) == (bool(others) and median(others) - share >= 0.2), (others, share)
    assert set(found) <= set(waited) and set(find_stragglers(table[::-1])) == set(found)


def test_a_straggler_is_described_by_where_it_was() -> None:
    def window(*looks: tuple[Location, int]) -> dict[str, object]:
        return dict(zip(("waited", "busiest"), summarize(Counter(dict(looks))), strict=True))

    read, compute = Location(False, "data/loader.py:read"), Location(False, "a.py:step")
    fast = window((Location(True, "a.py:step"), 64), (compute, 36))
    slow = window((read, 71), (compute, 27), (Location(True, "a.py:step"), 2))
    found = find_stragglers([rank(number, **(slow if number == 2 else fast)) for number in range(4)])
    assert list(found) == [2]
    assert all(part in found[2] for part in ("rank 2 (node, process 102)", "2%", "64%", "71% in data/loader.py:read"))
    assert summarize(Counter({Location(True, "x"): 3})) == (1.0, "0% in ?")


def test_a_process_that_was_stopped_was_not_silent_meanwhile() -> None:
    assert silence(0.0, 0.5) == 0.5
    assert silence(0.5, 1000.0) == 1.5


def test_where_a_thread_is() -> None:
    class Work:
        def wait(self) -> None:
            seen.append(locate(sys._getframe(1)))

    def waits() -> None:
        Work().wait()

    def busy() -> None:
        seen.append(locate(sys._getframe()))

    def parses() -> None:
        json.loads("1", parse_int=lambda _: seen.append(locate(sys._getframe(1))))

    seen: list[Location] = []
    waits()
    busy()
    sorted([1], key=lambda _: busy())
    parses()
    file = "resilience/test_watchdog.py"
    expected = [(True, "waits"), (False, "busy"), (False, "busy"), (False, "parses")]
    assert seen == [(waiting, f"{file}:{name}") for waiting, name in expected]


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
    checkpoints = CheckpointManager(tmp_path, pytest.fail, section=Checkpoint(max_failures=0))
    checkpoints.begin({"w": Shard.whole(torch.zeros(3))}, CheckpointMetadata(1, 0, 0, ""))
    trainer = threading.Thread(target=wait)
    trainer.start()
    try:
        assert begun.wait(timeout=60) and trainer.ident is not None
        until, expected = time.monotonic() + 20, "resilience/test_watchdog.py:hung_disk"
        while (seen := look_at(trainer.ident).place) != expected and time.monotonic() < until:
            time.sleep(0.01)  # until it has come to wait
    finally:
        go.set()
        trainer.join()
    assert seen == expected


@pytest.mark.parametrize("way", waiting_ranks.WAYS)
def test_a_rank_that_waits_is_told_from_one_that_is_held_up(pool: Pool, tmp_path: Path, way: str) -> None:
    waiting, busy = pool.run(waiting_ranks.seen, 2, way, str(tmp_path / "seen"))
    assert waiting[0] and not busy[0]
    assert busy[1].endswith("waiting_ranks.py:held_up")


def test_a_watchdog_slower_than_the_process_group_is_warned_of() -> None:
    def warned(seconds: float, timeout: float, world: int = 2) -> bool:
        parallel, resilience = Parallel(timeout_seconds=timeout), Resilience(watchdog_seconds=seconds)
        findings = apply_rules(Recipe(parallel=parallel, resilience=resilience), world)
        return "resilience.watchdog_seconds" in [finding.key for finding in findings]

    assert warned(300, 300) and warned(150, 600)  # a save may take four times as long
    assert not warned(120, 600) and not warned(0, 600) and not warned(900, 600, world=1)


def coordinators(monkeypatch: pytest.MonkeyPatch, count: int) -> list[HangCoordinator]:
    """Those of so many ranks, at work, of which one finds a hang."""
    store = HashStore()
    monkeypatch.setattr("titanlite.parallel.ranks._get_default_store", lambda: store)
    made = [HangCoordinator(rank(number), Ranks(number, count), 0.02) for number in range(count)]
    made[-1].hang = True
    for one in made:
        one.start()
    return made


def test_ranks_agree_on_a_report_that_one_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = coordinators(monkeypatch, 3)
    assert None not in [one.wait_for_report() for one in ranks]
    assert [one.is_reporter for one in ranks] == [False, False, True] and len({str(one.report) for one in ranks}) == 1


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
    assert report == errors.decode() and "<string>:on_and_on" in report
    step, _, said = (tmp_path / "hung").read_text().partition(" ")
    assert f"after step {step}, training" in report and said == "0 " + report.splitlines()[0].partition(" ")[2]


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
        looker = threading.Thread(target=look_at, args=(threading.get_ident(),))
        looker.start()
        looker.join()
        return weakref.ref(held)

    gc.disable()
    try:
        assert looked_at()() is None
    finally:
        gc.enable()
