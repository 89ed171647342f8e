"""Writing one checkpoint: each rank its part of the tensors to files of its own, then one manifest that makes them one.

Takes parts of tensors by name and knows no model and no optimizer; when to save and what to keep is the manager's
matter.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import titanlite
from titanlite.checkpoint.format import DTYPES, Manifest, Scalar, encode, manifest_from
from titanlite.checkpoint.plan import Box, boxes_to_write, group_by_size, within
from titanlite.checkpoint.ranks import ALONE, Ranks
from titanlite.checkpoint.storage import abandon, begin, commit, pending, wrap_os_errors
from titanlite.checkpoint.stream import Source, write_tensors
from titanlite.models.shard import Shard
from titanlite.plan.checkpoint_parts import FILE_BYTES
from titanlite.text import format_bytes


@dataclass(frozen=True)
class WriteItem:
    """A box of a whole tensor that this rank writes."""

    name: str
    offset: tuple[int, ...]
    values: Tensor | Source
    """A view of what is trained, on any device, or a copy of it."""


@dataclass(frozen=True)
class LocalSavePlan:
    """What this rank writes of a checkpoint."""

    tensors: Mapping[str, Mapping[str, object]]
    """dtype and whole shape of the tensors that it writes something of, and of empty ones."""
    items: Mapping[str, WriteItem]
    """By the keys that they have in their files."""
    file_bytes: int
    """Size of its files."""

    @property
    def nbytes(self) -> int:
        return sum(item.values.nbytes for item in self.items.values())


@dataclass(frozen=True)
class CheckpointMetadata:
    """What a checkpoint says beside its tensors; see `format.Manifest`. That of rank 0 is written."""

    step: int
    samples: int = 0
    tokens: int = 0
    recipe: str = ""
    values: Mapping[str, Scalar] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def plan_local_save(tensors: Mapping[str, Shard], file_bytes: int | None = None) -> LocalSavePlan:
    """What this rank writes of a state, by views: each box that several ranks hold is shared out among them.

    Tensors that share storage must be reduced to one name by the caller.
    """
    file_bytes = FILE_BYTES if file_bytes is None else file_bytes
    table: dict[str, Mapping[str, object]] = {}
    items: dict[str, WriteItem] = {}
    for name, shard in tensors.items():
        tensor, box = shard.tensor.detach(), shard.box
        mine = boxes_to_write(name, box, tensor.nbytes, shard.copies, shard.copy, file_bytes)
        if dtype_name(tensor) not in DTYPES:
            raise ValueError(f"tensor '{name}' is {dtype_name(tensor)}, which a checkpoint cannot hold")
        if mine or 0 in shard.shape:
            table[name] = {"dtype": dtype_name(tensor), "shape": list(shard.shape)}
        for part in mine:
            items[_key(name, part, shard.shape)] = WriteItem(name, part[0], tensor[within(part, box)])
    return LocalSavePlan(table, items, file_bytes)


def save_state(final: Path, plan: LocalSavePlan, metadata: CheckpointMetadata, ranks: Ranks = ALONE) -> str:
    """Write the folder `final` atomically; called by every rank, each with its plan.

    Returns once the checkpoint is committed, with what `commit` says of it. Raises `CheckpointError` on every rank if a
    disk refuses on any, with nothing changed on it.
    """
    wrapped = wrap_write_errors(final, plan.nbytes, "checkpoint")
    try:
        ranks.run_on_rank0(wrapped(lambda: begin(final)))
        doubt: str = ranks.run_on_all_ranks(
            wrapped(lambda: write_items(pending(final), plan, ranks.rank)),
            wrapped(lambda tables: commit(final, encode(merge_tables(tables, metadata)))),
        )
        return doubt
    except Exception:  # on all ranks alike; what an interruption leaves, the next start clears
        ranks.run_on_rank0(lambda: abandon(final))
        raise


@contextmanager
def wrap_write_errors(final: Path, nbytes: int, what: str) -> Iterator[None]:
    """`wrap_os_errors` of what writes a checkpoint or a snapshot, `nbytes` of it on this rank."""
    text = f"cannot write the {what} {final} (of which {format_bytes(nbytes)} fall to this rank)"
    with wrap_os_errors(text, final, f" Earlier {what}s are untouched."):
        yield


def write_items(folder: Path, plan: LocalSavePlan, rank: int = 0) -> dict[str, Any]:
    """Write and sync this rank's files; its table of tensors and files for `merge_tables`. Raises `OSError`."""
    tensors: dict[str, Any] = {name: {**entry, "chunks": []} for name, entry in plan.tensors.items()}
    files = {}
    sizes = {key: item.values.nbytes for key, item in plan.items.items()}
    for number, keys in enumerate(group_by_size(sizes, plan.file_bytes)):
        file = f"tensors-{rank:05d}-{number:03d}.safetensors"  # see writer_of
        files[file] = write_tensors(folder / file, {key: _source(plan.items[key].values) for key in keys})._asdict()
        for key in keys:
            item = plan.items[key]
            chunk = {"offset": list(item.offset), "shape": list(item.values.shape), "file": file, "key": key}
            tensors[item.name]["chunks"].append(chunk)
    return {"tensors": tensors, "files": files}


def writer_of(file: str) -> int:
    """The rank that wrote a file of a checkpoint, by its name."""
    return int(file.split("-")[1])


def merge_tables(tables: Sequence[Mapping[str, Any]], metadata: CheckpointMetadata) -> Manifest:
    """The manifest of what all ranks wrote, from their tables in the order of the ranks.

    Raises `ValueError` unless the parts make whole tensors (then the ranks disagree on how these are cut).
    """
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
    return manifest_from({**vars(metadata), "environment": environment, "tensors": tensors, "files": files})


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


def _key(name: str, part: Box, shape: tuple[int, ...]) -> str:
    """What an item is called in its file: as its tensor, with the offset if it is not all of it."""
    return name if part[1] == shape else f"{name}@{','.join(map(str, part[0]))}"


def _source(values: Tensor | Source) -> Source:
    if isinstance(values, Source):
        return values
    shape = tuple(values.shape)
    origin = ((0,) * len(shape), shape)
    return Source(dtype_name(values), shape, lambda box: values[within(box, origin)].cpu())
