"""A titanlite command in which something goes wrong at a chosen moment: `python faulty_train.py MODULE ARGUMENT …`.

MODULE is `titanlite.train`, or `titanlite` for other commands, and runs as `python -m MODULE` would. The environment
variable `CHAOS` says what goes wrong: JSON with the name of a function of this file, and its arguments; `on` among
them limits it to these ranks. Functions of titanlite are replaced here; titanlite itself knows nothing of it.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import multiprocessing
import os
import random
import resource
import runpy
import signal
import struct
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

Act = Callable[[], object]


def main(argv: list[str]) -> int:
    """Do what `CHAOS` says, then run the command; its exit code, unless it ends the process itself."""
    from titanlite.checkpoint import save

    save.FILE_BYTES = 2**15  # several small files, where there would be one
    words = json.loads(os.environ.get("CHAOS", "{}"))
    on = words.pop("on", None)
    if words and (on is None or int(os.environ.get("RANK", "0")) in on):
        globals()[words.pop("fault")](**words)
    if "MISTAKE" in os.environ:
        globals()[os.environ["MISTAKE"]]()
    sys.argv = argv
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    return 0


# --- moments


def wrap(owner: Any, name: str, before: Callable[..., object]) -> None:
    """Have calls of `owner.name` preceded by calls of `before` with the same arguments."""
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **names: Any) -> Any:
        before(*arguments, **names)
        return original(*arguments, **names)

    setattr(owner, name, wrapped)


def after(owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Have calls of the method return what `change` makes of its result, its object and its arguments."""
    original = getattr(owner, name)
    setattr(owner, name, lambda self, *arguments: change(original(self, *arguments), self, *arguments))


def after_step(step: int, act: Callable[[Any], object]) -> None:
    """`act` on the train state when `step` is done, the first time."""
    from titanlite.training import trainer

    done: list[int] = []

    def acted(result: Any, state: Any, number: int, *_: object) -> Any:
        if number == step and not done:
            done.append(step)
            act(state)
        return result

    after(trainer, "take_step", acted)


def before_step(step: int, act: Act) -> None:
    """`act` when all steps before `step` are done."""
    from titanlite.training import trainer

    wrap(trainer, "take_step", lambda self, number, *_: act() if number == step else None)


def between_saves(step: int, act: Act) -> None:
    """`act` before `step`, once what is being saved in the background has ended."""

    def settled() -> None:
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join()
        act()

    before_step(step, settled)


_step = 0  # the last step that was begun, once `follow` was called


def follow() -> None:
    """Keep `_step` up to date."""
    from titanlite.training import trainer
    from titanlite.training.train_state import TrainState

    def note(self: TrainState, number: int, *_: object) -> None:
        global _step
        _step = number

    wrap(trainer, "take_step", note)


def in_forward(step: int, act: Act) -> None:
    """`act` where the model, or this rank's stage of it, is to compute in `step`."""
    from titanlite.models.llama import Llama

    follow()
    wrap(Llama, "forward", lambda *_, **__: act() if _step == step else None)


def in_save(point: str, step: int, act: Act) -> None:
    """`act` at a point of the save of `step`."""
    from titanlite.checkpoint import save

    folder = f".step-{step:08d}.writing"
    files: list[Path] = []

    def file_begins(path: Path, *_: object) -> None:
        if path.parent.name == folder:
            files.append(path)
            if (point, len(files)) in (("before the first byte", 1), ("between shards", 2)):
                act()

    def blocks(*arguments: Any) -> Any:
        for number, block in enumerate(original_blocks(*arguments)):
            if point == "in a shard" and files and number == 2:
                act()
            yield block

    def bytes_are_written(path: Path, data: bytes) -> None:
        if path.parent.name == folder and point == "before the manifest":
            act()
        if path.parent.name == folder and point == "in the manifest":
            path.write_text(data.decode()[: len(data) // 2])
            act()

    original_blocks, rename = save._blocks, os.rename

    def renamed(source: Any, target: Any) -> None:
        committed = Path(source).name == folder
        if committed and point == "before the rename":
            act()
        rename(source, target)
        if committed and point == "after the rename":
            act()

    save.open = partial(open, buffering=0)  # what is written is on the disk
    save._blocks = blocks
    wrap(save, "write_tensors", file_begins)
    wrap(Path, "write_bytes", bytes_are_written)
    os.rename = renamed


def die(step: int = 0) -> None:
    """SIGKILL; a save in the background of `step` first sees the training go on for two steps."""
    while threading.current_thread() is not threading.main_thread() and _step <= step + 2:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


# --- faults


def killed_in_save(point: str, step: int) -> None:
    follow()
    in_save(point, step, partial(die, step))


def paused(step: int, in_the_save: bool = False, here: str = "here", go: str = "go") -> None:
    """Before `step`, or in a shard of its save, wait until the file `go` is made; `here` says that it waits."""
    moment = partial(in_save, "in a shard") if in_the_save else between_saves
    moment(step, partial(wait_for_go, here, go))


def wait_for_go(here: str, go: str) -> None:
    Path(here).touch()
    while not Path(go).exists():
        time.sleep(0.002)


def files_limited(first: int, last: int, limit: int) -> None:
    """No file may grow past `limit` bytes from before step `first` until before step `last`."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    between_saves(first, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard)))
    between_saves(last, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard)))


def disk_filled(first: int, last: int) -> None:
    """The file `runs/filler` takes what is left of the disk meanwhile."""

    def fill() -> None:
        with open("runs/filler", "wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    between_saves(first, fill)
    between_saves(last, Path("runs/filler").unlink)


def mode_taken(first: int, last: int, path: str) -> None:
    """The folder `path` may not be written meanwhile."""
    obey_modes()
    between_saves(first, lambda: os.chmod(path, 0o555))
    between_saves(last, lambda: os.chmod(path, 0o755))


def obey_modes() -> None:
    """Give up root's right to pass over the modes of files, and nothing else (capset(2))."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("=Ii", 0x20080522, 0)
    data = ctypes.create_string_buffer(24)  # effective, permitted, inheritable, for each half of the 64 capabilities
    assert libc.capget(header, data) == 0
    effective, *rest = struct.unpack("=6I", data.raw)
    overriding = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, struct.pack("=6I", effective & ~overriding, *rest)) == 0, os.strerror(ctypes.get_errno())


def memory_full(step: int, in_model: bool = False) -> None:
    """A request for more than any machine has, and what the allocator really says to it."""
    import torch

    moment = in_forward if in_model else between_saves
    moment(step, partial(torch.empty, 2**60, dtype=torch.uint8))


def raises(step: int, in_model: bool = False) -> None:
    def fail() -> None:
        raise ValueError("the sample is poisoned")

    moment = in_forward if in_model else between_saves
    moment(step, fail)


def weight_is_nan(step: int, in_model: bool = True) -> None:
    """From this step's forward pass on."""
    from titanlite.models.llama import Llama

    follow()
    wrap(
        Llama,
        "forward",
        lambda self, *_, **__: next(self.parameters()).data.fill_(float("nan")) if _step == step else None,
    )


def worker_killed(step: int) -> None:
    """SIGKILL to the processes that this one has started, as by a system that is out of memory."""

    def kill() -> None:
        for child in multiprocessing.active_children():
            child.kill()

    between_saves(step, kill)


def stopped(step: int) -> None:
    """As by a debugger, or a machine that swaps: SIGSTOP, and nobody says go on."""
    between_saves(step, partial(os.kill, os.getpid(), signal.SIGSTOP))


def killed_in_two_lives(step: int) -> None:
    """Rank 1 before `step`; after torchrun has started all anew, rank 0 a save later. `killed` says what was done."""
    life, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])

    def die_once() -> None:
        with open("killed", "a") as file:
            file.write(f"{_step - 1}\n")
        die()

    if life < 2 and rank == 1 - life:
        follow()
        between_saves(step + 4 * life, die_once)


def slow_on_rank_1(seconds: float) -> None:
    """In every step; and ranks are compared after two seconds rather than a minute."""
    from titanlite.resilience import watchdog
    from titanlite.training import trainer

    watchdog.WINDOW_LOOKS = 20
    if os.environ["RANK"] == "1":
        wrap(trainer, "take_step", partial(_slow_disk, seconds))


def _slow_disk(seconds: float, *_: object) -> None:
    time.sleep(seconds)


def gradient_is_nan(step: int) -> None:
    """Once, whether or not the step is taken again."""
    from titanlite.parallel.shards import Shards

    follow()
    spoiled: list[int] = []

    def spoil(_: None, shards: Shards) -> None:
        if _step == step and not spoiled:
            spoiled.append(step)
            held = next(weight for weight in shards.local().values() if weight.numel())
            held.grad.view(-1)[0] = float("nan")  # type: ignore[union-attr]

    after(Shards, "take_gradients", spoil)


def update_ruins(step: int) -> None:
    """A weight that no loss of this text shows, once: the row of a byte that is not in it."""
    after_step(step, lambda state: next(iter(state.weights.values())).detach().view(-1)[:1].fill_(float("inf")))


def bit_flipped(step: int) -> None:
    """In a weight, after the step."""
    import torch

    def flip(state: Any) -> None:
        next(iter(state.weights.values())).detach().view(-1)[:1].view(torch.int32).bitwise_xor_(1)

    after_step(step, flip)


def losses_are_nan(first: int) -> None:
    """Of all steps from `first` on, with sound weights."""
    from titanlite.parallel.model import ParallelModel

    follow()
    after(ParallelModel, "forward_backward", lambda loss, *_: loss * (float("nan") if _step >= first else 1.0))


def validation_is_nan(number: int) -> None:
    """The loss of the n-th validation, with sound weights."""
    from titanlite.parallel.model import Evaluation, ParallelModel

    nan, count = Evaluation(float("nan"), float("nan")), itertools.count(1)
    after(ParallelModel, "evaluate", lambda result, *_: nan if next(count) == number else result)


def labels_spoiled(step: int) -> None:
    """The samples that belong to this step, whenever they are read, are followed by the same token for ever."""
    import dataclasses

    from titanlite.parallel.model import ParallelModel

    forward_backward = ParallelModel.forward_backward

    def spoil(self: ParallelModel, batch: Any, valid: Any) -> Any:
        if set(batch.samples) & set(range(4 * (step - 1), 4 * step)):
            batch = dataclasses.replace(batch, labels=batch.labels.clamp(max=0))
        return forward_backward(self, batch, valid)

    ParallelModel.forward_backward = spoil


def pickle_refuses() -> None:
    import pickle

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something is pickled, or a pickle is read")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        setattr(pickle, name, refuse)


def samples_noted() -> None:
    """Every rank writes down the samples of each of its steps."""
    from titanlite.training import trainer
    from titanlite.training.train_state import TrainState

    rank = os.environ.get("RANK", "0")

    def note(self: TrainState, number: int, batch: Any, *_: object) -> None:
        with open(f"samples-{rank}.jsonl", "a") as file:
            file.write(json.dumps([number, *batch.samples]) + "\n")

    wrap(trainer, "take_step", note)


def clock_goes_back() -> None:
    """Every look at the time of day is earlier than the one before, by a day."""
    days = itertools.count(1)
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() - 86_400 * next(days)
    time.time_ns = lambda: now_ns() - 86_400 * 10**9 * next(days)


class _Listing(list[Any]):
    """What `os.scandir` returns, in an order of ours."""

    def __enter__(self) -> _Listing:
        return self

    def __exit__(self, *raised: object) -> None:
        pass


def listed_in_any_order() -> None:
    """Folders are listed in another order each time."""
    order, scandir, listdir = random.Random(), os.scandir, os.listdir

    def shuffled(found: Any) -> _Listing:
        listing = _Listing(found)
        order.shuffle(listing)
        return listing

    os.scandir = lambda *path: shuffled(scandir(*path))
    os.listdir = lambda *path: shuffled(listdir(*path))


# --- another world


def machines_of_their_own() -> None:
    """Each rank is on a machine of its own, whose memory is the folder `memory` and the rank's number."""
    from titanlite.checkpoint.snapshots import Snapshots

    begin = Snapshots.__init__

    def elsewhere(self: Any, memory: Path, *rest: Any, **names: Any) -> None:
        own = memory / os.environ.get("RANK", "0")
        own.mkdir(parents=True, exist_ok=True)
        begin(self, own, *rest, **names)

    Snapshots.__init__ = elsewhere


# --- mistakes of titanlite's that the chaos suite would have to find


def writes_in_place() -> None:
    """A checkpoint has its name from its first byte on."""
    from titanlite.checkpoint import save, storage

    storage.pending = save.pending = lambda final: final
    save.commit = lambda final, manifest: (final / "manifest.json").write_bytes(manifest) and ""


def goes_on_without_momentum() -> None:
    from titanlite.training import trainer

    restore = trainer.restore

    def forgetful(learner: Any, *rest: Any) -> Any:
        manifest = restore(learner, *rest)
        for tensor in learner.optimizer.state().values():
            tensor.zero_()
        return manifest

    trainer.restore = forgetful


def reads_a_sample_twice() -> None:
    """The data of a run that goes on begin a sample too early."""
    from titanlite.training import feed

    loader = feed.train_loader
    feed.train_loader = lambda split, plan, first, *rest, **words: loader(
        split, plan, max(first - 1, 0), *rest, **words
    )


def verifies_nothing() -> None:
    from titanlite.checkpoint import load, storage

    load.assign_files = lambda sizes, wanted: [[] for _ in wanted]
    load.verify_file = storage.verify_file = lambda *_: None
    load.find_nonfinite = lambda *_: []


def the_newest_is_by_time() -> None:
    from titanlite.checkpoint.manager import CheckpointManager

    steps = CheckpointManager.steps
    CheckpointManager.steps = lambda self: sorted(steps(self), key=lambda step: os.stat(self.path(step)).st_mtime)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
