"""Saving and loading against what the machine can do: memcpy, dd, and safetensors' own functions, side by side.

python benchmarks/checkpoint.py                                  # a state of 1 GiB, on the GPU if there is one; Linux
python benchmarks/checkpoint.py --gib 8 --folder /where/runs/are --json out.json

All contestants of a comparison take one turn a round, in an order drawn anew; ratios are formed within a round.
`benchmarks/README.md` says what each of them does.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from single_device import FOREIGN_LIMIT, busy_core_seconds, quartiles, tell

from titanlite.checkpoint.format import CheckpointMetadata, chunks_by_file
from titanlite.checkpoint.load import load_state, read_chunks
from titanlite.checkpoint.manager import CheckpointManager
from titanlite.checkpoint.save import SaveResult
from titanlite.checkpoint.storage import read_manifest
from titanlite.models.shard import Shard
from titanlite.recipe.sections import Checkpoint

State = dict[str, torch.Tensor]
Turn = Callable[[], float]
"""Prepares in its own time and returns the seconds that the thing itself took."""
BLOCKS = 8
SPREAD_LIMIT = 0.25
"""Interquartile range of a contestant's seconds over their median, above which the numbers are called worthless."""
DD_BLOCK = "4M"  # its fastest here


@dataclass(frozen=True)
class Comparison:
    """Contestants that take turns; the first is measured against the others."""

    title: str
    turns: Mapping[str, Turn]


def fake_state(nbytes: int, device: torch.device) -> State:
    """Weights, averages and squares of a model of eight blocks, in float32; about so many bytes, of random bits."""
    dim = max(8, math.isqrt(nbytes // (13 * 3 * 4 * BLOCKS)))
    shapes = {"qkv": (3 * dim, dim), "out": (dim, dim), "gate": (3 * dim, dim), "up": (3 * dim, dim)}
    shapes |= {"down": (dim, 3 * dim), "norm": (dim,)}
    kinds = ("model.{}", "optimizer.{}/average", "optimizer.{}/square")
    generator = torch.Generator(device).manual_seed(0)
    return {
        kind.format(f"blocks.{block}.{name}"): torch.randn(shape, generator=generator, device=device)
        for kind in kinds
        for block in range(BLOCKS)
        for name, shape in shapes.items()
    }


class Arena:
    """A state, its twin to load into, and a folder on the disk that is measured."""

    def __init__(self, nbytes: int, device: torch.device, folder: Path) -> None:
        self.device = device
        self.folder = folder
        self.state = fake_state(nbytes, device)
        self.twin = {name: torch.zeros_like(tensor) for name, tensor in self.state.items()}
        self.nbytes = sum(tensor.nbytes for tensor in self.state.values())
        self.background = CheckpointManager(folder / "async", tell, section=Checkpoint(keep_last=0))
        self.foreground = CheckpointManager(folder / "sync", tell)
        self.raw = folder / "raw.safetensors"
        """What `dd` and safetensors read."""
        save_file(_on_host(self.state), self.raw)
        self.saved = folder / "saved"
        """A checkpoint to be loaded."""
        save(CheckpointManager(self.saved, tell), self.state)
        self.saved /= "step-00000001"
        os.sync()

    def comparisons(self) -> list[Comparison]:
        reads: dict[str, Turn] = {
            "load": self.load,
            "load, no hashes": self.load_without_hashes,
            "dd to nowhere": self.dd_read,
            "safetensors": self.safetensors_read,
        }
        return [
            Comparison("training stands still", {"async save": self.async_save, "memcpy": self.memcpy()}),
            Comparison("write", {"save": self.save, "dd": self.dd_write, "safetensors": self.safetensors_write}),
            Comparison("read, not in the page cache", {name: self._cold(turn) for name, turn in reads.items()}),
            Comparison("read, in the page cache", {name: self._warm(turn) for name, turn in reads.items()}),
        ]

    def async_save(self) -> float:
        """How long a save in the background stops training; its writing is waited for, apart."""
        clear(self.background.folder)
        return save(self.background, self.state).blocked_seconds

    def memcpy(self) -> Turn:
        """The same bytes to memory that is there already: by the C library's function, or from the GPU in one piece."""
        if self.device.type == "cuda":
            flat = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
            pinned = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=True)
            return lambda: self._timed(lambda: pinned.copy_(flat, non_blocking=True))

        def copy() -> None:
            for name, tensor in self.state.items():
                ctypes.memmove(self.twin[name].data_ptr(), tensor.data_ptr(), tensor.nbytes)

        return lambda: self._timed(copy)

    def save(self) -> float:
        """From the state to a committed checkpoint."""
        clear(self.foreground.folder)
        return self._timed(lambda: save(self.foreground, self.state))

    def dd_write(self) -> float:
        """From a file in the page cache to a synced one."""
        warm(self.raw)
        copy = clear(self.folder / "dd")
        command = ["dd", f"if={self.raw}", f"of={copy}", f"bs={DD_BLOCK}", "conv=fsync"]
        return self._timed(lambda: subprocess.run(command, check=True, capture_output=True))

    def safetensors_write(self) -> float:
        """`save_file`, synced."""
        copy = clear(self.folder / "copy.safetensors")

        def write() -> None:
            save_file(_on_host(self.state), copy)
            with open(copy, "rb") as file:
                os.fsync(file.fileno())

        return self._timed(write)

    def load(self) -> float:
        """Compared with its hashes and copied into tensors that are there."""
        return self._timed(lambda: load_state(self.saved, self._into()))

    def load_without_hashes(self) -> float:
        """As a rank reads the files that others verify."""
        manifest = read_manifest(self.saved)

        def read() -> None:
            for file, chunks in chunks_by_file(manifest.tensors).items():
                read_chunks(self.saved / file, chunks, self._into())

        return self._timed(read)

    def dd_read(self) -> float:
        """Into one buffer, over and over."""
        command = ["dd", f"if={self.raw}", "of=/dev/null", f"bs={DD_BLOCK}"]
        return self._timed(lambda: subprocess.run(command, check=True, capture_output=True))

    def safetensors_read(self) -> float:
        """`safe_open`, each tensor copied into one that is there."""

        def read() -> None:
            with safe_open(self.raw, framework="pt") as file:
                for name, tensor in self.twin.items():
                    tensor.copy_(file.get_tensor(name))

        return self._timed(read)

    def memory_of_loading(self) -> dict[str, int] | None:
        """Bytes of host memory that loading holds at most, beside the tensors; None off Linux."""
        resettable = Path("/proc/self/clear_refs")
        if not resettable.exists():
            return None
        held = {}
        for name, turn in {"load": self.load, "safetensors": self.safetensors_read}.items():
            resettable.write_text("5")
            before = _peak_bytes()
            turn()
            held[name] = _peak_bytes() - before
        return held

    def _into(self) -> dict[str, Shard]:
        return {name: Shard.whole(tensor) for name, tensor in self.twin.items()}

    def _files(self) -> list[Path]:
        return [self.raw, *self.saved.iterdir()]

    def _cold(self, turn: Turn) -> Turn:
        def prepared() -> float:
            for path in self._files():
                drop(path)
            return turn()

        return prepared

    def _warm(self, turn: Turn) -> Turn:
        def prepared() -> float:
            for path in self._files():
                warm(path)
            return turn()

        return prepared

    def _timed(self, action: Callable[[], object]) -> float:
        self._synchronise()
        before = time.perf_counter()
        action()
        self._synchronise()
        return time.perf_counter() - before

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def save(manager: CheckpointManager, state: State) -> SaveResult:
    """A committed checkpoint."""
    shards = {name: Shard.whole(tensor) for name, tensor in state.items()}
    manager.begin(shards, CheckpointMetadata(1))
    saved = manager.wait()
    assert saved is not None
    return saved


def _on_host(state: State) -> State:
    return {name: tensor.cpu() for name, tensor in state.items()}


def clear(path: Path) -> Path:
    """Delete what is there, and let the disk come to rest."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    os.sync()
    return path


def drop(path: Path) -> None:
    """Put a file out of the page cache, as far as the kernel does what it is asked."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(path: Path) -> None:
    """Put a file into the page cache."""
    block = bytearray(2**22)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def foreign_share(seconds: float = 0.25) -> float:
    """Part of the cores that others take while nothing is measured; 0 where the system does not tell."""
    before = busy_core_seconds()
    time.sleep(seconds)
    after = busy_core_seconds()
    return 0.0 if before is None or after is None else (after - before) / (seconds * (os.cpu_count() or 1))


def wait_for_quiet(until: float) -> float:
    """Return once others leave the cores alone, or at the time `until`; the part that they took at last."""
    os.sync()
    while (share := foreign_share()) > FOREIGN_LIMIT and time.monotonic() < until:
        pass
    return share


def play(comparison: Comparison, rounds: int, patience: float) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of each contestant by round, and what others took of the cores before or after each round, the more.

    For `patience` seconds, rounds are put off and repeated for others' sake.
    """
    seconds: dict[str, list[float]] = {name: [] for name in comparison.turns}
    others: list[float] = []
    until = time.monotonic() + patience
    for turn in comparison.turns.values():
        turn()  # for memory and files that are there from the second time on
    while len(others) < rounds:
        before = wait_for_quiet(until)
        order = random.sample(list(seconds), len(seconds))
        played = {name: comparison.turns[name]() for name in order}
        os.sync()
        share = max(before, foreign_share())
        said = ", ".join(f"{name} {played[name]:.3f} s" for name in seconds)
        tell(f"{comparison.title}, round {len(others) + 1} of {rounds}: {said}; others {share:.0%}")
        if share <= FOREIGN_LIMIT or time.monotonic() >= until:
            others.append(share)
            for name, taken in played.items():
                seconds[name].append(taken)
    return seconds, others


def summarise(seconds: Mapping[str, Sequence[float]], nbytes: int) -> dict[str, dict[str, Any]]:
    """By contestant: quartiles of its seconds and of its speed over each other's in the same round."""
    summary = {}
    for name, own in seconds.items():
        low, median, high = quartiles(own)
        ratios = {
            other: quartiles([b / a for a, b in zip(own, theirs, strict=True)])
            for other, theirs in seconds.items()
            if other != name
        }
        gb = nbytes / 1e9
        summary[name] = {
            "seconds": (low, median, high),
            "gb_per_second": (gb / high, gb / median, gb / low),
            "spread": (high - low) / median,
            "speed_over": ratios,
        }
    return summary


def doubts(summary: Mapping[str, Mapping[str, Any]], others: Sequence[float], rounds: int) -> list[str]:
    """Reasons to believe none of it."""
    reasons = [
        f"{name} varied by {row['spread']:.0%} (interquartile range over median)"
        for name, row in summary.items()
        if row["spread"] > SPREAD_LIMIT
    ]
    if max(others) > FOREIGN_LIMIT:
        disturbed = sum(share > FOREIGN_LIMIT for share in others)
        reasons.append(f"other processes took up to {max(others):.0%} of the cores around {disturbed} of the rounds")
    if rounds < 4:
        reasons.append(f"{rounds} rounds are too few to know their spread")
    return reasons


def table(title: str, summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: medians with their interquartile range; the ratios are speed over speed, within rounds."""
    first = next(iter(summary))
    head = [title, "GB/s", "seconds", f"{first} over it"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for name, row in summary.items():
        low, middle, high = summary[first]["speed_over"].get(name, (1.0, 1.0, 1.0))
        ratio = "1" if name == first else f"{middle:.3f} ({low:.3f} to {high:.3f})"
        speeds = "{1:.2f} ({0:.2f} to {2:.2f})".format(*row["gb_per_second"])
        lines.append(f"| {name} | {speeds} | {row['seconds'][1]:.3f} | {ratio} |")
    return "\n".join(lines)


def file_system(folder: Path) -> str:
    """The kind that a folder lies on."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    inside = [(len(fields[1]), fields[2]) for fields in mounts if folder.resolve().is_relative_to(fields[1])]
    return max(inside, default=(0, "unknown"))[1]


def _peak_bytes() -> int:
    """Most memory that this process has had since that was reset, mapped files counted."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything, printed as it comes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tell("making a state and saving it")
    arena = Arena(int(arguments.gib * 2**30), device, folder)
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "bytes": arena.nbytes,
        "tensors": len(arena.state),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "file_system": file_system(folder),
        "load": os.getloadavg(),
    }
    print(
        f"{arena.nbytes / 1e9:.2f} GB in {len(arena.state)} tensors on {facts['device']}, {facts['file_system']}, "
        f"torch {torch.__version__}, {facts['threads']} threads, load average {facts['load'][0]:.2f}"
    )
    first_blocked = arena.async_save()
    print(f"\nthe first save in the background stops training for {first_blocked:.3f} s: its memory is made then")
    results = {}
    for comparison in arena.comparisons():
        seconds, others = play(comparison, arguments.rounds, arguments.patience)
        summary = summarise(seconds, arena.nbytes)
        reasons = doubts(summary, others, arguments.rounds)
        print(f"\n{table(comparison.title, summary)}")
        print("".join(f"NO CLAIM: {reason}\n" for reason in reasons), end="")
        results[comparison.title] = {"summary": summary, "no_claim": reasons, "seconds": seconds, "others": others}
    held = arena.memory_of_loading()
    for name, nbytes in (held or {}).items():
        print(f"\n{name} holds {nbytes / 1e6:,.0f} MB of the host's memory at most, beside the tensors")
    return {**facts, "first_blocked_seconds": first_blocked, "comparisons": results, "memory_of_loading_bytes": held}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument(
        "--patience", type=float, default=60.0, help="seconds by which each comparison waits for other processes"
    )
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; four times the state must fit")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        results = measure(arguments, Path(folder))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
