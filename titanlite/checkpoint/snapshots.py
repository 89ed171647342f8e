"""Snapshots of a run in the memory of its machines: what a restart goes on from without reading a disk.

Each machine keeps what its ranks hold, and a copy of what those of the machine before it do, so that any one may be
lost; in a folder on a file system in memory, which outlives the processes. That folder is a checkpoint some files of
which lie on other machines. What is kept on disks is the manager's matter.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from titanlite.checkpoint import storage
from titanlite.checkpoint.background import Saved, Warn, Writings
from titanlite.checkpoint.format import MANIFEST, DamagedCheckpointError, Manifest, folder_name
from titanlite.checkpoint.load import load_state, wanted_files
from titanlite.checkpoint.ranks import ALONE, Ranks
from titanlite.checkpoint.save import Facts, Staging, manifest_text, portion_of, write_portion, writer_of
from titanlite.errors import CheckpointError, UsageError
from titanlite.files import cause, read_file, read_json, replace_file
from titanlite.models.shard import Shard
from titanlite.text import format_bytes

BLOCK_BYTES = 2**24
"""What is sent from machine to machine at once."""
LINE = ".snapshots"
"""File beside the run's checkpoints. Each start of a run begins a line of snapshots, which this file names, with the
digest of the one that the start went on from, if any. No others count: those that machines which are away still hold
may be of steps that the run has taken otherwise since."""
RUN_NAME = ".run"
"""File in the run's folder with a name that was drawn for it: containers that share the memory may have runs of one
path. `--fresh` leaves it, and so finds what is to be cleared."""
_OF_LINE = "snapshots"
"""The value in a snapshot's manifest that says of which line it is."""
_LAST_SECONDS = 10.0
"""For which the end of a run waits for a snapshot that nobody will read any more."""
_MARK = "machine"
"""File by which ranks see that they are on one machine."""


class Move(NamedTuple):
    """A file that one rank sends to another, on another machine."""

    file: str
    size: int
    source: int
    target: int


@dataclass(frozen=True)
class Whole:
    """A snapshot all files of which are somewhere; machines go by the number of their first rank."""

    step: int
    digest: str
    """Of its manifest."""
    sizes: Mapping[str, int]
    """Bytes of each file, and of the manifest."""
    holders: Mapping[str, list[int]]
    """The machines that hold each of these."""


class Line(NamedTuple):
    """The snapshots that count."""

    name: str
    origin: str = ""
    """Digest of the manifest of one more, of an earlier line: what this one begins with."""


class Snapshots:
    """The last snapshot of one run. Every rank has one; what is called is called by all and ends alike on all.

    A snapshot that fails leaves the one before. With `background`, training stops only while this rank's portion is
    copied to other memory of the host. `warn` gets, on the first rank, a sentence for whatever went wrong without
    ending the run.
    """

    def __init__(
        self,
        memory: Path,
        checkpoints: Path,
        warn: Warn,
        ranks: Ranks = ALONE,
        background: bool = False,
        require_own: Callable[[], None] = lambda: None,
    ) -> None:
        """`memory`: a folder in memory, each machine's own. `checkpoints`: the run's folder, which all see.

        `require_own`: as the `CheckpointManager`'s.
        """
        self._file = checkpoints / LINE
        self._ranks = ranks
        self._warn = warn if ranks.is_first else lambda text: None
        self._staging = Staging() if background else None
        self._writings = Writings(self._warn, background)
        self._loaded = ""
        """Digest of the manifest of the one that was loaded, until a line begins."""
        self._require_own = require_own
        self._folder = memory  # one in it, once `prepare` knows the run
        self._line = Line("")
        self._machines = [0] * ranks.size
        """By rank, its machine: the first rank that sees the same folder."""

    def prepare(self) -> None:
        """Make or find this machine's folder, and clear what a killed process left there. Raises `UsageError`."""
        checkpoints = self._file.parent
        name = self._ranks.first(lambda: _run_name(checkpoints.with_name(RUN_NAME)))
        run = hashlib.sha256(os.fsencode(checkpoints.resolve()) + b"\0" + name).hexdigest()[:16]
        self._folder /= f"titanlite-{os.getuid()}-{run}"
        marks = self._ranks.each(lambda: _marked(self._folder))
        told = self._ranks.first(lambda: json.dumps([marks.index(mark) for mark in marks]).encode())
        self._machines = json.loads(told)
        line = self._ranks.first(lambda: json.dumps(_read_line(self._file)).encode())
        self._line = Line(*json.loads(line))
        self._on_each_machine(lambda: _clear(self._folder, self._line))

    def require_room(self, tensors: Mapping[str, Shard]) -> None:
        """Raise `UsageError` if a machine has no room for two snapshots: the old one goes when the new one is whole."""
        told = self._ranks.each(lambda: str(portion_of(tensors).nbytes).encode())
        sizes = json.loads(self._ranks.first(lambda: json.dumps([int(size) for size in told]).encode()))
        kept = Counter[int]()
        for rank, keeper in enumerate(keepers(self._machines)):
            for place in {self._machines[rank], self._machines[keeper]}:
                kept[place] += 2 * sizes[rank]
        self._on_each_machine(lambda: _require_free(self._folder, kept[self._machines[self._ranks.rank]]))

    def begin(self, tensors: Mapping[str, Shard], facts: Facts) -> None:
        """Begin a snapshot of a state, which may change once this returns; `ended` and `wait` tell how it went.

        A line must have begun, and the snapshot that was begun before must have ended.
        """
        began = time.monotonic()
        assert self._line.name, "snapshots begin with a line"
        self._writings.require_none()
        facts = replace(facts, values={**facts.values, _OF_LINE: self._line.name})
        portion = portion_of(tensors)
        if self._staging is not None:
            portion = self._staging.copy(portion)

        def write(warn: Warn) -> None:
            final, ranks = self._folder / folder_name(facts.step), self._ranks
            pending, explained = storage.pending(final), storage.refusals_explained(final, portion.nbytes, "snapshot")
            text = b""
            ranks.first(self._require_own)
            try:
                self._on_each_machine(explained(lambda: storage.begin(final)))
                tables = ranks.each(explained(lambda: write_portion(pending, portion, ranks.rank)))
                text = ranks.first(lambda: manifest_text(tables, facts))
                sizes = {file: entry["bytes"] for file, entry in json.loads(text)["files"].items()}
                ranks.each(explained(lambda: carry(copies(sizes, self._machines), pending, ranks)))
                self._on_each_machine(explained(lambda: storage.commit(final, text).encode()))
            except Exception:
                self._on_each_machine(lambda: _undo(final, text))
                raise
            self._on_each_machine(lambda: _remove_others(final, warn))

        self._writings.begin(facts.step, write, began)

    def ended(self) -> Saved | None:
        """How the snapshot went that was begun last; None if there is none, or it goes on. Told once."""
        return self._writings.ended()

    def wait(self) -> Saved | None:
        """As `ended`, once it has ended."""
        return self._writings.wait()

    def load_latest(self, tensors: Mapping[str, Shard], newer_than: int) -> Manifest | None:
        """Load the newest whole snapshot of a step after `newer_than`; None if there is none.

        Raises `CheckpointError` if it does not fit the model. Call `begin_line` once the state is what the run goes on
        from, this or another.
        """
        for whole in self._whole():
            if whole.step <= newer_than:
                break
            try:
                manifest = self._load(whole, tensors)
                self._warn(f"going on from the snapshot of step {whole.step} in memory.")
                return manifest
            except DamagedCheckpointError as damage:
                self._warn(f"{damage} The snapshot of step {whole.step} is passed over.")
        return None

    def begin_line(self) -> None:
        """Of the snapshots so far, here or on machines that are away, none but the one just loaded counts any more.

        Raises `UsageError` if that cannot be written down.
        """
        self.wait()
        line = self._ranks.first(lambda: json.dumps(_new_line(self._file, self._loaded)).encode())
        self._line, self._loaded = Line(*json.loads(line)), ""
        self._on_each_machine(lambda: _clear(self._folder, self._line))

    def close(self) -> None:
        """Free the memory: the state is on a disk by now. One that is on its way is not waited for long."""
        self._writings.join(_LAST_SECONDS)
        if self._leads:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._ranks.is_first:
            with suppress(UsageError):
                forget(self._file.parent)

    @property
    def _leads(self) -> bool:
        """Whether this rank is the first of its machine."""
        return self._machines[self._ranks.rank] == self._ranks.rank

    def _on_each_machine(self, action: Callable[[], bytes | None]) -> list[bytes]:
        """One rank of each machine does `action`; as `Ranks.each`."""
        return self._ranks.each(lambda: action() if self._leads else b"")

    def _whole(self) -> list[Whole]:
        """The snapshots that are whole if all machines put together what they have, the newest first."""
        reports = self._on_each_machine(lambda: json.dumps(_held(self._folder)).encode())
        told = self._ranks.first(lambda: json.dumps([vars(whole) for whole in put_together(reports)]).encode())
        return [Whole(**fields) for fields in json.loads(told)]

    def _load(self, whole: Whole, tensors: Mapping[str, Shard]) -> Manifest:
        folder = self._folder / folder_name(whole.step)
        self._on_each_machine(lambda: _make_way(folder, whole.digest))
        fetched: list[str] = []
        try:
            self._fetch(whole, folder, [MANIFEST])
            manifest = storage.decode_manifest(folder, self._ranks.first(lambda: storage.manifest_bytes(folder)))
            fetched = self._fetch(whole, folder, wanted_files(manifest, tensors))
            manifest = load_state(folder, tensors, ranks=self._ranks, shared=False)
        finally:  # a machine keeps no more than it did
            _forget_files(folder, fetched)
        self._loaded = whole.digest
        return manifest

    def _fetch(self, whole: Whole, folder: Path, wanted: Sequence[str]) -> list[str]:
        """Have each machine get the files that its ranks want and it lacks; those that came to this rank.

        Raises `DamagedCheckpointError`.
        """
        told = self._ranks.each(lambda: json.dumps(wanted).encode())
        plan = self._ranks.first(
            lambda: json.dumps(fetches(whole, self._machines, list(map(json.loads, told)))).encode()
        )
        moves = [Move(*fields) for fields in json.loads(plan)]
        mine = [move.file for move in moves if move.target == self._ranks.rank]
        try:
            self._ranks.each(lambda: _carried(moves, folder, self._ranks))
        except Exception:
            _forget_files(folder, mine)  # they may hold anything
            raise
        return mine


def forget(checkpoints: Path) -> None:
    """No snapshot of the run with these checkpoints counts any more: it takes none. Raises `UsageError`."""
    try:
        (checkpoints / LINE).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot delete {checkpoints / LINE}: {cause(error, checkpoints)}.") from error


def keepers(machines: Sequence[int]) -> list[int]:
    """By rank, the one that keeps copies of its files: on the next machine, at the same place among its ranks.

    On a single machine that is the rank itself: there is nobody to send a copy to.
    """
    ranks: dict[int, list[int]] = defaultdict(list)
    for rank, machine in enumerate(machines):
        ranks[machine].append(rank)
    order = sorted(ranks)
    after = dict(zip(order, [*order[1:], *order[:1]], strict=True))
    keepers = []
    for rank, machine in enumerate(machines):
        others = ranks[after[machine]]
        keepers.append(others[ranks[machine].index(rank) % len(others)])
    return keepers


def copies(sizes: Mapping[str, int], machines: Sequence[int]) -> list[Move]:
    """The moves by which each file gets to the keeper of the rank that wrote it.

    All ranks follow the list in its order. It goes by turns, in each of which a machine sends or receives, so that no
    chain of machines forms each of which waits for the one before.
    """
    order, keeper = sorted(set(machines)), keepers(machines)
    odd_one_out = len(order) - 1 if len(order) % 2 else -1

    def turn(move: Move) -> int:
        place = order.index(machines[move.source])
        return 2 if place == odd_one_out else place % 2

    moves = [Move(file, size, writer_of(file), keeper[writer_of(file)]) for file, size in sizes.items()]
    return sorted((move for move in moves if move.source != move.target), key=turn)


def fetches(whole: Whole, machines: Sequence[int], wanted: Sequence[Sequence[str]]) -> list[Move]:
    """The moves by which each machine gets what its ranks want (files, by rank) and it does not hold.

    Files that several machines hold come from the one that sends least.
    """
    moves, sent = [], Counter[int]()
    seekers: dict[tuple[str, int], int] = {}
    for rank, files in enumerate(wanted):
        for file in files:
            seekers.setdefault((file, machines[rank]), rank)
    for (file, machine), rank in sorted(seekers.items()):
        if machine not in whole.holders[file]:
            source = min(whole.holders[file], key=lambda holder: (sent[holder], holder))
            sent[source] += whole.sizes[file]
            moves.append(Move(file, whole.sizes[file], source, rank))
    return moves


def carry(moves: Sequence[Move], folder: Path, ranks: Ranks) -> None:
    """Send and receive files of `folder`, by moves that are the same on all ranks.

    Raises `OSError` for what failed on this rank, after the last move: nobody is left waiting.
    """
    failures = [
        _sent(move, folder, ranks) if move.source == ranks.rank else _received(move, folder, ranks)
        for move in moves
        if ranks.rank in (move.source, move.target)
    ]
    for failure in failures:
        if failure is not None:
            raise failure


def put_together(reports: Sequence[bytes]) -> list[Whole]:
    """What is whole of what the machines hold (`_held` of each, empty for ranks that are not their machine's first),
    newest first.
    """
    sizes: dict[tuple[int, str], dict[str, int]] = defaultdict(dict)
    lacking: dict[tuple[int, str], set[str]] = defaultdict(set)
    holders: dict[tuple[int, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for machine, report in enumerate(reports):
        for step, digest, here, missing in json.loads(report or b"[]"):
            sizes[step, digest] |= here
            lacking[step, digest].update(missing)
            for file in here:
                holders[step, digest][file].append(machine)
    whole = [key for key in sizes if lacking[key] <= sizes[key].keys()]
    return [Whole(*key, sizes[key], holders[key]) for key in sorted(whole, reverse=True)]


def _held(folder: Path) -> list[tuple[int, str, dict[str, int], list[str]]]:
    """This machine's snapshots: step, digest of the manifest, files with their sizes, and those that it lacks."""
    held = []
    for step in storage.checkpoint_steps(folder):
        place = folder / folder_name(step)
        files = {file: entry.bytes for file, entry in storage.read_manifest(place).files.items()}
        here = {file: size for file, size in files.items() if _size(place / file) == size}
        missing = [file for file in files if file not in here]
        held.append((step, _digest(place), {**here, MANIFEST: _size(place / MANIFEST)}, missing))
    return held


def _digest(folder: Path) -> str:
    """Of a snapshot's manifest; empty if it has none."""
    path = folder / MANIFEST
    return xxhash.xxh3_128_hexdigest(read_file(path)) if path.is_file() else ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _run_name(path: Path) -> bytes:
    """What the file says, which is made if it is not there. Raises `UsageError`."""
    try:
        if not path.exists():
            replace_file(path, os.urandom(8).hex().encode())
        return read_file(path)
    except OSError as error:
        raise UsageError(f"cannot use {path}, without which no snapshots are kept: {cause(error, path)}.") from error


def _read_line(path: Path) -> Line:
    """The run's line of snapshots; a nameless one, of which there are none, if the file is not there or damaged."""
    try:
        return Line(*(str(word) for word in read_json(path)))
    except (OSError, ValueError, TypeError):
        return Line("")


def _new_line(path: Path, origin: str) -> Line:
    line = Line(os.urandom(8).hex(), origin)
    try:
        replace_file(path, json.dumps(line).encode())
    except OSError as error:
        raise UsageError(f"cannot write {path}, without which no snapshots are kept: {cause(error, path)}.") from error
    return line


def _marked(folder: Path) -> bytes:
    """What tells the machine of this folder from others: the mark that whoever came first left there."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise UsageError(f"{folder} was made by somebody else; it is not used. Delete it.")
        mine = folder / f".mark-{os.urandom(8).hex()}"
        mine.write_bytes(mine.name.encode())
        with suppress(FileExistsError):
            os.link(mine, folder / _MARK)
        mine.unlink()
        return read_file(folder / _MARK)
    except OSError as error:
        raise UsageError(
            f"cannot keep snapshots in {folder}: {cause(error, folder)}. Set resilience.snapshot_dir to a folder of a "
            "file system in memory, or resilience.snapshot_every = 0."
        ) from error


def _clear(folder: Path, line: Line) -> None:
    """Remove what a killed process left, what cannot be read, and what does not count. Raises `UsageError`."""
    try:
        storage.clear_leftovers(folder)
        for step in storage.checkpoint_steps(folder):
            place = folder / folder_name(step)
            try:
                counts = bool(line.name) and storage.read_manifest(place).values.get(_OF_LINE) == line.name
            except CheckpointError:
                counts = False
            if not counts and (not line.origin or _digest(place) != line.origin):
                storage.remove(place)
    except OSError as error:
        raise UsageError(f"cannot clear {folder}: {cause(error, folder)}.") from error


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


def _remove_others(final: Path, warn: Warn) -> None:
    for step in storage.checkpoint_steps(final.parent):
        other = final.with_name(folder_name(step))
        if other != final:
            try:
                storage.remove(other)
            except OSError as error:
                warn(f"cannot delete the old snapshot {other}: {cause(error, other)}.")


def _make_way(folder: Path, digest: str) -> None:
    """Make the folder for a snapshot's files, without what is there of another one of the same step."""
    try:
        if folder.exists() and _digest(folder) != digest:
            storage.remove(folder)
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise DamagedCheckpointError(f"{folder} cannot be used: {cause(error, folder)}.") from error


def _forget_files(folder: Path, files: Sequence[str]) -> None:
    for file in files:
        (folder / file).unlink(missing_ok=True)


def _carried(moves: Sequence[Move], folder: Path, ranks: Ranks) -> None:
    try:
        carry(moves, folder, ranks)
    except OSError as error:
        raise DamagedCheckpointError(f"{folder} cannot be put together: {cause(error, folder)}.") from error


def _sent(move: Move, folder: Path, ranks: Ranks) -> OSError | None:
    """Send a file; as many bytes as the other rank waits for, whatever happens here. What happened."""
    block, failure = torch.zeros(min(move.size, BLOCK_BYTES), dtype=torch.uint8), None
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(folder / move.file, "rb", buffering=0))
        except OSError as error:
            failure = error
        for part in _parts(block, move.size):
            try:
                if failure is None and file.readinto(part.numpy().data) != len(part):
                    raise OSError(errno.EIO, "it was cut while it was read", str(folder / move.file))
            except OSError as error:
                failure = error
            ranks.send(part, move.target)
    return failure


def _received(move: Move, folder: Path, ranks: Ranks) -> OSError | None:
    """Receive a file, all of it, whether it can be written or not. What happened."""
    block, failure = torch.zeros(min(move.size, BLOCK_BYTES), dtype=torch.uint8), None
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(folder / move.file, "wb", buffering=0))
        except OSError as error:
            failure = error
        for part in _parts(block, move.size):
            ranks.receive(part, move.source)
            try:
                rest = part.numpy().data if failure is None else memoryview(b"")
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError as error:
                failure = error
    return failure


def _parts(block: Tensor, size: int) -> Iterator[Tensor]:
    """The block, again and again until it has been `size` bytes."""
    for first in range(0, size, BLOCK_BYTES):
        yield block[: size - first]
