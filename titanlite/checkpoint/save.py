"""Writing one checkpoint: each rank its part of the tensors to files of its own, then one manifest that makes them one.

At once, or beside training; block by block, where safetensors' own `save_file` wants a whole file in memory.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ContextDecorator
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import xxhash
from torch import Tensor

import titanlite
from titanlite.checkpoint import format
from titanlite.checkpoint.format import DTYPES, Box, row_blocks, whole_box, within
from titanlite.checkpoint.storage import abandon, begin, commit, pending, wrap_os_errors
from titanlite.errors import CheckpointError
from titanlite.files import sync
from titanlite.models.shard import Shard
from titanlite.parallel.ranks import ALONE, Ranks
from titanlite.plan.memory import FILE_BYTES, part_count
from titanlite.text import format_bytes

BLOCK_BYTES = 2**26  # a tensor goes through memory in runs of rows of about this size (one row, if that is larger)
BATCH_BYTES = 2**25  # as soon as this is written it is synced, while more is written
Data = bytes | memoryview


@dataclass(frozen=True)
class TensorSource:
    """A tensor that is written block by block, wherever it is."""

    dtype: str  # torch's name of the dtype that it is written in
    shape: tuple[int, ...]
    read: Callable[[Box], Tensor]  # reads a box of it, in any dtype, on any device

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0]

    @staticmethod
    def of(tensor: Tensor) -> TensorSource:
        whole = whole_box(tensor.shape)
        return TensorSource(dtype_name(tensor), whole[1], lambda box: tensor[within(box, whole)])


def write_tensors(path: Path, tensors: Mapping[str, TensorSource]) -> format.FileEntry:
    """Write and sync one file; its size and hash. The bytes depend on the tensors and their order. Raises `OSError`.

    Layout: 8 bytes little-endian length of the header; the header, JSON padded by spaces; then the values, those of
    wider dtypes first, so that each begins at a multiple of its element's size.
    """
    order = sorted(tensors, key=lambda name: -DTYPES[tensors[name].dtype][0])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        code = DTYPES[tensors[name].dtype][1]
        header[name] = {"dtype": code, "shape": tensors[name].shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size, unsynced = xxhash.xxh3_128(), 0, 0
    with open(path, "xb") as file, ThreadPoolExecutor(1) as beside:

        def hash_and_sync(data: Data, must_sync: bool) -> None:
            digest.update(data)
            if must_sync:
                sync(file.fileno(), path)  # what was written before, so that the disk has work all the time

        for data in itertools.chain([struct.pack("<Q", len(text)) + text], _blocks(tensors, order)):
            meanwhile = beside.submit(hash_and_sync, data, unsynced >= BATCH_BYTES)
            unsynced = len(data) if unsynced >= BATCH_BYTES else unsynced + len(data)
            file.write(data)
            meanwhile.result()
            size += len(data)
        file.flush()
        sync(file.fileno(), path)
    return format.FileEntry(size, digest.hexdigest())


def _blocks(tensors: Mapping[str, TensorSource], order: Sequence[str]) -> Iterator[Data]:
    for source in (tensors[name] for name in order):
        for box in row_blocks(whole_box(source.shape), DTYPES[source.dtype][0], BLOCK_BYTES):
            block = source.read(box).to("cpu", getattr(torch, source.dtype)).contiguous()
            yield block.flatten().view(torch.uint8).numpy().data


@dataclass(frozen=True)
class WriteItem:
    """A box of a whole tensor that this rank writes. Of an empty tensor, nothing."""

    name: str
    whole: tuple[int, ...]  # shape of the whole tensor
    offset: tuple[int, ...]
    source: TensorSource


# What this rank writes of a checkpoint, by the keys in files: a tensor's name, with the offset if it is not all of it.
LocalSavePlan = Mapping[str, WriteItem]


def plan_local_save(tensors: Mapping[str, Shard]) -> LocalSavePlan:
    """What this rank writes of a state, by views: each box that several ranks hold is shared out among them."""
    plan: dict[str, WriteItem] = {}
    for name, shard in tensors.items():
        tensor, box = shard.tensor.detach(), shard.box
        mine = boxes_to_write(name, box, tensor.nbytes, shard.copies, shard.copy, FILE_BYTES)
        if dtype_name(tensor) not in DTYPES:
            raise ValueError(f"tensor '{name}' is {dtype_name(tensor)}, which a checkpoint cannot hold")
        for part in [box] if 0 in shard.shape else mine:
            key = name if part[1] == shard.shape else f"{name}@{','.join(map(str, part[0]))}"
            plan[key] = WriteItem(name, shard.shape, part[0], TensorSource.of(tensor[within(part, box)]))
    return plan


def boxes_to_write(name: str, box: Box, nbytes: int, copies: int, copy: int, file_bytes: int) -> list[Box]:
    """What number `copy` of the `copies` processes that hold this box of tensor `name` writes of it.

    The box is cut along its rows, into equal runs; they are dealt out in turn, beginning at a copy that the name and
    the offset pick, so that small boxes spread over all. None is larger than `file_bytes`, unless one row is.
    """
    offset, size = box
    if 0 in size:
        return []
    rows = size[0] if size else 1
    count = part_count(rows, nbytes, copies, file_bytes)
    first = xxhash.xxh3_64_intdigest(f"{name} {offset}".encode())
    mine = [number for number in range(count) if (first + number) % copies == copy]
    if not size:
        return [box for _ in mine]
    edges = [rows * number // count for number in range(count + 1)]
    return [((offset[0] + edges[n], *offset[1:]), (edges[n + 1] - edges[n], *size[1:])) for n in mine]


def group_by_size(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in their order, cut into groups of at most `limit` in sum; one that is larger stands alone."""
    groups: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not groups or filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def save_state(final: Path, plan: LocalSavePlan, metadata: format.CheckpointMetadata, ranks: Ranks = ALONE) -> str:
    """Write the folder `final` atomically; called by every rank, each with its plan. Returns what `commit` says.

    Raises `CheckpointError` on every rank if a disk refuses on any, with nothing changed on it.
    """
    wrapped = wrap_write_errors(final, plan, "checkpoint")
    try:
        ranks.run_on_rank0(wrapped(lambda: begin(final)))
        doubt: str = ranks.run_on_all_ranks(
            wrapped(lambda: write_items(pending(final), plan, ranks.rank)),
            wrapped(lambda tables: commit(final, format.encode(merge_tables(tables, metadata)))),
        )
        return doubt
    except Exception:  # on all ranks alike; what an interruption leaves, the next start clears
        ranks.run_on_rank0(lambda: abandon(final))
        raise


def planned_bytes(plan: LocalSavePlan) -> int:
    """Those of the values."""
    return sum(item.source.nbytes for item in plan.values())


def wrap_write_errors(final: Path, plan: LocalSavePlan, what: str) -> ContextDecorator:
    """`wrap_os_errors` of what writes a checkpoint or a snapshot."""
    text = f"cannot write the {what} {final} (of which {format_bytes(planned_bytes(plan))} fall to this rank)"
    return wrap_os_errors(text, final, f" Earlier {what}s are untouched.")


def write_items(folder: Path, plan: LocalSavePlan, rank: int = 0) -> dict[str, Any]:
    """Write and sync this rank's files; its table of tensors and files for `merge_tables`. Raises `OSError`."""
    tensors: dict[str, Any] = {
        item.name: {"dtype": item.source.dtype, "shape": list(item.whole), "chunks": []} for item in plan.values()
    }
    files = {}
    sizes = {key: item.source.nbytes for key, item in plan.items() if item.source.nbytes}
    for number, keys in enumerate(group_by_size(sizes, FILE_BYTES)):
        file = f"tensors-{rank:05d}-{number:03d}.safetensors"  # see writer_of
        files[file] = write_tensors(folder / file, {key: plan[key].source for key in keys})._asdict()
        for key in keys:
            item = plan[key]
            chunk = {"offset": list(item.offset), "shape": list(item.source.shape), "file": file, "key": key}
            tensors[item.name]["chunks"].append(chunk)
    return {"tensors": tensors, "files": files}


def writer_of(file: str) -> int:
    """The rank that wrote a file of a checkpoint, by its name."""
    return int(file.split("-")[1])


def merge_tables(tables: Sequence[Mapping[str, Any]], metadata: format.CheckpointMetadata) -> format.Manifest:
    """The manifest of what all ranks wrote, by their tables. Raises `ValueError` if they disagree on how it is cut."""
    tensors: dict[str, Any] = {}
    files: dict[str, Any] = {}
    for table in tables:
        files.update(table["files"])
        for name, part in table["tensors"].items():
            entry = tensors.setdefault(name, {**part, "chunks": []})
            if (entry["dtype"], entry["shape"]) != (part["dtype"], part["shape"]):
                raise ValueError(f"tensor '{name}' is {entry['dtype']}{entry['shape']} on one rank, and not on another")
            entry["chunks"] += part["chunks"]
    environment = {**metadata.environment, "ranks": str(len(tables))}
    return format.manifest_from({**vars(metadata), "environment": environment, "tensors": tensors, "files": files})


def environment(device: torch.device) -> dict[str, str]:
    """What a run's numbers may depend on beside its recipe: versions, platform, and the device that it trains on."""
    return {
        "titanlite": titanlite.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def dtype_name(tensor: Tensor) -> str:
    """torch's own name of the dtype, such as `float32`."""
    return str(tensor.dtype).removeprefix("torch.")


Warn = Callable[[str], None]


@dataclass
class SaveResult:
    """How a save ended; the same on all ranks."""

    step: int
    error: Exception | None = None  # why there is nothing of this step; None: it is committed
    blocked_seconds: float = 0.0  # how long training stood still for it
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)


class BackgroundSaver:
    """Saves of one kind, one after the other. In the background, each is of a copy in the host's memory, which is kept
    from save to save: from the second on its pages are there.

    `warn` gets what a save warned of, in the thread that asks how it ended.
    """

    def __init__(self, warn: Warn, background: bool) -> None:
        self._warn = warn
        self._background = background
        self._copies: dict[str, Tensor] = {}
        self._saving: tuple[Thread, SaveResult] | None = None  # the save whose result was not asked for yet

    def begin(self, step: int, tensors: Mapping[str, Shard], write: Callable[[LocalSavePlan, Warn], None]) -> None:
        """Have `write` save what falls to this rank of a state, which may change once this returns."""
        assert self._saving is None, "the memory of a save that was begun is needed: ask for its result first"
        began, plan, saved = time.monotonic(), plan_local_save(tensors), SaveResult(step)
        if self._background:
            plan = self._copy(plan)

        def run() -> None:
            try:
                write(plan, saved.warnings.append)
            except Exception as error:  # for the thread that asks for the result
                saved.error = error
            saved.seconds = time.monotonic() - began

        # A daemon: after an error that only this rank met, the save would wait for ranks that are gone. The watchdog
        # finds the thread by its name.
        thread = Thread(target=run, name="checkpoint", daemon=True)
        (thread.start if self._background else thread.run)()
        saved.blocked_seconds = time.monotonic() - began
        self._saving = thread, saved

    def join(self, seconds: float | None = None) -> None:
        """Return once the save has ended, or after `seconds`."""
        if self._saving is not None and self._saving[0].is_alive():
            self._saving[0].join(seconds)

    def result(self, wait: bool = False) -> SaveResult | None:
        """How the save ended; None if there is none, if this was asked before, or if it goes on (and is not to be
        waited for). Raises what was not the disk's fault.
        """
        if wait:
            self.join()
        if self._saving is None or self._saving[0].is_alive():
            return None
        (_, saved), self._saving = self._saving, None
        if saved.error is not None and not isinstance(saved.error, CheckpointError):
            raise saved.error
        for text in saved.warnings:
            self._warn(text)
        return saved

    def _copy(self, plan: LocalSavePlan) -> LocalSavePlan:
        """The same plan, with copies of the values as they are now."""
        values = {key: item.source.read(whole_box(item.source.shape)) for key, item in plan.items()}
        if self._copies.keys() != values.keys():
            # Pinned: only to such memory does a GPU copy without the host's help.
            self._copies = {
                key: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
                for key, tensor in values.items()
            }
        for key, tensor in values.items():
            self._copies[key].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in values.values()):
            torch.cuda.current_stream().synchronize()
        return {key: replace(item, source=TensorSource.of(self._copies[key])) for key, item in plan.items()}
