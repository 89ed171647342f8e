"""Snapshots in memory: what is kept where, which losses they survive, and what they never bring back."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from support import snapshot_ranks
from support.pool import Pool
from support.runs import flip
from support.tiny import write_tiny

from titanlite.checkpoint import save, snapshots
from titanlite.checkpoint.format import MANIFEST, CheckpointMetadata, folder_name
from titanlite.checkpoint.snapshots import GENERATION, Move, Snapshots, assemble, backup_machines, plan_moves
from titanlite.cli.main import run_command
from titanlite.cli.train import main
from titanlite.errors import UsageError
from titanlite.models.shard import Shard
from titanlite.observe.run_folder import Start
from titanlite.training import trainer
from titanlite.training.saving import usable_snapshots
from titanlite.training.train_state import TrainState

PAIRS, RING, UNEQUAL = [0, 0, 2, 2], [0, 1, 2], [0, 0, 0, 3]
"""Ranks on machines, these by their first rank."""
SAID = ["going on from the snapshot of step 5 in memory."]


def plan_copies(sizes: dict[str, int], machines: list[int]) -> list[Move]:
    """By which each file gets to the machine after that of the rank that wrote it."""
    backups, holders = backup_machines(machines), {file: [machines[save.writer_of(file)]] for file in sizes}
    return plan_moves(sizes, holders, [(backups[holders[file][0]], file) for file in sizes], machines)


some_machines = some.lists(some.integers(0, 4), min_size=1, max_size=9).map(
    lambda places: [places.index(place) for place in places]
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def stored(folder: Path, machine: int, step: int) -> set[str]:
    (place,) = (folder / f"machine-{machine}").glob(f"titanlite-*/{folder_name(step)}")
    return {path.name for path in place.iterdir()}


@given(some_machines, some.data())
def test_any_machine_may_be_lost(machines: list[int], data: some.DataObject) -> None:
    """By the plans alone: what they keep, put together without one machine, is whole, and each gets what it wants."""
    places = sorted(set(machines))
    sizes = {f"tensors-{rank:05d}-{number:03d}.safetensors": 5 for rank in range(len(machines)) for number in (0, 1)}
    held = {place: {file for file in sizes if machines[save.writer_of(file)] == place} for place in places}
    for move in plan_copies(sizes, machines):
        assert move.file in held[machines[move.source]] and machines[move.target] != machines[move.source]
        held[machines[move.target]].add(move.file)
    lost = data.draw(some.sampled_from(places)) if len(places) > 1 else None
    reports = [report(sizes, held[rank]) if rank in places and rank != lost else None for rank in range(len(machines))]
    (whole,) = assemble(reports)
    assert whole.step == 7 and whole.sizes == sizes
    some_files = some.lists(some.sampled_from([*sizes]), unique=True)
    wanted = [data.draw(some_files) for _ in machines]
    if lost is not None:
        held[lost] = set()
    seeking = [(machine, file) for machine, files in zip(machines, wanted, strict=True) for file in files]
    for file, size, source, target in plan_moves(whole.sizes, whole.holders, seeking, machines):
        assert file in held[machines[source]] and size == whole.sizes[file] and (machines[target], file) in seeking
        assert file not in held[machines[target]], "no machine gets what it has, or a file twice"
        held[machines[target]].add(file)
    for rank, files in enumerate(wanted):
        assert set(files) <= held[machines[rank]]


def report(sizes: dict[str, int], held: set[str]) -> Any:
    return [[7, sizes, list(held)]]


@given(some_machines)
def test_in_each_turn_a_machine_sends_or_receives(machines: list[int]) -> None:
    sizes = {f"tensors-{rank:05d}-000.safetensors": 1 for rank in range(len(machines))}
    assert all((a == b) == (len(set(machines)) == 1) for a, b in backup_machines(machines).items())
    turns, sends, receives = 1, set(), set()
    for move in plan_copies(sizes, machines):
        source, target = machines[move.source], machines[move.target]
        if source in receives or target in sends:
            turns, sends, receives = turns + 1, set(), set()
        sends.add(source)
        receives.add(target)
    assert turns <= 3


def test_what_is_not_whole_is_not_counted() -> None:
    sizes = {"tensors-00000-000.safetensors": 1, "tensors-00001-000.safetensors": 1}
    first, second = sizes
    assert assemble([report(sizes, {first}), None]) == []
    assert len(assemble([report(sizes, {first}), report(sizes, {second})])) == 1
    assert assemble([None, []]) == []


@pytest.mark.parametrize("machines", [PAIRS, RING, UNEQUAL])
def test_a_lost_machine_costs_nothing(pool: Pool, folder: Path, machines: list[int]) -> None:
    """Neither its ranks' values nor, once it is replaced, those of others; also where other ranks load."""
    world = len(machines)
    pool.run(snapshot_ranks.take, world, str(folder), machines, [3, 5])
    for machine in sorted(set(machines)):
        shutil.copytree(folder, folder.with_name("all"), dirs_exist_ok=True)
        assert not list(folder.glob("machine-*/*/*3")), "the one before is gone"
        shutil.rmtree(folder / f"machine-{machine}")
        before = {path: path.stat().st_size for path in folder.rglob("tensors-*")}
        assert pool.run(snapshot_ranks.load, world, str(folder), machines) == [(5, SAID)] + [(5, [])] * (world - 1)
        assert {path: path.stat().st_size for path in folder.rglob("tensors-*")} == before, "none keeps more"
        assert pool.run(snapshot_ranks.load, world, str(folder), machines, 5) == [(None, [])] * world, "a disk has it"
        shutil.rmtree(folder)
        shutil.copytree(folder.with_name("all"), folder)
        left = [rank for rank, place in enumerate(machines) if place != machine][:2]
        fewer = [machines[rank] for rank in left]
        assert pool.run(snapshot_ranks.load, len(fewer), str(folder), fewer, 0, world)[0] == (5, SAID)
        shutil.rmtree(folder)
        shutil.copytree(folder.with_name("all"), folder)


def test_two_neighbours_lost_are_too_many(pool: Pool, folder: Path) -> None:
    pool.run(snapshot_ranks.take, 3, str(folder), RING, [5])
    for machine in (0, 1):
        shutil.rmtree(folder / f"machine-{machine}")
    assert pool.run(snapshot_ranks.load, 3, str(folder), RING) == [(None, [])] * 3


def test_on_one_machine_nothing_is_copied(pool: Pool, folder: Path) -> None:
    """In the background, where the state changes as soon as the save is begun."""
    pool.run(snapshot_ranks.take, 2, str(folder), [0, 0], [3, 4, 5], True)
    assert stored(folder, 0, 5) == {MANIFEST, "tensors-00000-000.safetensors", "tensors-00001-000.safetensors"}
    assert pool.run(snapshot_ranks.load, 2, str(folder), [0, 0]) == [(5, SAID), (5, [])]


@pytest.mark.parametrize("fault", ["no memory for a copy", "a file is lost", "a file is cut"])
def test_a_snapshot_that_fails_leaves_the_one_before(pool: Pool, folder: Path, fault: str) -> None:
    ends = pool.run(snapshot_ranks.take_with_fault, 3, str(folder), RING, fault, 1)
    assert len(set(ends)) == 1 and ends[0][0] == "CheckpointError" and "rank 1: cannot write" in ends[0][1]
    assert not list(folder.glob("machine-*/*/.step*")) and not list(folder.glob("machine-*/*/*2"))
    shutil.rmtree(folder / "machine-2")
    assert pool.run(snapshot_ranks.load, 3, str(folder), RING)[1:] == [(1, [])] * 2


def test_a_machine_that_comes_back_brings_nothing_from_another_line(pool: Pool, folder: Path) -> None:
    assert pool.run(snapshot_ranks.come_back, 2, str(folder), [0, 1], 1) == [None, None]
    assert not list(folder.glob("machine-1/*/*step*")), "nor does it keep that in its memory"


def test_a_damaged_snapshot_is_passed_over(pool: Pool, folder: Path) -> None:
    pool.run(snapshot_ranks.take, 2, str(folder), [0, 1], [5])
    for file in folder.glob("machine-*/*/*/tensors-00001-000.safetensors"):
        flip(file, -1)
    (step, warnings), (other, _) = pool.run(snapshot_ranks.load, 2, str(folder), [0, 1])
    assert step is other is None and "does not match its hash" in warnings[0] and "passed over" in warnings[0]


def test_what_a_killed_process_left(pool: Pool, folder: Path) -> None:
    """In the middle of a snapshot, and in the middle of getting files from another machine."""
    pool.run(snapshot_ranks.take, 2, str(folder), [0, 1], [5])
    (first,), (second,) = ((folder / f"machine-{number}").iterdir() for number in (0, 1))
    (second / folder_name(5) / MANIFEST).unlink()
    assert pool.run(snapshot_ranks.load, 2, str(folder), [0, 1]) == [(5, SAID), (5, [])]
    pool.run(snapshot_ranks.take, 2, str(folder), [0, 1], [5])
    (first / ".step-00000007.writing").mkdir()
    (first / folder_name(5) / "tensors-00001-000.safetensors").unlink()
    os.truncate(second / folder_name(5) / "tensors-00000-000.safetensors", 10)
    assert pool.run(snapshot_ranks.load, 2, str(folder), [0, 1]) == [(5, SAID), (5, [])]
    assert not list(first.glob(".step*"))


def alone(folder: Path) -> Snapshots:
    one = Snapshots(folder, folder / "checkpoints", pytest.fail)
    one.prepare()
    return one


def test_a_folder_of_somebody_else_is_refused(folder: Path) -> None:
    alone(folder)
    (place,) = folder.glob("titanlite-*")
    place.chmod(0o770)
    with pytest.raises(UsageError, match=re.escape(str(place))):
        alone(folder)
    shutil.rmtree(place)
    place.symlink_to(folder / "checkpoints")
    with pytest.raises(UsageError, match=re.escape(str(place))):
        alone(folder)
    with pytest.raises(UsageError, match=r"resilience\.snapshot_dir"):
        Snapshots(folder / "nowhere", folder / "checkpoints", pytest.fail).prepare()


def test_two_of_them_must_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    one, state = alone(folder), {"w": Shard.whole(torch.zeros(1000))}
    for free in (7999, 8000):
        monkeypatch.setattr(snapshots.shutil, "disk_usage", lambda path, free=free: Usage(free))
        if free < 8000:
            with pytest.raises(UsageError, match=r"two snapshots .* need 7\.81 KiB"):
                one.require_room(state)
    one.require_room(state)


def test_an_unreadable_line_is_begun_anew(folder: Path) -> None:
    one = alone(folder)
    one.begin_generation()
    one.begin({"w": Shard.whole(torch.ones(3))}, CheckpointMetadata(5))
    assert one.saves.result(wait=True) is not None
    (folder / "checkpoints" / GENERATION).write_bytes(b"../../..")
    other = alone(folder)
    assert other.find({"w": Shard.whole(torch.ones(3))}) == []
    assert not list(folder.glob("titanlite-*/step*"))
    other.close()
    assert not list(folder.glob("titanlite-*"))


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    write_tiny(
        tmp_path,
        lines=300,
        run={"name": "run"},
        training={"steps": 12, "global_batch": 4},
        checkpoint={"mode": "sync", "every_steps": 5},
    )
    (tmp_path / "memory").mkdir()
    monkeypatch.chdir(tmp_path)
    return lambda *words: run_command(main, ["recipe.toml", "--resilience.snapshot_dir=memory", *words])


EVERY = "--resilience.snapshot_every=3"


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]


def curve(name: str) -> list[tuple[Any, ...]]:
    return [(row["step"], row["samples"], row["loss"], row["grad_norm"]) for row in rows(name) if "loss" in row]


def killed(train: Callable[..., int], step: int, *words: str) -> None:
    """A run that dies in `step`."""
    take_step = trainer.take_step

    def dies(self: TrainState, number: int, *rest: Any) -> Any:
        if number == step:
            raise RuntimeError("the process dies")
        return take_step(self, number, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "take_step", dies)
        with pytest.raises(RuntimeError, match="dies"):
            train(*words)


def test_a_run_goes_on_from_its_last_snapshot(train: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    """After a crash later than the last checkpoint on disk; with the curve of a run that nothing happened to."""
    assert train("--run.name=a") == 0
    killed(train, 9, "--run.name=b", EVERY)
    assert len(list(Path("memory").iterdir())) == 1
    killed(train, 12, "--run.name=b", EVERY)
    assert "going on from the snapshot of step 6 in memory" in capsys.readouterr().out
    assert train("--run.name=b", EVERY) == 0
    assert "snapshot of" not in capsys.readouterr().out, "the disk has step 10, which is later than 9"
    assert curve("b") == curve("a")
    assert [row["event"] for row in rows("b") if row.get("event", "").startswith("snapshot")] == ["snapshot"] * 2
    assert not list(Path("memory").iterdir()), "once the state is on a disk, the memory is free"


@pytest.mark.parametrize(
    "words", [["--from-step=5", EVERY], ["--fresh", "--force", EVERY], ["--resilience.snapshot_every=0"]]
)
def test_a_run_that_turns_elsewhere_leaves_its_snapshots(
    train: Callable[..., int], capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """And dies before it has taken any other."""
    killed(train, 9, EVERY)
    killed(train, 1 if "--fresh" in words else 6, *words)
    assert train(EVERY) == 0
    assert "from the snapshot" not in capsys.readouterr().out


def test_a_machine_that_comes_back_after_the_run_went_on_without_it(
    train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """What it holds is of steps that have been taken otherwise since: here, with another learning rate."""
    killed(train, 9, EVERY)
    os.rename("memory", "away")
    os.mkdir("memory")
    killed(train, 7, EVERY, "--optimizer.lr=1e-4", "--allow-change=optimizer.lr")
    shutil.rmtree("memory")
    os.rename("away", "memory")
    assert train("--run.name=run", "--optimizer.lr=1e-4", EVERY) == 0
    assert "from the snapshot" not in capsys.readouterr().out
    assert [row[0] for row in curve("run")] == list(range(1, 13))


def test_a_snapshot_stands_in_for_a_damaged_checkpoint(
    train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also by another name of the run's folder; and a command that is refused costs nothing."""
    killed(train, 12, EVERY)
    (file,) = Path("runs/run/checkpoints/step-00000010").glob("*.safetensors")
    os.truncate(file, file.stat().st_size - 1)
    assert train("--run.name=run", "--from-step=4", EVERY) == 4
    os.symlink("runs", "link")
    capsys.readouterr()
    assert train("--run.name=run", "--run.output_dir=link", EVERY) == 0
    said = capsys.readouterr().out
    assert "step 10 is passed over" in said and "from the snapshot of step 9" in said
    assert curve("run") == curve_alone(train)


def curve_alone(train: Callable[..., int]) -> list[tuple[Any, ...]]:
    assert train("--run.name=alone") == 0
    return curve("alone")


def test_a_rollback_goes_to_the_same_step_with_snapshots_or_without(
    train: Callable[..., int], poison: Callable[[int], None]
) -> None:
    for name, every in (("a", 0), ("b", 3)):
        poison(9)
        words = "--resilience.on_nonfinite=rollback", f"--resilience.snapshot_every={every}"
        assert train(f"--run.name={name}", *words) == 0
    (back,) = [row for row in rows("b") if row.get("event") == "rollback"]
    assert "From step 9 back to 5" in back["detail"]
    assert curve("a") == curve("b")


def test_a_restart_goes_on_without_snapshots_where_they_do_not_fit(tmp_path: Path) -> None:
    said: list[str] = []
    logger = SimpleNamespace(info=said.append)
    for restarted in (False, True):
        none = Snapshots(tmp_path / "nowhere", tmp_path, pytest.fail)
        run: Any = SimpleNamespace(snapshots=none, start=Start(restarted=restarted), logger=logger)
        if restarted:
            assert usable_snapshots(run, {}) is None
        else:
            with pytest.raises(UsageError):
                usable_snapshots(run, {})
    assert "no snapshots are taken" in said[0] and len(said) == 1
