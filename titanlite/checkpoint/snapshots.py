"""Snapshots of a run in the memory of its machines: what a restart goes on from without reading a disk.

Each machine keeps what its ranks hold, and a copy of what those of the machine before it hold, so that any one may be
lost; in a folder on a file system in memory, which outlives the processes: a checkpoint that lacks some of its files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash

from titanlite.checkpoint import format, save, storage
from titanlite.checkpoint.format import MANIFEST, CheckpointMetadata, Manifest, folder_name
from titanlite.checkpoint.load import load_state, wanted_bytes
from titanlite.errors import CheckpointError, DamagedCheckpointError, UsageError
from titanlite.files import read_file, read_json, replace_file, wrap_os_errors
from titanlite.models.shard import Shard
from titanlite.parallel.ranks import ALONE, Ranks
from titanlite.text import format_bytes

BLOCK_BYTES = 2**24  # what is sent from machine to machine at once
GENERATION = ".snapshots"
"""File beside the run's checkpoints. Each start of a run begins a generation of snapshots, which this file names, with
the digest of the one that the start went on from, if any. No others count: those that machines which are away still
hold may be of steps that the run has taken otherwise since."""
RUN_NAME = ".run"
"""File in the run's folder with a name that was drawn for it: containers that share the memory may have runs of one
path. `--fresh` leaves it, and so finds what is to be cleared."""
_OF_GENERATION = "snapshots"  # the value in a snapshot's manifest that says of which generation it is
_LAST_SECONDS = 10.0  # for which the end of a run waits for a snapshot that is no longer needed


class Move(NamedTuple):
    """A file that one rank sends to another, on another machine."""

    file: str
    size: int
    source: int
    target: int


class Snapshot(NamedTuple):
    """What all machines hold of a snapshot."""

    step: int  # which no two have: only those of one generation count, and the one that it begins with
    sizes: dict[str, int]  # of its files
    holders: dict[str, list[int]]  # the machines that hold each file, the manifest too, by their first ranks


class Snapshots:
    """The last snapshot of one run. Every rank has one; what is called is called by all and ends alike on all.

    `memory` is a folder in memory, each machine's own; `checkpoints` the run's folder, which all see. The others are as
    the `CheckpointManager`'s. A snapshot that fails leaves the one before.
    """

    def __init__(
        self,
        memory: Path,
        checkpoints: Path,
        warn: save.Warn,
        ranks: Ranks = ALONE,
        background: bool = False,
        require_own: Callable[[], None] = lambda: None,
    ) -> None:
        self._file = checkpoints / GENERATION
        self._ranks = ranks
        self.saves = save.BackgroundSaver(warn if ranks.is_first else lambda text: None, background)
        self._loaded = ""  # digest of the manifest of the one that was loaded, until a generation begins
        self._require_own = require_own
        self._folder = memory  # one in it, once `prepare` knows the run
        self._generation, self._origin = "", ""  # that which counts, and digest of the snapshot that it begins with
        self._machines = [0] * ranks.size  # by rank, its machine: the first rank that sees the same folder

    def prepare(self) -> None:
        """Make or find this machine's folder, and clear what a killed process left there. Raises `UsageError`."""
        checkpoints, ranks = self._file.parent, self._ranks
        name: str = ranks.run_on_rank0(lambda: _run_name(checkpoints.with_name(RUN_NAME)))
        run = hashlib.sha256(os.fsencode(checkpoints.resolve()) + b"\0" + name.encode()).hexdigest()[:16]
        self._folder /= f"titanlite-{os.getuid()}-{run}"
        marks = ranks.run_on_all_ranks(lambda: _leave_mark(self._folder))
        seen = (rank for rank, mark in enumerate(marks) if (self._folder / mark).exists())
        self._machines = ranks.run_on_all_ranks(lambda: next(seen))
        self._generation, self._origin = ranks.run_on_rank0(lambda: _read_generation(self._file))
        self._on_each_machine(lambda: _clear(self._folder, self._generation, self._origin))

    def require_room(self, tensors: Mapping[str, Shard]) -> None:
        """Raise `UsageError` if a machine has no room for two snapshots: the old one goes when the new one is whole."""
        sizes = self._ranks.run_on_all_ranks(lambda: save.planned_bytes(save.plan_local_save(tensors)))
        needed, backups = Counter[int](), backup_machines(self._machines)
        for machine, size in zip(self._machines, sizes, strict=True):
            for keeper in {machine, backups[machine]}:
                needed[keeper] += 2 * size

        def require_free() -> None:
            own = sum(path.stat().st_size for path in self._folder.rglob("tensors-*"))
            free, wanted = shutil.disk_usage(self._folder).free + own, needed[self._ranks.rank]
            if free < wanted:
                raise UsageError(
                    f"{self._folder.parent} has {format_bytes(free)} free, and two snapshots of this machine's part "
                    f"need {format_bytes(wanted)}. Make it larger, set resilience.snapshot_dir to another folder in "
                    "memory, or resilience.snapshot_every = 0."
                )

        self._on_each_machine(require_free)

    def begin(self, tensors: Mapping[str, Shard], metadata: CheckpointMetadata) -> None:
        """Begin a snapshot of a state, which may change once this returns; `saves` tells how it ended."""
        assert self._generation, "snapshots begin with a generation"
        metadata = replace(metadata, values={**metadata.values, _OF_GENERATION: self._generation})
        self.saves.begin(metadata.step, tensors, lambda plan, warn: self._write(plan, metadata, warn))

    def find(self, tensors: Mapping[str, Shard]) -> list[tuple[int, Callable[[], Manifest]]]:
        """The whole snapshots, for `CheckpointManager.load_latest`: the step of each, and what loads it.

        Call `begin_generation` once the state is what the run goes on from, one of these or another.
        """
        found = self._ranks.run_on_all_ranks(lambda: _list_held(self._folder) if self._leads else None, assemble)
        return [(fields[0], partial(self._load, Snapshot(*fields), tensors)) for fields in found]

    def begin_generation(self) -> None:
        """Of the snapshots so far, also on machines that are away, none but the one just loaded counts any more. Raises
        `UsageError` if that cannot be written down.
        """
        self.saves.result(wait=True)

        def draw() -> list[str]:
            words, path = [os.urandom(8).hex(), self._loaded], self._file
            with wrap_os_errors(f"cannot write {path}, so no snapshots are kept", path):
                replace_file(path, json.dumps(words).encode())
            return words

        (self._generation, self._origin), self._loaded = self._ranks.run_on_rank0(draw), ""
        self._on_each_machine(lambda: _clear(self._folder, self._generation, self._origin))

    def close(self) -> None:
        """Free the memory: the state is on a disk by now. One that is on its way is not waited for long."""
        self.saves.join(_LAST_SECONDS)
        if self._leads:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._ranks.is_first:
            with suppress(UsageError):
                forget(self._file.parent)

    @property
    def _leads(self) -> bool:
        """Whether this rank is the first of its machine."""
        return self._machines[self._ranks.rank] == self._ranks.rank

    def _on_each_machine(self, action: Callable[[], object]) -> None:
        """The first rank of each machine runs `action`; as `Ranks.run_on_all_ranks`."""
        self._ranks.run_on_all_ranks(lambda: action() if self._leads else None)

    def _write(self, plan: save.LocalSavePlan, metadata: CheckpointMetadata, warn: save.Warn) -> None:
        final, ranks, machines = self._folder / folder_name(metadata.step), self._ranks, self._machines
        pending, wrapped = storage.pending(final), save.wrap_write_errors(final, plan, "snapshot")
        ranks.run_on_rank0(self._require_own)
        try:
            self._on_each_machine(wrapped(lambda: storage.begin(final)))
            text: str = ranks.run_on_all_ranks(
                wrapped(lambda: save.write_items(pending, plan, ranks.rank)),
                lambda tables: format.encode(save.merge_tables(tables, metadata)).decode(),
            )
            sizes = {file: entry["bytes"] for file, entry in json.loads(text)["files"].items()}
            holders, backups = {file: [machines[save.writer_of(file)]] for file in sizes}, backup_machines(machines)
            moves = plan_moves(sizes, holders, [(backups[one], file) for file, (one,) in holders.items()], machines)
            ranks.run_on_all_ranks(wrapped(lambda: transfer(moves, pending, ranks)))
            self._on_each_machine(wrapped(lambda: storage.commit(final, text.encode())))
        except Exception:
            self._on_each_machine(lambda: _undo(final))
            raise

        def remove_old() -> None:
            for step in storage.checkpoint_steps(self._folder):
                if step != metadata.step:
                    storage.remove_or_warn(self._folder / folder_name(step), warn)

        self._on_each_machine(remove_old)

    def _load(self, snapshot: Snapshot, tensors: Mapping[str, Shard]) -> Manifest:
        """Each machine gets the files that its ranks want and it lacks, for as long as they are read."""
        ranks, folder, first = self._ranks, self._folder / folder_name(snapshot.step), snapshot.holders[MANIFEST][0]
        text = ranks.run_on_all_ranks(
            lambda: storage.manifest_text(folder) if ranks.rank == first else None, lambda texts: texts[first]
        )
        manifest = storage.decode_manifest(folder, text)
        own = list(wanted_bytes(format.chunks_by_file(manifest.tensors), tensors))
        wanted = ranks.run_on_all_ranks(lambda: own)
        seeking = [(machine, file) for machine, files in zip(self._machines, wanted, strict=True) for file in files]
        moves = plan_moves(snapshot.sizes, snapshot.holders, seeking, self._machines)
        wrapped = wrap_os_errors(f"{folder} cannot be assembled", folder, kind=DamagedCheckpointError)
        try:
            self._on_each_machine(wrapped(lambda: folder.mkdir(exist_ok=True)))
            ranks.run_on_all_ranks(wrapped(lambda: transfer(moves, folder, ranks)))
            load_state(folder, tensors, ranks=ranks, own=manifest)
        finally:  # a machine keeps no more than it did
            for move in moves:
                if move.target == ranks.rank:
                    (folder / move.file).unlink(missing_ok=True)
        self._loaded = xxhash.xxh3_128_hexdigest(text.encode())
        return manifest


def forget(checkpoints: Path) -> None:
    """No snapshot of the run with these checkpoints counts any more: it takes none. Raises `UsageError`."""
    with wrap_os_errors(f"cannot delete {checkpoints / GENERATION}", checkpoints):
        (checkpoints / GENERATION).unlink(missing_ok=True)


# --- who keeps, sends and gets what: the same on all ranks


def backup_machines(machines: Sequence[int]) -> dict[int, int]:
    """By machine, the one that keeps copies of its files: the next. A single machine is its own, and gets none."""
    order = sorted(set(machines))
    return dict(zip(order, order[1:] + order[:1], strict=True))


def plan_moves(
    sizes: Mapping[str, int], holders: Mapping[str, list[int]], wanted: Iterable[tuple[int, str]], machines: list[int]
) -> list[Move]:
    """The moves by which machines get the files that they want (machine, file) and do not hold, from rank to rank:
    from and to the one there that moves least.

    All ranks follow their order, so that none waits for ever. Copies go by turns, in each of which a machine sends or
    receives, so that no chain of machines forms each of which waits for the one before.
    """
    places, work, moves = sorted(set(machines)), [0] * len(machines), []
    ranks = {place: [rank for rank, machine in enumerate(machines) if machine == place] for place in places}

    def turn(move: Move) -> int:
        place = places.index(machines[move.source])
        return 2 if place == len(places) - 1 and place % 2 == 0 else place % 2

    for machine, file in sorted(set(wanted)):
        if machine not in holders[file]:
            able = [rank for holder in holders[file] for rank in ranks[holder]], ranks[machine]
            source, target = (min(candidates, key=work.__getitem__) for candidates in able)
            moves.append(Move(file, sizes[file], source, target))
            for rank in (source, target):
                work[rank] += sizes[file]
    return sorted(moves, key=turn)


def assemble(reports: Sequence[Any]) -> list[Snapshot]:
    """What is whole of what the machines hold (`_list_held` of each, None of other ranks), newest first."""
    found: dict[int, Snapshot] = {}
    for machine, report in enumerate(reports):
        for step, sizes, held in report or ():
            snapshot = found.setdefault(step, Snapshot(step, sizes, {file: [] for file in (MANIFEST, *sizes)}))
            for file in (MANIFEST, *held):
                snapshot.holders[file].append(machine)
    return [found[step] for step in sorted(found, reverse=True) if all(found[step].holders.values())]


# --- files


def transfer(moves: Sequence[Move], folder: Path, ranks: Ranks) -> None:
    """Send and receive files of `folder`, by moves that are the same on all ranks.

    Raises `OSError` for what failed on this rank, after the last move: no rank is left waiting.
    """
    failures = [_transfer(move, folder, ranks) for move in moves if ranks.rank in (move.source, move.target)]
    for failure in filter(None, failures):
        raise failure


def _transfer(move: Move, folder: Path, ranks: Ranks) -> OSError | None:
    """Send or receive one file, all of its bytes, whatever fails here: the other rank waits for them. What failed."""
    path, sends, failure = folder / move.file, move.source == ranks.rank, None
    memory = torch.zeros(min(move.size, BLOCK_BYTES), dtype=torch.uint8)
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb" if sends else "wb", buffering=0))
        except OSError as error:
            failure = error
        for first in range(0, move.size, BLOCK_BYTES):
            block = memory[: move.size - first]
            if not sends:
                ranks.receive(block, move.source)
            try:
                if failure is None and (file.readinto if sends else file.write)(block.numpy().data) != len(block):
                    raise OSError(errno.EIO, "it was cut while it was copied", str(path))
            except OSError as error:
                failure = error
            if sends:
                ranks.send(block, move.target)
    return failure


def _list_held(folder: Path) -> list[tuple[int, dict[str, int], list[str]]]:
    """This machine's snapshots: step, sizes of the files, and those of them that are here."""
    held = []
    for step in storage.checkpoint_steps(folder):
        place = folder / folder_name(step)
        sizes = {file: entry.bytes for file, entry in storage.read_manifest(place).files.items()}
        here = {path.name: path.stat().st_size for path in place.iterdir() if path.is_file()}
        held.append((step, sizes, [file for file in sizes if here.get(file) == sizes[file]]))
    return held


def _run_name(path: Path) -> str:
    """What the file says, which is made if it is not there. Raises `UsageError`."""
    with wrap_os_errors(f"cannot use {path}, without which no snapshots are kept", path):
        if not path.exists():
            replace_file(path, os.urandom(8).hex().encode())
        return read_file(path).decode(errors="replace")


def _read_generation(path: Path) -> tuple[str, str]:
    """The run's generation and its origin; empty, of no snapshots, if the file is not there or damaged."""
    try:
        name, origin = map(str, read_json(path))
        return name, origin
    except (OSError, ValueError, TypeError):
        return "", ""


def _leave_mark(folder: Path) -> str:
    """Make the folder, this user's own, and a file in it by which ranks see that they are on one machine."""
    fix = " Set resilience.snapshot_dir to a folder of a file system in memory, or resilience.snapshot_every = 0."
    with wrap_os_errors(f"cannot keep snapshots in {folder}", folder, fix):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise UsageError(f"{folder} was made by another user; it is not used. Delete it.")
        return storage.leave_mark(folder)


def _clear(folder: Path, generation: str, origin: str) -> None:
    """Remove what a killed process left, what cannot be read, and what does not count. Raises `UsageError`."""
    with wrap_os_errors(f"cannot clear {folder}", folder):
        storage.clear_leftovers(folder)
        for step in storage.checkpoint_steps(folder):
            place, counts = folder / folder_name(step), False
            with suppress(CheckpointError):
                text = storage.manifest_text(place)
                of = storage.decode_manifest(place, text).values.get(_OF_GENERATION)
                counts = of == generation or xxhash.xxh3_128_hexdigest(text.encode()) == origin
            if not counts:
                storage.remove(place)


def _undo(final: Path) -> None:
    """Remove what there is of a snapshot, also where it is committed: elsewhere it is not."""
    for folder in (storage.pending(final), final):
        shutil.rmtree(folder, ignore_errors=True)
