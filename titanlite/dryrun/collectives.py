"""Which messages a program sends: every collective and point-to-point operation that torch dispatches, in order.

Sees both kinds that programs use: those of process groups (`c10d`) and the functional ones that compilers understand.
Knows nothing of where the operations come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

Operation = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "broadcast", "send", "recv"]


@dataclass(frozen=True)
class Collective:
    """One operation, as one of its ranks takes part in it."""

    dimension: str
    """Name of the group in the mesh; `world` for all ranks."""
    operation: Operation
    dtype: str
    ranks: int
    """Ranks of the group."""
    message_bytes: int
    """The whole message: all-gather's output, reduce-scatter's and all-to-all's input, else the tensors themselves."""
    sent_bytes: int
    """What this rank sends of it: see `sent`."""


def sent(operation: Operation, message_bytes: int, ranks: int) -> int:
    """Bytes that a rank sends, by ring algorithms: of an all-reduce 2 (n - 1) / n of the message, of the other
    collectives (n - 1) / n of it, rounded up; a send's are the message, and a recv sends nothing.
    """
    if operation in ("send", "recv"):
        return message_bytes if operation == "send" else 0
    return -(-(1 + (operation == "all-reduce")) * (ranks - 1) * message_bytes // ranks)


@dataclass(frozen=True)
class Traffic:
    """All messages of one kind."""

    dimension: str
    operation: Operation
    dtype: str
    ranks: int
    count: int
    message_bytes: int
    sent_bytes: int


def traffic(collectives: Iterable[Collective]) -> list[Traffic]:
    """Sums by dimension, operation and dtype, in this order."""
    kinds: dict[tuple[str, Operation, str, int], list[Collective]] = {}
    for each in collectives:
        kinds.setdefault((each.dimension, each.operation, each.dtype, each.ranks), []).append(each)
    return [
        Traffic(*kind, len(each), sum(one.message_bytes for one in each), sum(one.sent_bytes for one in each))
        for kind, each in sorted(kinds.items())
    ]


def in_order(collectives: Iterable[Collective]) -> list[tuple[Collective, int]]:
    """The operations one after the other; equal neighbours are one, with how many they are."""
    return [(each, len(list(equal))) for each, equal in groupby(collectives)]


@dataclass(frozen=True)
class _Kind:
    """How an operation that torch dispatches is read."""

    operation: Operation
    message: int | None
    """Position of the argument that is the message; None: the result is."""
    group: int
    """Position of the process group, or of its name."""
    splits: int | None
    """Position of an all-to-all's part for each rank, in rows; where it is empty, parts are equal."""


_MESSAGES: Mapping[str, tuple[Operation, int | None]] = {
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::allgather_": ("all-gather", 0),
    "c10d::allgather_coalesced_": ("all-gather", 0),
    "c10d::allgather_into_tensor_coalesced_": ("all-gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::reduce_scatter_": ("reduce-scatter", 1),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::allreduce_coalesced_": ("all-reduce", 0),
    "c10d::alltoall_": ("all-to-all", 1),
    "c10d::alltoall_base_": ("all-to-all", 1),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::send": ("send", 0),
    "c10d::recv_": ("recv", 0),
    "c10d::recv_any_source_": ("recv", 0),
    "_c10d_functional::all_gather_into_tensor": ("all-gather", None),
    "_c10d_functional::all_gather_into_tensor_out": ("all-gather", None),
    "_c10d_functional::all_gather_into_tensor_coalesced": ("all-gather", None),
    "_c10d_functional::reduce_scatter_tensor": ("reduce-scatter", 0),
    "_c10d_functional::reduce_scatter_tensor_out": ("reduce-scatter", 0),
    "_c10d_functional::reduce_scatter_tensor_coalesced": ("reduce-scatter", 0),
    "_c10d_functional::all_reduce": ("all-reduce", 0),
    "_c10d_functional::all_reduce_": ("all-reduce", 0),
    "_c10d_functional::all_reduce_coalesced": ("all-reduce", 0),
    "_c10d_functional::all_reduce_coalesced_": ("all-reduce", 0),
    "_c10d_functional::all_to_all_single": ("all-to-all", 0),
    "_c10d_functional::broadcast": ("broadcast", 0),
    "_c10d_functional::broadcast_": ("broadcast", 0),
    "_c10d_functional::isend": ("send", 0),
    "_c10d_functional::irecv": ("recv", 0),
}

_NO_MESSAGE = frozenset(
    {
        "c10d::barrier",
        "c10d::monitored_barrier_",
        "c10d::check_for_nan",
        "_c10d_functional::wait_tensor",
        "_c10d_functional::_wrap_tensor_autograd",
    }
)


class CollectiveLog:
    """Writes down the messages among the operations that it is shown."""

    def __init__(self, spanning: str | None = None) -> None:
        """`spanning`: the mesh's dimension that all ranks are in, if there is one: torch gives it the group of all."""
        self.seen: list[Collective] = []
        self._over_all = spanning or "world"
        self._kinds: dict[Any, _Kind | None] = {}

    def see(self, operation: Any, arguments: Sequence[Any], named: Mapping[str, Any], result: Any) -> None:
        """Show what a dispatch mode was given, and what came out. Groups of one rank send nothing and do not count.

        Raises `NotImplementedError` for an operation of torch.distributed that is not known here: it would be missed.
        """
        if operation not in self._kinds:
            self._kinds[operation] = _kind(operation)
        kind = self._kinds[operation]
        if kind is None:
            return
        group = _group(arguments[kind.group])
        if group.size() == 1:
            return
        message = list(_tensors(result if kind.message is None else arguments[kind.message]))
        size = sum(tensor.numel() * tensor.itemsize for tensor in message)
        splits = arguments[kind.splits] if kind.splits is not None else ()
        self.seen.append(
            Collective(
                dimension=self._dimension(group, kind.operation, sum(tensor.numel() for tensor in message)),
                operation=kind.operation,
                dtype=str(message[0].dtype).removeprefix("torch."),
                ranks=group.size(),
                message_bytes=size,
                # With parts of its own choice, a rank sends what it does not keep.
                sent_bytes=size - size * splits[group.rank()] // (sum(splits) or 1)
                if splits
                else sent(kind.operation, size, group.size()),
            )
        )

    def _dimension(self, group: dist.ProcessGroup, operation: Operation, numbers: int) -> str:
        if group is not dist.group.WORLD:
            return group.group_desc.removeprefix("mesh_")
        return "world" if operation == "all-reduce" and numbers == 1 else self._over_all


def _kind(operation: Any) -> _Kind | None:
    schema = operation._schema
    if schema.name.partition("::")[0] not in ("c10d", "_c10d_functional") or schema.name in _NO_MESSAGE:
        return None
    if schema.name not in _MESSAGES:
        raise NotImplementedError(f"{schema.name}: say in titanlite/dryrun/collectives.py what its message is")
    names = [argument.name for argument in schema.arguments]
    how, message = _MESSAGES[schema.name]
    return _Kind(
        how,
        message,
        group=names.index("group_name" if "group_name" in names else "process_group"),
        splits=names.index("input_split_sizes") if "input_split_sizes" in names else None,
    )


def _group(argument: Any) -> dist.ProcessGroup:
    """A process group from how operations are given it: a name, or an object of TorchScript's that holds it."""
    if isinstance(argument, str):
        return dist.distributed_c10d._resolve_process_group(argument)  # type: ignore[attr-defined, arg-type]
    return argument if isinstance(argument, dist.ProcessGroup) else dist.ProcessGroup.unbox(argument)


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    else:
        for each in nested:
            yield from _tensors(each)
