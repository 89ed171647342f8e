"""Which messages a program sends: of torch's operations, those of process groups (`c10d`) and the functional ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

Operation = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "broadcast", "send", "recv"]

# How the names of torch's operations begin, without underscores; what follows are variants of them.
_OPERATIONS = {kind.replace("-", ""): kind for kind in get_args(Operation)} | {"isend": "send", "irecv": "recv"}
_NO_MESSAGE = ("barrier", "monitoredbarrier", "checkfornan", "waittensor", "wraptensorautograd")


@dataclass(frozen=True)
class Collective:
    """One operation, as one of its ranks takes part in it; or the sum of `count` alike."""

    dimension: str  # name of the group in the mesh; `world` for all ranks
    operation: Operation
    dtype: str
    ranks: int  # ranks of the group
    message_bytes: int  # all-gather's output, reduce-scatter's and all-to-all's input, else the tensors themselves
    sent_bytes: int  # what this rank sends of it: see `ring_bytes`
    count: int = 1


def ring_bytes(operation: Operation, message_bytes: int, ranks: int) -> int:
    """Bytes that a rank sends, by ring algorithms: of an all-reduce 2 (n - 1) / n of the message, of the other
    collectives (n - 1) / n of it, rounded up; a send's are the message, and a recv sends nothing.
    """
    if operation in ("send", "recv"):
        return message_bytes if operation == "send" else 0
    return -(-(1 + (operation == "all-reduce")) * (ranks - 1) * message_bytes // ranks)


def sum_traffic(collectives: Iterable[Collective]) -> list[Collective]:
    """Sums by dimension, operation, dtype and ranks, in this order."""
    sums: dict[tuple[str, Operation, str, int], list[int]] = {}
    for each in collectives:
        total = sums.setdefault((each.dimension, each.operation, each.dtype, each.ranks), [0, 0, 0])
        total[:] = total[0] + each.message_bytes, total[1] + each.sent_bytes, total[2] + 1
    return [Collective(*kind, *total) for kind, total in sorted(sums.items())]


class CollectiveLog:
    """Records the messages among the operations that it is shown."""

    def __init__(self, world_dimension: str | None = None) -> None:
        self.recorded: list[Collective] = []
        # The mesh's dimension that all ranks are in, if there is one: torch gives it the group of all.
        self._world_dimension = world_dimension or "world"

    def record(self, operation: Any, arguments: Sequence[Any], named: Mapping[str, Any], result: Any) -> None:
        """Show what a dispatch mode was given, and what came out. Groups of one rank send nothing and do not count.

        Raises `NotImplementedError` for an operation of torch.distributed that is not known here: it would be missed.
        """
        if (positions := _positions(operation)) is None:
            return
        kind, message_at, group_at, splits_at = positions
        group = _group(arguments[group_at])
        if group.size() == 1:
            return
        message = flatten(result if message_at is None else arguments[message_at])
        numbers, size = sum(t.numel() for t in message), sum(t.numel() * t.itemsize for t in message)
        splits = arguments[splits_at] if splits_at is not None else ()
        sent = ring_bytes(kind, size, group.size())
        if any(splits):  # parts of the rank's own choice: it sends what it does not keep
            sent = size - size * splits[group.rank()] // sum(splits)
        dimension = group.group_desc.removeprefix("mesh_")
        if group is dist.group.WORLD:
            dimension = "world" if kind == "all-reduce" and numbers == 1 else self._world_dimension
        dtype = str(message[0].dtype).removeprefix("torch.")
        self.recorded.append(Collective(dimension, kind, dtype, group.size(), size, sent))


@cache
def _positions(operation: Any) -> tuple[Operation, int | None, int, int | None] | None:
    """For an operation that sends messages: which it is, and the positions of its message (None: its result), of its
    process group and of an all-to-all's part for each rank, in rows (empty if parts are equal).
    """
    schema = operation._schema
    namespace, _, name = schema.name.replace("_", "").partition("::")
    if namespace not in ("c10d", "c10dfunctional") or name in _NO_MESSAGE:
        return None
    kind = next((kind for begin, kind in _OPERATIONS.items() if name.startswith(begin)), None)
    if kind is None:
        raise NotImplementedError(f"{schema.name}: say in titanlite/dryrun/collectives.py what its message is")
    names = [argument.name for argument in schema.arguments]
    # Process groups' operations take (output, input), the functional ones (input) and return the output.
    output_first = namespace == "c10d" and kind in ("reduce-scatter", "all-to-all")
    message = None if namespace != "c10d" and kind == "all-gather" else int(output_first)
    group = names.index("group_name" if "group_name" in names else "process_group")
    return kind, message, group, names.index("input_split_sizes") if "input_split_sizes" in names else None


def _group(argument: Any) -> dist.ProcessGroup:  # from a name, or an object of TorchScript's that holds it
    if isinstance(argument, str):
        return dist.distributed_c10d._resolve_process_group(argument)  # type: ignore[attr-defined, arg-type]
    return argument if isinstance(argument, dist.ProcessGroup) else dist.ProcessGroup.unbox(argument)


def flatten(nested: Any) -> list[Tensor]:
    """The tensors among nested tuples, lists and dicts."""
    return [each for each in tree_leaves(nested) if isinstance(each, Tensor)]
