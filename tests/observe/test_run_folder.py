"""Who may use a run folder, and what is never lost in it."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from titanlite import files as durable
from titanlite.errors import EXIT_RECIPE, UsageError
from titanlite.observe.run_folder import Start, has_run, open_run_folder
from titanlite.recipe.load import to_toml
from titanlite.recipe.sections import Recipe


def recipe(**sections) -> Recipe:
    return Recipe.model_validate({"training": {"steps": 10}, **sections})


def opened(path, mode="auto", force=False, of=None, warn=pytest.fail):
    of = of or recipe()
    return open_run_folder(path, of, to_toml(of), Start(mode, force), warn)


def started(path, **sections):
    """A run that has written everything a run writes, and ended."""
    folder = opened(path, of=recipe(**sections))
    for file in (
        path / "metrics.jsonl",
        folder.checkpoints / "step-00000005" / "manifest.json",
        path / "tensorboard" / "events",
        folder.logs / "log",
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("precious")
    folder.write_status("done", 10, 0)
    folder.close()


def listing(path):
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name != ".lock"
    }


def refused(*args, **kwargs) -> str:
    with pytest.raises(UsageError) as refusal:
        opened(*args, **kwargs)
    assert refusal.value.exit_code == EXIT_RECIPE
    return str(refusal.value)


@pytest.mark.parametrize("mode", ["auto", "fresh"])
@pytest.mark.parametrize("there", [False, True])
def test_a_new_run_has_its_folder_made(tmp_path, mode, there):
    path = tmp_path / "deep" / "größe x" if not there else tmp_path
    folder = opened(path, mode)
    assert not folder.resumed and folder.changes == {} and has_run(path)
    assert folder.recipe.read_text() == to_toml(recipe())
    assert folder.checkpoints.is_dir() and folder.logs.is_dir()
    status = json.loads(folder.status.read_text())
    assert status["state"] == "running" and status["step"] == 0 and status["exit_code"] is None
    folder.close()


def test_the_status_is_replaced_whole(tmp_path):
    folder = opened(tmp_path)
    folder.write_status("stopped", 7, 75, "SIGTERM")
    status = json.loads(folder.status.read_text())
    assert time.time() - 60 < datetime.fromisoformat(status.pop("time")).timestamp() <= time.time()
    who = {"attempt": 1, "job": [], "pending": "", "pid": os.getpid(), "host": platform.node()}
    assert status == {"state": "stopped", "exit_code": 75, "step": 7, "reason": "SIGTERM", **who}
    folder.close()


def test_the_same_recipe_resumes_and_nothing_changes(tmp_path):
    started(tmp_path)
    before = listing(tmp_path)
    for mode in ("auto", "resume"):
        folder = opened(tmp_path, mode)
        assert folder.resumed and folder.changes == {}
        folder.close()
    assert listing(tmp_path) == before


def test_a_recipe_that_differs_in_what_may_change_resumes_and_is_written(tmp_path):
    started(tmp_path)
    now = recipe(
        metrics={"log_every": 3},
        checkpoint={"every_steps": 2},
        run={"stop_after_step": 4, "name": "moved"},
        data={"workers": 2},
    )
    folder = opened(tmp_path, of=now)
    assert folder.resumed and folder.changes == {
        "metrics.log_every": (10, 3), "checkpoint.every_steps": (0, 2), "run.stop_after_step": (None, 4),
        "run.name": ("run", "moved"), "data.workers": (0, 2),
    }  # fmt: skip
    assert folder.recipe.read_text() != to_toml(now), "the start may still be refused"
    folder.settle(0)
    assert folder.recipe.read_text() == to_toml(now)
    folder.close()


def test_another_recipe_is_refused_with_every_difference_and_the_ways_out(tmp_path):
    started(tmp_path)
    before = listing(tmp_path)
    for mode in ("auto", "resume"):
        text = refused(tmp_path, mode, of=recipe(model={"dim": 99}, optimizer={"lr": 0.5}, metrics={"log_every": 2}))
        assert "model.dim: None there, 99 here" in text and "optimizer.lr: 0.0003 there, 0.5 here" in text
        assert "metrics" not in text
        assert "run.name" in text and "--fresh --force" in text and str(tmp_path / "recipe.toml") in text
    assert listing(tmp_path) == before


def test_fresh_needs_force_and_then_deletes_what_a_run_wrote_and_no_more(tmp_path):
    started(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = listing(tmp_path)
    assert "--force" in refused(tmp_path, "fresh")
    assert listing(tmp_path) == before
    folder = opened(tmp_path, "fresh", force=True, of=recipe(model={"dim": 99}))
    assert not folder.resumed
    assert sorted(listing(tmp_path)) == ["notes.txt", "recipe.toml", "status.json"]
    folder.close()


def test_force_follows_no_links_out_of_the_folder(tmp_path):
    started(tmp_path / "run")
    shutil.move(tmp_path / "run" / "checkpoints", tmp_path / "big disk")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "big disk")
    opened(tmp_path / "run", "fresh", force=True).close()
    assert (tmp_path / "big disk" / "step-00000005" / "manifest.json").read_text() == "precious"


@pytest.mark.parametrize("mode", ["auto", "fresh"])
@pytest.mark.parametrize("force", [False, True])
def test_a_folder_with_other_files_and_no_run_is_refused(tmp_path, mode, force):
    (tmp_path / "thesis.tex").write_text("mine")
    assert "thesis.tex" in refused(tmp_path, mode, force)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_path_that_leaves_no_room_for_a_checkpoints_files_is_refused_before_the_first_step(tmp_path, monkeypatch):
    """Issue 14, section D: no save would succeed."""
    monkeypatch.chdir(tmp_path)
    said = refused(Path(*19 * ["y" * 200], "z" * 200))
    assert "4,095" in said and "run.name" in said and os.listdir(tmp_path) == []


def test_resume_needs_a_run(tmp_path):
    assert "no run to resume" in refused(tmp_path / "none", "resume")
    assert not (tmp_path / "none").exists()


def test_remains_without_a_recipe_are_not_guessed_at(tmp_path):
    started(tmp_path)
    (tmp_path / "recipe.toml").unlink()
    assert "no recipe.toml" in refused(tmp_path)
    opened(tmp_path, "fresh", force=True).close()


def test_a_file_in_the_way_and_a_folder_that_cannot_be_made_are_named(tmp_path):
    (tmp_path / "file").touch()
    assert "is a file" in refused(tmp_path / "file")
    assert f"{tmp_path / 'file' / 'below'}" in refused(tmp_path / "file" / "below")


@pytest.mark.parametrize("refusing", ["replace", "mkdir"])
def test_a_full_or_read_only_disk_is_named_with_the_path(tmp_path, monkeypatch, refusing):
    def refuse(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, refusing, refuse)
    text = refused(tmp_path / "run" if refusing == "mkdir" else tmp_path)
    assert str(tmp_path) in text and "No space left on device (" in text and " free)" in text
    monkeypatch.undo()
    opened(tmp_path).close()


def test_a_disk_that_fills_up_later_costs_a_warning(tmp_path, monkeypatch):
    warnings = []
    folder = opened(tmp_path, warn=warnings.append)
    before = folder.status.read_bytes()
    monkeypatch.setattr(durable.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
    folder.write_status("running", 5)
    assert "status.json: No space left" in warnings[0] and folder.status.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == [".lock", "checkpoints", "logs", "recipe.toml", "status.json"]
    folder.close()


def test_too_little_room_is_said_before_training(tmp_path):
    folder = opened(tmp_path)
    folder.require_space(1, "a checkpoint")
    with pytest.raises(UsageError, match=r"free, and a checkpoint needs 1024.00 TiB"):
        folder.require_space(2**50, "a checkpoint")
    folder.close()


def test_a_second_process_is_refused_by_the_holders_name(tmp_path):
    ready, written = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            opened(tmp_path)
            if os.fork() == 0:  # a data worker, which outlives its trainer
                time.sleep(60)
                os._exit(0)
            os.write(written, b"x")
            time.sleep(200)
        finally:
            os._exit(1)
    os.close(written)
    os.read(ready, 1)
    try:
        for mode, force in (("auto", False), ("fresh", True)):
            text = refused(tmp_path, mode, force)
            assert f"in use by process {child} on {os.uname().nodename}" in text
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    opened(tmp_path).close()  # killed: the lock went with it, though the worker still lives
    os.close(ready)


HOLD = """
import fcntl, sys
lock = open(sys.argv[1], "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("process 7 on elsewhere", file=lock, flush=True)
print("held", flush=True)
sys.stdin.read()
"""


def test_the_lock_of_a_lost_machine_is_waited_for(tmp_path):
    """A file server lets go of it after a while."""
    started(tmp_path)
    command = [sys.executable, "-c", HOLD, tmp_path / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        warnings = []

        def warn(text):
            warnings.append(text)
            holder.stdin.close()

        opened(tmp_path, warn=warn).close()
    assert len(warnings) == 1 and "in use by process 7 on elsewhere; waiting" in warnings[0]
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {platform.node()}\n"


def test_starts_are_counted_and_the_last_end_is_known(tmp_path):
    folder = opened(tmp_path)
    assert (folder.attempt, folder.last_end()) == (1, "")
    folder.write_status("failed", 3, 1, "ValueError: no")
    folder.close()
    folder = opened(tmp_path)
    assert (folder.attempt, folder.last_end()) == (2, "failed: ValueError: no")
    folder.write_status("running", 3)
    folder.close()  # as a kill leaves it
    folder = opened(tmp_path)
    assert folder.attempt == 3 and folder.last_end().startswith(
        f"process {os.getpid()} on {platform.node()} ended without"
    )
    folder.close()
    folder.status.write_text("{ no status")
    folder = opened(tmp_path)
    assert folder.attempt == 1 and folder.last_end() == ""
    folder.close()


def started_as(path, start, **sections):
    of = recipe(**sections)
    return open_run_folder(path, of, to_toml(of), start, pytest.fail)


DELETE = Start("fresh", force=True)


@pytest.mark.parametrize(
    ("before", "now", "deleted"),
    [
        pytest.param((), replace(DELETE), True, id="by hand"),
        pytest.param(("a",), replace(DELETE, job=("b",)), True, id="another job"),
        pytest.param(("a",), replace(DELETE, job=("a",)), False, id="the same job"),
        pytest.param(("a", "b"), replace(DELETE, job=("b", "c")), False, id="the same job, on other machines"),
        pytest.param(("a",), replace(DELETE, job=("a",), restarted=True), False, id="a restart"),
        pytest.param(("b",), replace(DELETE, job=("a",), restarted=True), True, id="a restart, the first that is here"),
        pytest.param((), replace(DELETE, job=("a",), restarted=True), True, id="the same, of a run begun by hand"),
        pytest.param((), replace(DELETE, restarted=True), False, id="a restart of a job without a name"),
        pytest.param(None, replace(DELETE, job=("a",), restarted=True), False, id="a restart, and no status is there"),
    ],
)
def test_what_was_asked_for_once_is_done_once(tmp_path, before, now, deleted):
    """The command line is the same each time; only the first start that can may do what it says once."""
    started(tmp_path)
    status = tmp_path / "status.json"
    if before is None:
        status.unlink()
    else:
        status.write_text(json.dumps({**json.loads(status.read_text()), "job": before}))
    folder = started_as(tmp_path, now)
    assert (not (tmp_path / "metrics.jsonl").exists(), not folder.resumed, folder.start.mode == "fresh") == (
        deleted,
    ) * 3
    folder.write_status("running", 0)
    folder.close()
    assert json.loads(status.read_text())["pending"] == ""


def test_a_restart_refuses_what_the_first_start_refused(tmp_path):
    started(tmp_path)
    for restarted in (False, True):
        with pytest.raises(UsageError, match="--force"):
            started_as(tmp_path, Start("fresh", restarted=restarted, job=("a",)))


@pytest.mark.parametrize(
    ("fields", "attempt", "step"),
    [
        ({"attempt": 2**31 - 2}, 2**31 - 1, None),
        ({"attempt": 2**31}, 2, None),
        ({"attempt": 2**70}, 2, None),
        ({"attempt": -1}, 2, None),
        ({"attempt": "7"}, 2, None),
        ({"job": ["a"], "pending": "--from-step 5"}, 2, 5),
        ({"job": ["a"], "pending": "--from-step \u00b2"}, 2, None),
        ({"job": ["a"], "pending": "--from-step " + 5000 * "9"}, 2, None),
        ({"job": [{}, []], "pending": 2**70}, 2, None),
    ],
)
def test_of_a_damaged_status_only_what_makes_sense_counts(tmp_path, fields, attempt, step):
    """Issue 14, section D: start numbers beyond 32 bits, which the log of what was read cannot hold."""
    started(tmp_path)
    (tmp_path / "status.json").write_text(json.dumps({"state": "done", **fields}))
    folder = started_as(tmp_path, Start(restarted=True, job=("a",)))
    assert (folder.attempt, folder.start.step) == (attempt, step)


def test_a_status_nested_without_end_is_a_damaged_one(tmp_path):
    started(tmp_path)
    (tmp_path / "status.json").write_text("[" * 10**6)
    folder = opened(tmp_path)
    assert folder.attempt == 1 and folder.resumed
    folder.close()


def test_an_unreadable_status_stops_a_start_that_might_delete(tmp_path):
    started(tmp_path)
    (tmp_path / "status.json").unlink()
    (tmp_path / "status.json").mkdir()
    with pytest.raises(UsageError, match="cannot use the run folder"):
        started_as(tmp_path, replace(DELETE, job=("a",)))
    assert (tmp_path / "metrics.jsonl").exists()


def test_going_back_to_a_step_is_pending_until_the_state_is_restored(tmp_path):
    def start(step=4, job=("a",), restarted=True):
        folder = started_as(
            tmp_path, Start("auto" if step is None else "resume", step=step, job=job, restarted=restarted)
        )
        folder.write_status("running", 0)
        folder.close()
        return folder

    started(tmp_path)
    assert start(restarted=False).start.step == 4
    assert start().start.step == 4
    assert start(step=None, restarted=False).start.step == 4, "a machine that comes, whatever its command line"
    assert start(step=None, job=(), restarted=False).start.step is None, "the user's word"
    assert start(step=6, job=("b",)).start.step == 6
    assert start(step=4, job=(), restarted=True).start.step is None, "it is not known to be pending"
    folder = started_as(tmp_path, Start("resume", step=4, job=("c",)))
    folder.settle(4)
    folder.close()
    assert start(job=("c",)).start == Start(job=("c",), restarted=True)


def test_a_restart_without_a_name_does_what_is_pending_if_it_is_asked_for_too(tmp_path):
    started(tmp_path)
    folder = started_as(tmp_path, Start("resume", step=4))
    folder.write_status("running", 0)
    folder.close()
    for step in (6, 4):
        folder = started_as(tmp_path, Start("resume", step=step, restarted=True))
        assert folder.start.step == (4 if step == 4 else None)
        folder.close()


def test_what_is_done_must_be_written_down(tmp_path, monkeypatch):
    """Else a restart would do it again, and undo what was trained since; where nothing was pending, a run goes on."""
    started(tmp_path)
    for start, ends in ((Start(), False), (Start("resume", step=4), True)):
        warnings = []
        folder = open_run_folder(tmp_path, recipe(), to_toml(recipe()), start, warnings.append)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
            with pytest.raises(UsageError, match="--from-step 4 is done") if ends else nullcontext():
                folder.settle(4)
        assert len(warnings) == 1
        folder.close()


def killed_at(patch, call):
    """The process is killed right before or after its `call`-th change to the folder; what it called."""
    calls = []

    def wrap(owner, name):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            for act in (lambda: None, lambda: original(*args, **kwargs)):
                result = act()
                calls.append(name)
                if len(calls) == call:
                    raise KeyboardInterrupt
            return result

        patch.setattr(owner, name, counted)

    for owner, name in ((shutil, "rmtree"), (os, "replace"), (Path, "unlink"), (Path, "mkdir")):
        wrap(owner, name)
    return calls


def test_a_deletion_that_was_killed_is_finished_by_the_restart(tmp_path, monkeypatch):
    call, calls = 0, [""]
    while len(calls) >= call:
        call += 1
        path = tmp_path / str(call)
        started(path)
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            calls = killed_at(patch, call)
            started_as(path, replace(DELETE, job=("a",)), model={"dim": 99}).close()
        folder = started_as(path, replace(DELETE, job=("a",), restarted=True), model={"dim": 99})
        assert sorted(listing(path)) == ["recipe.toml", "status.json"]
        assert folder.recipe.read_text() == to_toml(recipe(model={"dim": 99}))
        assert json.loads(folder.status.read_text())["pending"] == "" and folder.start.step is None
        folder.close()
    assert call > 15


def test_a_run_killed_while_it_was_deleted_is_still_a_run(tmp_path, monkeypatch):
    """For a user who does not ask again to have it deleted."""
    started(tmp_path)
    deleted = []
    real = shutil.rmtree

    def killed(path, *args, **kwargs):
        real(path, *args, **kwargs)
        deleted.append(path)
        if len(deleted) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path, "fresh", force=True)
    assert (tmp_path / "recipe.toml").exists()
    folder = opened(tmp_path)
    assert folder.resumed
    folder.close()


def test_replace_file_never_shows_half(tmp_path, monkeypatch):
    path = tmp_path / "x"
    durable.replace_file(path, b"old")

    def fail(*args):
        raise OSError(5, os.strerror(5))

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError):
                durable.replace_file(path, b"new")
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]
    durable.replace_file(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_file_system_without_fsync_is_named_as_the_reason(tmp_path, monkeypatch):
    """Issue 14, section D."""

    def refuse(descriptor):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    said = refused(tmp_path / "run")
    assert all(word in said for word in (str(tmp_path / "run"), ".recipe.toml.writing", "fsync", "file system")), said
