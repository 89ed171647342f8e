"""Saving and loading: round trips, every kind of damage, every mismatch, full disks, and kills at every instant."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import resource
import signal
import struct
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.runs import flip

from titanlite.checkpoint import manager, save, storage
from titanlite.checkpoint.format import DTYPES, MANIFEST, CheckpointMetadata, _checksum, folder_name
from titanlite.checkpoint.load import load_state
from titanlite.checkpoint.manager import CheckpointManager
from titanlite.checkpoint.save import group_by_size, plan_local_save, save_state
from titanlite.checkpoint.storage import read_manifest
from titanlite.errors import CheckpointError, NewerFormatError
from titanlite.models.shard import Shard
from titanlite.recipe.sections import Checkpoint

COUNTERS = {"samples": 0, "tokens": 0, "values": {}, "recipe": "", "environment": {}}


class Run:
    """A manager, and what it warned of."""

    def __init__(self, folder: Path, keep_last: int = 0, background: bool = True) -> None:
        self.warnings: list[str] = []
        self.folder = folder
        section = Checkpoint(mode="async" if background else "sync", keep_last=keep_last, max_failures=0)
        self.manager = CheckpointManager(folder, self.warnings.append, section=section)
        self.manager.prepare()

    def save(self, step: int, tensors: dict[str, torch.Tensor] | None = None) -> Path:
        tensors = state(step) if tensors is None else tensors
        self.manager.begin(whole(tensors), CheckpointMetadata(step, samples=step * 10, tokens=step * 100))
        self.manager.wait()
        return self.manager.path(step)

    def load(self) -> tuple[int, dict[str, torch.Tensor]]:
        tensors = state(-1)
        manifest = self.manager.load_latest(whole(tensors))
        assert manifest is not None
        return manifest.step, tensors


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, Shard]:
    return {name: Shard.whole(tensor) for name, tensor in tensors.items()}


def state(step: int) -> dict[str, torch.Tensor]:
    """Tensors all of whose values are the step, so that a mixture of two checkpoints cannot pass."""
    return {"model.w": torch.full((7, 5), float(step)), "optimizer.w.step": torch.tensor(step)}


def random_bits(shape: list[int], dtype: str, seed: int) -> torch.Tensor:
    """A tensor of arbitrary bits: NaNs, infinities and subnormal numbers included."""
    torch_dtype = getattr(torch, dtype)
    count = int(torch.tensor(shape).prod()) if shape else 1
    generator = torch.Generator().manual_seed(seed)
    if dtype == "bool":
        return torch.randint(0, 2, shape, generator=generator).bool()
    data = torch.randint(0, 256, (count * DTYPES[dtype][0],), dtype=torch.uint8, generator=generator)
    return data.view(torch_dtype).reshape(shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


tables = st.dictionaries(
    st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=20).filter(
        lambda n: n != "__metadata__"
    ),
    st.tuples(st.lists(st.integers(0, 4), max_size=4), st.sampled_from(sorted(DTYPES)), st.integers(0, 99)),
    max_size=6,
)


@settings(max_examples=40, deadline=None)
@given(table=tables, file_bytes=st.sampled_from([1, 64, 10**9]))
def test_any_tensors_come_back_bit_for_bit(table, file_bytes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any") / folder_name(3)
    tensors = {name: random_bits(*spec) for name, spec in table.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "FILE_BYTES", file_bytes)
        save_state(folder, plan_local_save(whole(tensors)), CheckpointMetadata(3, 4, 5, "a = 1", {"n": 1}))
    manifest = read_manifest(folder)
    assert (manifest.samples, manifest.tokens, manifest.values, manifest.recipe) == (4, 5, {"n": 1}, "a = 1")
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load_state(folder, whole(targets))
    assert all(same_bits(targets[name], tensors[name]) for name in tensors)


def test_parameters_and_strided_tensors_are_read_in_place(tmp_path):
    run, weight = Run(tmp_path), torch.nn.Parameter(torch.randn(4, 3))
    run.save(1, {"w": weight, "t": torch.arange(6.0).reshape(2, 3).t()})
    target, strided = torch.nn.Parameter(torch.zeros(4, 3)), torch.zeros(2, 3).t()
    run.manager.load_latest(whole({"w": target, "t": strided}))
    assert torch.equal(target, weight) and torch.equal(strided, torch.arange(6.0).reshape(2, 3).t())


@pytest.mark.gpu
def test_tensors_on_a_gpu_are_saved_and_read_in_place(tmp_path):
    run = Run(tmp_path)
    a, b = torch.randn(300, 7, device="cuda"), torch.randn(9, device="cuda").bfloat16()
    saved = {"a": a, "b": b, "c": torch.arange(3)}
    folder = run.save(1, saved)
    assert read_manifest(folder).environment["device"] == torch.cuda.get_device_name()
    targets = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    run.manager.load_latest(whole(targets))
    assert all(torch.equal(targets[name], saved[name]) and targets[name].device == saved[name].device for name in saved)


def test_a_prefix_reads_the_weights_alone(tmp_path):
    run = Run(tmp_path)
    run.save(4)
    weights = {"model.w": torch.zeros(7, 5)}
    assert run.manager.load_latest(whole(weights), prefix="model.").step == 4
    assert torch.equal(weights["model.w"], state(4)["model.w"])


def rewrite(folder: Path, fields: dict) -> None:
    """Write a manifest with a right checksum."""
    fields.pop("checksum")
    (folder / MANIFEST).write_text(json.dumps({"checksum": _checksum(fields), **fields}))


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 60))
def test_files_are_filled_in_order_and_never_past_the_limit(sizes, limit):
    names = {f"t{i}": size for i, size in enumerate(sizes)}
    groups = group_by_size(names, limit)
    assert [name for group in groups for name in group] == list(names)
    assert all(len(group) == 1 or sum(names[n] for n in group) <= limit for group in groups)
    for group, following in itertools.pairwise(groups):
        assert sum(names[n] for n in group) + names[following[0]] > limit


def test_files_have_the_permissions_of_any_new_file(tmp_path):
    folder = Run(tmp_path).save(1)
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {(tmp_path / "plain").stat().st_mode}


# --- which checkpoint counts


def test_the_newest_is_by_number_whatever_the_clock_says(tmp_path):
    run = Run(tmp_path)
    for step in (9, 10, 100):
        run.save(step)
    os.utime(run.manager.path(9), (2**31, 2**31))
    os.utime(run.manager.path(100), (0, 0))
    assert run.manager.steps() == [9, 10, 100]
    assert run.load()[0] == 100


def test_a_folder_that_is_not_there_has_no_checkpoints(tmp_path):
    manager = CheckpointManager(tmp_path / "none", pytest.fail)
    assert manager.steps() == [] and manager.load_latest({}) is None
    assert not (tmp_path / "none").exists()


def test_only_the_last_are_kept(tmp_path):
    run = Run(tmp_path, keep_last=2)
    for step in (1, 2, 3, 4):
        run.save(step)
    assert sorted(os.listdir(tmp_path)) == ["step-00000003", "step-00000004"]
    assert run.warnings == []


def test_unicode_spaces_relative_and_linked_paths(tmp_path, monkeypatch):
    (tmp_path / "größe ☃ x").mkdir()
    (tmp_path / "link").symlink_to("größe ☃ x")
    monkeypatch.chdir(tmp_path)
    Run(Path("link/checkpoints")).save(1)
    assert Run(tmp_path / "größe ☃ x" / "checkpoints").load()[0] == 1


# --- damage


def shard(folder: Path) -> Path:
    return folder / "tensors-00000-000.safetensors"


DAMAGES = {
    "cut by one byte": lambda f: os.truncate(shard(f), shard(f).stat().st_size - 1),
    "cut in half": lambda f: os.truncate(shard(f), shard(f).stat().st_size // 2),
    "longer": lambda f: shard(f).open("ab").write(b"x"),
    "bit in the data": lambda f: flip(shard(f), -3),
    "bit in the header": lambda f: flip(shard(f), 20),
    "shard missing": lambda f: shard(f).unlink(),
    "shard is a link": lambda f: (shard(f).rename(f.parent / "away"), shard(f).symlink_to(f.parent / "away")),
    "shard is a pipe": lambda f: (shard(f).unlink(), os.mkfifo(shard(f))),
    "shard is a folder": lambda f: (shard(f).unlink(), shard(f).mkdir()),
    "manifest missing": lambda f: (f / MANIFEST).unlink(),
    "manifest empty": lambda f: (f / MANIFEST).write_bytes(b""),
    "manifest cut": lambda f: os.truncate(f / MANIFEST, 200),
    "manifest endless": lambda f: os.truncate(f / MANIFEST, 2**40),
    "manifest garbage": lambda f: (f / MANIFEST).write_bytes(random.Random(0).randbytes(500)),
    "manifest bit": lambda f: flip(f / MANIFEST, 60),
    "of another step": lambda f: (f / MANIFEST).write_bytes((f.parent / folder_name(1) / MANIFEST).read_bytes()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(damage, tmp_path):
    run = Run(tmp_path)
    for step in (1, 2):
        run.save(step)
    damage(run.manager.path(2))
    step, tensors = run.load()
    assert step == 1 and torch.equal(tensors["model.w"], state(1)["model.w"])
    assert str(run.manager.path(2)) in run.warnings[0] and "passed over" in run.warnings[0]
    assert "1 step will be trained again" in run.warnings[-1]


def test_if_all_are_damaged_the_error_names_each(tmp_path):
    run = Run(tmp_path)
    for step in (1, 2):
        DAMAGES["bit in the data"](run.save(step))
    with pytest.raises(CheckpointError, match="no usable checkpoint") as refusal:
        run.load()
    assert "step-00000001" in str(refusal.value) and "step-00000002" in str(refusal.value)
    assert refusal.value.exit_code == 4


def test_a_damaged_later_step_does_not_come_back_as_the_newest(tmp_path):
    run = Run(tmp_path, keep_last=2)
    for step in (10, 20):
        run.save(step)
    DAMAGES["bit in the data"](run.manager.path(20))
    run.load()
    run.save(15)
    assert run.manager.steps() == [10, 15]
    assert (tmp_path / "set-aside-1-step-00000020" / MANIFEST).exists()  # nothing is lost
    assert run.load()[0] == 15


@pytest.mark.parametrize(("saved", "kept"), [((30,), [10, 30]), ((20, 30), [20, 30]), ((15, 20, 30), [20, 30])])
def test_a_damaged_one_does_not_take_the_place_of_a_whole_one(saved, kept, tmp_path):
    run = Run(tmp_path, keep_last=2)
    for step in (10, 20):
        run.save(step)
    DAMAGES["bit in the data"](run.manager.path(20))
    again = Run(tmp_path, keep_last=2)
    assert again.load()[0] == 10
    for step in saved:
        again.save(step)
    assert again.manager.steps() == kept and again.load()[0] == 30


def test_the_current_step_is_one_that_is_whole_and_a_damaged_one_is_replaced(tmp_path):
    run = Run(tmp_path)
    for step in (1, 2):
        run.save(step)
        assert run.manager.current == step
    DAMAGES["bit in the data"](run.manager.path(2))
    again = Run(tmp_path)
    assert again.manager.current is None
    assert again.load()[0] == 1 and again.manager.current == 1
    again.save(2)
    assert again.manager.current == 2 and Run(tmp_path).load()[0] == 2


def test_a_newer_format_is_not_passed_over(tmp_path):
    run = Run(tmp_path)
    for step in (1, 2):
        run.save(step)
    path = run.manager.path(2) / MANIFEST
    path.write_text(path.read_text().replace('"version":1', '"version":3'))
    with pytest.raises(NewerFormatError, match="needs titanlite format 3"):
        run.load()


def test_a_header_that_disagrees_with_the_manifest_is_damage(tmp_path):
    """Both files are whole by their hashes, and still lie."""
    run = Run(tmp_path)
    folder = run.save(1)
    save_file({"model.w": torch.zeros(5, 7), "optimizer.w.step": torch.tensor(1)}, shard(folder))
    fields = json.loads((folder / MANIFEST).read_bytes())
    fields["files"][shard(folder).name] = storage.describe_file(shard(folder))._asdict()
    rewrite(folder, fields)
    with pytest.raises(CheckpointError, match="otherwise than its manifest"):
        run.load()
    shard(folder).write_bytes(struct.pack("<Q", 2**60) + b"{}" + b"\0" * 500)
    fields = json.loads((folder / MANIFEST).read_bytes())
    fields["files"][shard(folder).name] = storage.describe_file(shard(folder))._asdict()
    rewrite(folder, fields)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        run.load()


def test_every_mismatch_is_named_and_nothing_is_touched(tmp_path):
    run = Run(tmp_path)
    ones = {name: torch.ones(1) for name in ("both", "old")}
    run.save(1, {"same": torch.ones(2), "shape": torch.ones(2, 3), "dtype": torch.ones(2), **ones})
    targets = {
        "same": torch.zeros(2), "shape": torch.zeros(3, 2), "dtype": torch.zeros(2, dtype=torch.bfloat16),
        "both": torch.zeros((), dtype=torch.int64), "new": torch.zeros(1),
    }  # fmt: skip
    with pytest.raises(CheckpointError) as refusal:
        run.manager.load_latest(whole(targets))
    lines = [line.strip() for line in str(refusal.value).splitlines()[1:]]
    assert sorted(lines) == [
        "both: float32 in the checkpoint, int64 here",
        "both: shape [1] in the checkpoint, [] here",
        "dtype: float32 in the checkpoint, bfloat16 here",
        "new: missing in the checkpoint",
        "old: in the checkpoint, but not in this model",
        "shape: shape [2, 3] in the checkpoint, [3, 2] here",
    ]
    assert run.warnings == [] and all(not tensor.any() for tensor in targets.values())


# --- a disk that refuses


def in_child(body) -> int:
    """Run `body` in a forked process; its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_full_disk_is_named_and_harms_nothing(tmp_path):
    run = Run(tmp_path, keep_last=1, background=False)
    run.save(1)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
        with pytest.raises(
            CheckpointError, match=r"step-00000002 \(of which .*\): File too large \(.* free\).*Earlier .* untouched"
        ):
            run.save(2, {"w": torch.zeros(1000)})

    assert in_child(fill) == 0
    assert os.listdir(tmp_path) == ["step-00000001"] and run.load()[0] == 1


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match=str(folder)):
            CheckpointManager(folder, pytest.fail).prepare()


def test_an_old_one_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch):
    run = Run(tmp_path, keep_last=1)
    run.save(1)

    def refuse(final):
        raise OSError(30, os.strerror(30), str(final))

    monkeypatch.setattr(storage, "remove", refuse)
    run.save(2)
    assert str(run.manager.path(1)) in run.warnings[0] and "Read-only file system" in run.warnings[0]


def test_a_linked_checkpoint_is_read_and_only_the_link_is_pruned(tmp_path):
    run = Run(tmp_path / "run", keep_last=1)
    run.save(1).rename(tmp_path / "elsewhere")
    run.manager.path(1).symlink_to(tmp_path / "elsewhere")
    assert run.load()[0] == 1
    run.save(2)
    assert os.listdir(tmp_path / "run") == ["step-00000002"] and (tmp_path / "elsewhere" / MANIFEST).exists()


# --- readers beside a run


def test_a_reader_that_came_too_late_takes_the_newer_one(tmp_path, monkeypatch):
    run, load, warnings = Run(tmp_path, keep_last=1), manager.load_state, []
    run.save(1)

    def late(folder, *rest):
        if folder.name == folder_name(1):
            run.save(2)
        return load(folder, *rest)

    monkeypatch.setattr(manager, "load_state", late)
    tensors = state(-1)
    manifest = CheckpointManager(tmp_path, warnings.append).load_latest(whole(tensors))
    assert manifest.step == 2 and torch.equal(tensors["model.w"], state(2)["model.w"])


def test_a_folder_that_is_no_longer_the_runs_is_not_written_to(tmp_path):
    run = Run(tmp_path / "run")
    run.save(1)
    (tmp_path / "run").rename(tmp_path / "moved")
    for there in (False, True):
        with pytest.raises(CheckpointError, match="no longer the folder that this run began in"):
            run.save(2)
        assert os.path.exists(tmp_path / "run") == there
        (tmp_path / "run").mkdir(exist_ok=True)
    assert os.listdir(tmp_path / "run") == []
    (tmp_path / "run").rmdir()
    (tmp_path / "moved").rename(tmp_path / "run")
    run.save(3)
    assert run.manager.steps() == [1, 3]


# --- errors of the disk


CHANGES = ((os, ("fsync", "rename", "mkdir", "rmdir", "unlink")), (Path, ("write_bytes",)))
"""What changes the disk for good."""


def around_changes(patch: pytest.MonkeyPatch, before, after) -> None:
    """Have `before(name)` and `after(name)` called around every change of the disk from now on."""

    def wrap(owner, name):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            before(name)
            result = original(*args, **kwargs)
            after(name)
            return result

        patch.setattr(owner, name, wrapped)

    for owner, names in CHANGES:
        for name in names:
            wrap(owner, name)


def fail_at(patch: pytest.MonkeyPatch, call: int, done: bool) -> list[str]:
    """The `call`-th change of the disk from now on is refused, or it is `done` and its answer lost; what was called."""
    calls: list[str] = []

    def count(name):
        calls.append(name)
        if len(calls) == call:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    around_changes(patch, *((lambda name: None, count) if done else (count, lambda name: None)))
    return calls


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_after_an_error_at_any_call_a_save_has_failed_or_is_there(tmp_path, monkeypatch, again, done):
    """One or the other, as the run is told; older ones stay if the disk is not sure, and the next try succeeds."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    call, calls, unsure = 0, [""], 0
    while len(calls) >= call:
        call += 1
        folder = tmp_path / str(call)
        for step in (1, 2) if again else (1,):
            Run(folder).save(step)
        run = Run(folder, keep_last=1)
        with monkeypatch.context() as patch, suppress(CheckpointError):
            calls = fail_at(patch, call, done)
            run.save(2, state(3))
        there = run.manager.current == 2
        step, tensors = run.load()
        assert (step, int(tensors["model.w"][0, 0])) == ((2, 3) if there else (2, 2) if again else (1, 1)), calls
        doubt = any("loss of power" in text for text in run.warnings)
        assert run.manager.steps()[0] == 1 or (there and not doubt)
        unsure += doubt
        run.save(2, state(4))
        assert Run(folder).load()[1]["model.w"][0, 0] == 4
        assert os.listdir(folder) == ["step-00000002"], "the next start clears the rest"
    assert call > 8 and unsure == 1


# --- kills


def die_at(call: int) -> None:
    """Have this process killed at the `call`-th time it is about to change the disk for good (or just did)."""
    calls = itertools.count(1)

    def count(name):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    around_changes(pytest.MonkeyPatch(), count, count)


def saves_until_killed(folder: Path, call: int, first: int) -> None:
    run = Run(folder, keep_last=1)
    die_at(call)
    run.save(first)
    run.save(first + 1)
    run.save(first + 1)  # replaces


def test_killed_at_every_call_the_newest_is_whole(tmp_path):
    run, call, status = Run(tmp_path, keep_last=1), 0, -9
    run.save(1)
    while status != 0:
        call += 1
        assert call < 500
        before = max(run.manager.steps(), default=None)
        status = in_child(lambda call=call, before=before: saves_until_killed(tmp_path, call, before + 1))
        assert status in (0, -signal.SIGKILL)
        run.manager.prepare()
        step, tensors = run.load()
        assert before <= step <= before + 2
        assert all(torch.equal(tensor, state(step)[name]) for name, tensor in tensors.items())
        assert all(name.startswith("step-") for name in os.listdir(tmp_path)), "leftovers are cleared at the start"
    assert call > 40
    assert run.warnings == []
