"""Snapshots of a run in the memory of its machines: what a restart goes on from without reading a disk.

Each machine keeps what its ranks hold, and a copy of what those of the machine before it hold, so that any one may be
lost; in a folder on a file system in memory, which outlives the processes. That folder is a checkpoint some files of
which lie on other machines. Machines go by the number of their first rank.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash

from titanlite.checkpoint import save, storage
from titanlite.checkpoint.format import MANIFEST, DamagedCheckpointError, Manifest, chunks_by_file, encode, folder_name
from titanlite.checkpoint.load import load_state, wanted_bytes
from titanlite.checkpoint.ranks import ALONE, Ranks
from titanlite.errors import CheckpointError, UsageError
from titanlite.files import read_file, read_json, replace_file
from titanlite.models.shard import Shard
from titanlite.text import format_bytes

BLOCK_BYTES = 2**24
"""What is sent from machine to machine at once."""
GENERATION = ".snapshots"
"""File beside the run's checkpoints. Each start of a run begins a generation of snapshots, which this file names, with
the digest of the one that the start went on from, if any. No others count: those that machines which are away still
hold may be of steps that the run has taken otherwise since."""
RUN_NAME = ".run"
"""File in the run's folder with a name that was drawn for it: containers that share the memory may have runs of one
path. `--fresh` leaves it, and so finds what is to be cleared."""
_OF_GENERATION = "snapshots"  # the value in a snapshot's manifest that says of which generation it is
_LAST_SECONDS = 10.0  # for which the end of a run waits for a snapshot that is no longer needed
_MARK = "machine"  # file by which ranks see that they are on one machine


class Move(NamedTuple):
    """A file that one rank sends to another, on another machine."""

    file: str
    size: int
    source: int
    target: int


class Snapshot(NamedTuple):
    """A snapshot, by what all machines hold of it: the manifest of this digest at least, and of its files some."""

    step: int
    digest: str
    machines: list[int]
    sizes: dict[str, int]
    holders: dict[str, list[int]]


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
        self._warn = warn if ranks.is_first else lambda text: None
        self.saves = save.BackgroundSaver(self._warn, background)
        self._loaded = ""  # digest of the manifest of the one that was loaded, until a generation begins
        self._require_own = require_own
        self._folder = memory  # one in it, once `prepare` knows the run
        self._generation, self._origin = "", ""
        """Name of the generation that counts, and digest of the manifest of the snapshot that it begins with."""
        self._machines = [0] * ranks.size  # by rank, its machine: the first rank that sees the same folder

    def prepare(self) -> None:
        """Make or find this machine's folder, and clear what a killed process left there. Raises `UsageError`."""
        checkpoints = self._file.parent
        name: str = self._ranks.run_on_rank0(lambda: _run_name(checkpoints.with_name(RUN_NAME)))
        run = hashlib.sha256(os.fsencode(checkpoints.resolve()) + b"\0" + name.encode()).hexdigest()[:16]
        self._folder /= f"titanlite-{os.getuid()}-{run}"
        self._machines = self._ranks.run_on_all_ranks(
            lambda: _machine_mark(self._folder), lambda marks: [marks.index(mark) for mark in marks]
        )
        self._generation, self._origin = self._ranks.run_on_rank0(lambda: _read_generation(self._file))
        self._on_each_machine(lambda: _clear(self._folder, self._generation, self._origin))

    def require_room(self, tensors: Mapping[str, Shard]) -> None:
        """Raise `UsageError` if a machine has no room for two snapshots: the old one goes when the new one is whole."""
        sizes = self._ranks.run_on_all_ranks(lambda: save.plan_local_save(tensors).nbytes, lambda sizes: sizes)
        needed = Counter[int]()
        for rank, replica in enumerate(replica_ranks(self._machines)):
            for machine in {self._machines[rank], self._machines[replica]}:
                needed[machine] += 2 * sizes[rank]
        self._on_each_machine(lambda: _require_free(self._folder, needed[self._ranks.rank]))

    def begin(self, tensors: Mapping[str, Shard], metadata: save.CheckpointMetadata) -> None:
        """Begin a snapshot of a state, which may change once this returns; `saves` tells how it ended."""
        assert self._generation, "snapshots begin with a generation"
        metadata = replace(metadata, values={**metadata.values, _OF_GENERATION: self._generation})
        self.saves.begin(metadata.step, tensors, lambda plan, warn: self._write(plan, metadata, warn))

    def load_latest(self, tensors: Mapping[str, Shard], newer_than: int) -> Manifest | None:
        """Load the newest whole snapshot of a step after `newer_than`. Raises `CheckpointError` if it does not fit.

        Call `begin_generation` once the state is what the run goes on from, this or another.
        """
        reports: list[Any] = self._on_each_machine(lambda: _list_held(self._folder), assemble)
        for snapshot in (Snapshot(*fields) for fields in reports):
            if snapshot.step <= newer_than:
                break
            try:
                manifest = self._load(snapshot, tensors)
                self._warn(f"going on from the snapshot of step {snapshot.step} in memory.")
                return manifest
            except DamagedCheckpointError as damage:
                self._warn(f"{damage} The snapshot of step {snapshot.step} is passed over.")
        return None

    def begin_generation(self) -> None:
        """Of the snapshots so far, also on machines that are away, none but the one just loaded counts any more. Raises
        `UsageError` if that cannot be written down.
        """
        self.saves.wait()

        def draw() -> list[str]:
            words, path = [os.urandom(8).hex(), self._loaded], self._file
            with storage.wrap_os_errors(f"cannot write {path}, so no snapshots are kept", path, kind=UsageError):
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

    def _on_each_machine(
        self, action: Callable[[], Any], decide: Callable[[list[Any]], Any] = lambda results: None
    ) -> Any:
        """The first rank of each machine runs `action`; as `Ranks.run_on_all_ranks`, with None of the other ranks."""
        return self._ranks.run_on_all_ranks(lambda: action() if self._leads else None, decide)

    def _write(self, plan: save.LocalSavePlan, metadata: save.CheckpointMetadata, warn: save.Warn) -> None:
        final, ranks, text = self._folder / folder_name(metadata.step), self._ranks, ""
        pending, wrapped = storage.pending(final), save.wrap_write_errors(final, plan.nbytes, "snapshot")
        ranks.run_on_rank0(self._require_own)
        try:
            self._on_each_machine(wrapped(lambda: storage.begin(final)))
            text = ranks.run_on_all_ranks(
                wrapped(lambda: save.write_items(pending, plan, ranks.rank)),
                lambda tables: encode(save.merge_tables(tables, metadata)).decode(),
            )
            sizes = {file: entry["bytes"] for file, entry in json.loads(text)["files"].items()}
            ranks.run_on_all_ranks(wrapped(lambda: transfer(plan_copies(sizes, self._machines), pending, ranks)))
            self._on_each_machine(wrapped(lambda: storage.commit(final, text.encode())))
        except Exception:
            self._on_each_machine(lambda: _undo(final, text.encode()))
            raise
        self._on_each_machine(lambda: _remove_others(final, warn))

    def _load(self, snapshot: Snapshot, tensors: Mapping[str, Shard]) -> Manifest:
        """Each machine gets the files that its ranks want and it lacks, for as long as they are read."""
        ranks, folder = self._ranks, self._folder / folder_name(snapshot.step)
        text = ranks.run_on_all_ranks(
            lambda: storage.manifest_text(folder) if ranks.rank == snapshot.machines[0] else None,
            lambda texts: texts[snapshot.machines[0]],
        )
        manifest = storage.decode_manifest(folder, text)
        wanted = list(wanted_bytes(manifest.tensors, chunks_by_file(manifest.tensors), tensors))
        plan = ranks.run_on_all_ranks(lambda: wanted, lambda lists: plan_fetch(snapshot, self._machines, lists))
        moves = [Move(*fields) for fields in plan]
        wrapped = storage.wrap_os_errors(f"{folder} cannot be assembled", folder, kind=DamagedCheckpointError)
        try:
            self._on_each_machine(wrapped(lambda: _make_way(folder, snapshot.digest)))
            ranks.run_on_all_ranks(wrapped(lambda: transfer(moves, folder, ranks)))
            load_state(folder, tensors, ranks=ranks, own=manifest)
        finally:  # a machine keeps no more than it did
            for move in moves:
                if move.target == ranks.rank:
                    (folder / move.file).unlink(missing_ok=True)
        self._loaded = snapshot.digest
        return manifest


def forget(checkpoints: Path) -> None:
    """No snapshot of the run with these checkpoints counts any more: it takes none. Raises `UsageError`."""
    with storage.wrap_os_errors(f"cannot delete {checkpoints / GENERATION}", checkpoints, kind=UsageError):
        (checkpoints / GENERATION).unlink(missing_ok=True)


# --- who keeps, sends and gets what: the same on all ranks


def replica_ranks(machines: Sequence[int]) -> list[int]:
    """By rank, the one that keeps copies of its files: on the next machine, at the same place among its ranks.

    On a single machine that is the rank itself: there is no other to send a copy to.
    """
    ranks: dict[int, list[int]] = defaultdict(list)
    for rank, machine in enumerate(machines):
        ranks[machine].append(rank)
    order = sorted(ranks)
    after = {machine: ranks[order[place + 1 - len(order)]] for place, machine in enumerate(order)}
    return [after[m][ranks[m].index(rank) % len(after[m])] for rank, m in enumerate(machines)]


def plan_copies(sizes: Mapping[str, int], machines: Sequence[int]) -> list[Move]:
    """The moves by which each file gets to the replica of the rank that wrote it, in the order that all ranks follow.

    It goes by turns, in each of which a machine sends or receives, so that no chain of machines forms each of which
    waits for the one before.
    """
    order, replicas = sorted(set(machines)), replica_ranks(machines)
    odd_one_out = len(order) - 1 if len(order) % 2 else -1

    def turn(move: Move) -> int:
        place = order.index(machines[move.source])
        return 2 if place == odd_one_out else place % 2

    moves = [Move(file, size, save.writer_of(file), replicas[save.writer_of(file)]) for file, size in sizes.items()]
    return sorted((move for move in moves if move.source != move.target), key=turn)


def plan_fetch(snapshot: Snapshot, machines: Sequence[int], wanted: Sequence[Sequence[str]]) -> list[Move]:
    """The moves by which each machine gets what its ranks want (files, by rank) and it does not hold.

    Files that several machines hold come from the one that sends least.
    """
    moves, sent = [], Counter[int]()
    ranks = reversed(range(len(wanted)))  # so that the first of a machine's that want a file gets it
    seekers = {(file, machines[rank]): rank for rank in ranks for file in wanted[rank]}
    for (file, machine), rank in sorted(seekers.items()):
        if machine not in snapshot.holders[file]:
            source = min(snapshot.holders[file], key=lambda holder: (sent[holder], holder))
            sent[source] += snapshot.sizes[file]
            moves.append(Move(file, snapshot.sizes[file], source, rank))
    return moves


def assemble(reports: Sequence[Any]) -> list[Snapshot]:
    """What is whole of what the machines hold (`_list_held` of each, None of other ranks), newest first."""
    found: dict[tuple[int, str], Snapshot] = {}
    lacking: dict[tuple[int, str], set[str]] = defaultdict(set)
    for machine, report in enumerate(reports):
        for step, digest, here, missing in report or ():
            snapshot = found.setdefault((step, digest), Snapshot(step, digest, [], {}, defaultdict(list)))
            snapshot.machines.append(machine)
            snapshot.sizes.update(here)
            lacking[step, digest].update(missing)
            for file in here:
                snapshot.holders[file].append(machine)
    return [found[key] for key in sorted(found, reverse=True) if lacking[key] <= found[key].sizes.keys()]


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


def _list_held(folder: Path) -> list[tuple[int, str, dict[str, int], list[str]]]:
    """This machine's snapshots: step, digest of the manifest, files with their sizes, and those that it lacks."""
    held = []
    for step in storage.checkpoint_steps(folder):
        place = folder / folder_name(step)
        files = {file: entry.bytes for file, entry in storage.read_manifest(place).files.items()}
        sizes = {path.name: path.stat().st_size for path in place.iterdir() if path.is_file()}
        here = {file: size for file, size in files.items() if sizes.get(file) == size}
        held.append((step, _digest(place), here, [file for file in files if file not in here]))
    return held


def _digest(folder: Path) -> str:
    """Of a snapshot's manifest; empty if it has none."""
    path = folder / MANIFEST
    return xxhash.xxh3_128_hexdigest(read_file(path)) if path.is_file() else ""


def _run_name(path: Path) -> str:
    """What the file says, which is made if it is not there. Raises `UsageError`."""
    with storage.wrap_os_errors(f"cannot use {path}, without which no snapshots are kept", path, kind=UsageError):
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


def _machine_mark(folder: Path) -> str:
    """What tells the machine of this folder from others: the mark that whichever rank came first left there."""
    fix = " Set resilience.snapshot_dir to a folder of a file system in memory, or resilience.snapshot_every = 0."
    with storage.wrap_os_errors(f"cannot keep snapshots in {folder}", folder, fix, UsageError):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise UsageError(f"{folder} was made by another user; it is not used. Delete it.")
        mine = folder / f".mark-{os.urandom(8).hex()}"
        mine.write_text(mine.name)
        with suppress(FileExistsError):
            os.link(mine, folder / _MARK)
        mine.unlink()
        return read_file(folder / _MARK).decode(errors="replace")


def _clear(folder: Path, generation: str, origin: str) -> None:
    """Remove what a killed process left, what cannot be read, and what does not count. Raises `UsageError`."""
    with storage.wrap_os_errors(f"cannot clear {folder}", folder, kind=UsageError):
        storage.clear_leftovers(folder)
        for step in storage.checkpoint_steps(folder):
            place = folder / folder_name(step)
            counts = origin != "" and _digest(place) == origin
            with suppress(CheckpointError):
                found = storage.read_manifest(place).values.get(_OF_GENERATION)
                counts = counts or (generation != "" and found == generation)
            if not counts:
                storage.remove(place)


def _undo(final: Path, manifest: bytes) -> None:
    """Remove what there is of a snapshot, also where it is committed: elsewhere it is not."""
    storage.abandon(final)
    if manifest and _digest(final) == xxhash.xxh3_128_hexdigest(manifest):
        shutil.rmtree(final, ignore_errors=True)


def _require_free(folder: Path, needed: int) -> None:
    own = sum(path.stat().st_size for path in folder.rglob("tensors-*"))
    free = shutil.disk_usage(folder).free + own
    if free < needed:
        raise UsageError(
            f"{folder.parent} has {format_bytes(free)} free, and two snapshots of what this machine keeps need "
            f"{format_bytes(needed)}. Make it larger, set resilience.snapshot_dir to another folder in memory, or "
            "resilience.snapshot_every = 0."
        )


def _remove_others(final: Path, warn: save.Warn) -> None:
    for name in map(folder_name, storage.checkpoint_steps(final.parent)):
        if name != final.name:
            storage.remove_or_warn(final.with_name(name), warn)


def _make_way(folder: Path, digest: str) -> None:
    """Make the folder for a snapshot's files, without what is there of another one of the same step."""
    if folder.exists() and _digest(folder) != digest:
        storage.remove(folder)
    folder.mkdir(exist_ok=True)
