"""Who else uses the run folder, what it is called, and in which order and with which times it is listed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from support.chaos.fault import EQUAL, Fault, Outcome
from support.chaos.sandbox import EVERY, STEPS, Sandbox


def two_runs(box: Sandbox) -> Outcome:
    job = box.paused()
    second = box.start().ended(2)
    box.go()
    job.done()
    box.require_whole()
    said = box.message(second.said, "in use by")
    assert f"process {job.children[0].pid} on " in said, said
    return Outcome(0, EQUAL, said)


def stale_lock(box: Sandbox) -> Outcome:
    """What a killed process, or one on a machine that is gone, has left keeps nobody out."""
    box.paused().kill()
    reached = box.step()
    (box.run_folder() / ".lock").write_text("process 1 on elsewhere\n")
    said = box.train().said
    box.require_whole()
    return Outcome(reached - box.resumed(), EQUAL, box.message(said, "resumed"))


def lock_removed(box: Sandbox) -> Outcome:
    """Whoever comes in then has the folder, and the first writes nothing more there (issue 14, item 13)."""
    first = box.paused("--checkpoint.max_failures=99", step=EVERY + 1)
    box.until(lambda: box.steps() == [EVERY])
    (box.run_folder() / ".lock").unlink()
    second = box.start(fault="paused", step=3 * EVERY + 2, here="here 2", go="go 2")
    box.until((box.folder / "here 2").exists, second)
    before = _content(box)
    box.go()
    first.ended(4)
    after = _content(box)
    changed = {path for path in before | after if before.get(path) != after.get(path)}
    assert all(path.endswith(".bin") for path in changed), f"{changed}; what is read is kept apart by starts"
    (box.folder / "go 2").touch()
    second.done()
    assert "ended without a status" not in second.said, "it lives"
    box.require_whole()
    return Outcome(0, EQUAL, box.message(first.said, "error: "))


def same_path_elsewhere(box: Sandbox) -> Outcome:
    """Containers that share /dev/shm may each have a run of this path (issue 14, item 13): folders trade names here."""
    words = ("--resilience.snapshot_every=2", f"--resilience.snapshot_dir={box.folder / 'memory'}")
    (box.folder / "memory").mkdir()
    box.paused(*words, "--checkpoint.every_steps=0", step=EVERY + 3).kill()
    box.run_folder().parent.rename(box.folder / "one")
    (box.folder / "here").unlink()
    box.paused(*words, "--checkpoint.every_steps=0", step=EVERY + 1).kill()
    box.run_folder().parent.rename(box.folder / "other")
    (box.folder / "one").rename(box.run_folder().parent)
    said = box.train(*words).said
    assert box.resumed() == EVERY + 2
    box.require_whole()
    assert len(list((box.folder / "memory").glob("*/step-*"))) == 1, "the other's is there"
    return Outcome(0, EQUAL, box.message(said, "from the snapshot"))


def no_files(kinds: dict[str, Callable[[Path], object]], slow: bool = False) -> Fault:
    """Refused with the file's name, or passed over (all at once), and never waited for (issue 14, section D)."""

    def run(box: Sandbox) -> Outcome:
        said = ""
        for kind, make in kinds.items():
            for names in (*([name] for name in _REFUSED), _PASSED_OVER):
                one = box.another(f"{kind} {names[0].replace('/', ' ')}")
                one.prepared()
                for name in names:
                    path = one.run_folder() / name
                    path.parent.mkdir(exist_ok=True)
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                    make(path)
                words = f"--resilience.snapshot_dir={one.folder}", "--resilience.snapshot_every=2"
                job = one.start(*words, f"--run.stop_after_step={3 * EVERY + 1}")
                (code,) = job.wait(60)
                refused = names is not _PASSED_OVER
                assert code == (2 if refused else 75), f"{kind} in place of {names}: {code}\n{job.said}"
                assert "Traceback" not in job.said and (not refused or f"runs/run/{names[0]}" in job.said), job.said
                said = said or one.message(job.said, "error: ")
        return Outcome(None, "refused, or goes on without it", said)

    return Fault(32, f"a {', a '.join(kinds)} in place of each of the run folder's files", "mkfifo, ln", run, slow)


_REFUSED = (
    "status.json",
    "metrics.jsonl",
    ".lock",
    ".run",
    "logs/console.log",
    "logs/samples/rank-00000.bin",
    "checkpoints",
)
_PASSED_OVER = (
    "logs/crashes/attempt-00001.json",
    "logs/rank-00000.log",
    ".status.json.writing",
    "checkpoints/.snapshots",
    f"checkpoints/step-{3 * EVERY:08d}/manifest.json",
    f"checkpoints/.step-{3 * EVERY + 1:08d}.writing",
    f"checkpoints/step-{3 * EVERY + 1:08d}",
)


def _bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, tempfile.TemporaryDirectory() as short:
        listener.bind(f"{short}/s")
        os.rename(f"{short}/s", path)


def changed_recipe(key: str, value: str, was: str, slow: bool = False) -> Fault:
    """Refused with the difference, before anything is written; or allowed by name."""

    def run(box: Sandbox) -> Outcome:
        box.prepared()
        before = _content(box)
        said = box.start(f"--{key}={value}").ended(2).said
        assert _content(box) == before and f"{key}: {was} there, {value} here" in said, said
        if key != "model.dim":
            box.train(f"--{key}={value}", "--allow-change", key)
            assert box.resumed() == 3 * EVERY and box.step() == STEPS
        return Outcome(None, "nothing trained; goes on where --allow-change names the key", box.message(said, "there,"))

    return Fault(20, f"{key} changed before the run goes on", "on the command line", run, slow)


def changed_text(box: Sandbox) -> Outcome:
    box.prepared()
    before = _content(box)
    with (box.folder / "corpus.txt").open("a") as file:
        file.write("one more line\n")
    said = box.start(f"--run.stop_after_step={3 * EVERY}").ended(2).said
    assert _content(box) == before
    return Outcome(
        None, "nothing trained; goes on where --allow-change names the key", box.message(said, "has changed")
    )


def _content(box: Sandbox) -> dict[str, bytes]:
    """Of the run folder, but for its logs and its lock, and how the last start ended."""
    files = [path for path in box.run_folder().rglob("*") if path.is_file() and path.parent.name != "logs"]
    return {str(path): path.read_bytes() for path in files if path.name not in (".lock", "status.json")}


def clock(box: Sandbox) -> Outcome:
    """The newest checkpoint looks oldest, and every look at the clock is earlier than the one before."""
    box.prepared()
    for age, step in enumerate(box.steps()):
        for path in (*box.checkpoint(step).iterdir(), box.checkpoint(step)):
            os.utime(path, (1e9 - age * 1e6, 1e9 - age * 1e6))
    said = box.train(fault="clock_goes_back").said
    assert box.resumed() == 3 * EVERY and box.steps() == [3 * EVERY, STEPS], "the newest by step is used, and kept"
    box.require_whole()
    return Outcome(0, EQUAL, box.message(said, "resumed"))


def listing(box: Sandbox) -> Outcome:
    """Also for what is read: the order of a corpus's files is that of their names."""
    for number in range(8):
        (box.folder / f"text-{number}.txt").write_text(
            "".join(f"{number} times {n} is {number * n}\n" for n in range(99))
        )
    (box.folder / "recipe.toml").write_text(
        (box.folder / "recipe.toml").read_text().replace("corpus.txt", "text-*.txt")
    )
    box.start("--run.stop_after_step=12", fault="listed_in_any_order").ended(75)
    said = box.train(fault="listed_in_any_order").said
    assert box.resumed() == 3 * EVERY and box.steps() == [3 * EVERY, STEPS]
    box.require_whole()
    return Outcome(0, EQUAL, box.message(said, "resumed"))


def named(what: str, output_dir: str, name: str, slow: bool = False) -> Fault:
    """Stopped and gone on with; looked into by the other commands."""

    def run(box: Sandbox) -> Outcome:
        words = (f"--run.output_dir={output_dir.format(box.folder)}", f"--run.name={name}")
        box.start(*words, "--run.stop_after_step=9").ended(75)
        said = box.train(*words).said
        folder = Path(box.folder, output_dir.format(box.folder), name)
        for command in (("verify",), ("inspect",), ("prune", "--keep-last", "1"), ("diff", str(folder))):
            box.command("checkpoint", command[0], str(folder), *command[1:])
        box.command("generate", str(folder), "--prompt", "7 cubed", "--tokens", "3")
        (box.folder / "runs").mkdir(exist_ok=True)
        (box.folder / "runs/run").symlink_to(folder)
        box.require_whole()
        return Outcome(0, EQUAL, box.message(said, "resumed"))

    return Fault(32, what, "run.output_dir, run.name", run, slow)


def linked(box: Sandbox) -> Outcome:
    """The run folder is a link from the beginning; its checkpoints move to another disk, behind a link, later."""
    (box.folder / "disk a/run").mkdir(parents=True)
    (box.folder / "runs").mkdir()
    box.run_folder().symlink_to("../disk a/run")
    box.start("--run.stop_after_step=9").ended(75)
    (box.folder / "disk a/run/checkpoints").rename(box.folder / "disk b")
    (box.run_folder() / "checkpoints").symlink_to("../../disk b")
    said = box.train().said
    box.require_whole()
    assert box.run_folder().is_symlink() and (box.folder / f"disk b/step-{STEPS:08d}").is_dir()
    return Outcome(0, EQUAL, box.message(said, "resumed"))


def readers(box: Sandbox) -> Outcome:
    """Every step is saved and the one before deleted, while commands read what is there, again and again."""
    job = box.start("--checkpoint.every_steps=1", "--checkpoint.keep_last=1", "--training.steps=1000000")
    box.until(lambda: box.step() > 2, job)
    commands = {
        "inspect": ("checkpoint", "inspect", "runs/run"),
        "verify": ("checkpoint", "verify", "runs/run", "--deep"),
        "diff": ("checkpoint", "diff", "runs/run", "runs/run"),
        "generate": ("generate", "runs/run", "--prompt", "7 cubed", "--tokens", "2"),
        "prune": ("checkpoint", "prune", "runs/run", "--keep-last", "1"),
        "export-hf": ("checkpoint", "export-hf", "runs/run"),
    }
    told: list[str] = []
    well = 0
    for turn in range(6):
        started = [
            (name, box.begin(*words, *([f"export-{turn}"] if name == "export-hf" else [])))
            for name, words in commands.items()
        ]
        for name, child in started:
            code = child.wait()
            if code == 0:
                well += 1
                continue
            assert code == 4 and name != "generate", f"{name} ended with {code}:\n{child.said}"
            told.append(box.message(child.said, "was deleted while it was read|so none is deleted"))
            if name == "export-hf":
                assert not (box.folder / f"export-{turn}").exists(), "never half an export"
    assert all(child.poll() is None for child in job.children), job.said
    job.send(signal.SIGTERM)
    job.ended(75)
    return Outcome(
        0, "not compared", f"{well} commands ended well; {len(told)} said such as: {told[0] if told else '-'}"
    )


FAULTS = [
    Fault(19, "second run in the same folder", "both started", two_runs),
    Fault(19, "lock of a killed process", "SIGKILL", stale_lock),
    Fault(19, "lock removed from under a run, and a second one started", "rm .lock", lock_removed),
    Fault(19, "two runs of one path share the memory for snapshots", "as two containers do", same_path_elsewhere),
    no_files({"pipe": os.mkfifo}),
    no_files({"socket": _bind, "device": lambda path: path.symlink_to("/dev/zero")}, slow=True),
    changed_recipe("optimizer.lr", "0.001", "0.0003"),
    changed_recipe("training.global_batch", "8", "4", slow=True),
    changed_recipe("model.dim", "32", "16", slow=True),
    Fault(20, "text changed before the run goes on", "a line more", changed_text),
    Fault(29, "clock jumps back", "times of files and of day", clock),
    Fault(29, "folders listed in any order", "os.scandir, os.listdir shuffled", listing),
    Fault(30, "readers while a run saves and deletes", "six commands at a time", readers),
    named("unicode and spaces in names", "läufe mit 空格", "‘naïve’ run ☃"),
    named("relative path through other folders", "../{0.name}/./runs/../runs/x", "y", slow=True),
    named("very long path", "{0}/" + "/".join([200 * "long"[:1]] * 9), 250 * "n"),
    Fault(32, "linked run folder and checkpoint folder", "symlinks", linked),
]
