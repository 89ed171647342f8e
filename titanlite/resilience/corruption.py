"""Silent corruption: copies of a value have the same bits, and so does what is computed twice. Here that is checked.

Values are compared by integer sums that are formed on the device, exact in any order; only these travel between ranks.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from titanlite.errors import GuardStop
from titanlite.models.shard import Shard


def checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's 64-bit words, and of the bytes that are left over, modulo 2^64: an int64 scalar beside it.

    It changes with any one bit that does.
    """
    values = tensor.detach().contiguous().view(-1)
    if values.stride() != (1,) or values.storage_offset() * values.element_size() % 8:
        values = values.clone(memory_format=torch.contiguous_format)  # words are whole, at multiples of their size
    data = values.view(torch.uint8)
    words = data.numel() // 8 * 8
    return data[:words].view(torch.int64).sum() + data[words:].sum()


def checksums(tensors: Iterable[Tensor]) -> Tensor:
    """The checksum of each, on the device of the first."""
    sums = [checksum(tensor) for tensor in tensors]
    return torch.stack([one.to(sums[0].device) for one in sums])


def compare_replicas(step: int, held: Mapping[str, Shard], ranks: int) -> None:
    """Compare the copies of each part of a tensor that more than one rank holds; called by every rank with its parts.

    Raises `GuardStop` on all ranks alike where copies differ. It names the ranks that disagree with most of the others,
    or, where there is no majority, all that hold a copy.
    """
    if ranks == 1:
        return
    copied = {_key(name, shard): (name, shard.tensor) for name, shard in held.items() if shard.copies > 1}
    sums = checksums(tensor for _, tensor in copied.values()).cpu()
    table = _gathered(torch.stack((torch.tensor(list(copied)), sums), dim=1), ranks)
    different = _different(table)
    if not different:
        return
    mine = {str(key): name for key, (name, _) in copied.items() if key in different}
    told = [json.loads(text) for text in _texts(json.dumps([platform.node(), mine]), ranks)]
    names = {int(key): name for _, known in told for key, name in known.items()}
    found: dict[tuple[bool, tuple[int, ...]], list[str]] = {}
    for key in different:
        found.setdefault(_blamed(table, key), []).append(names[key])
    lines = [
        f"{_who(blamed, told)} {'hold other values than most copies of' if known else 'hold different copies of'} "
        f"{_some(tensors)}"
        for (known, blamed), tensors in found.items()
    ]
    raise GuardStop(
        f"step {step}: copies of the same values differ in their bits, which no arithmetic explains (a device or its "
        "memory is at fault):\n  " + "\n  ".join(lines) + "\n"
        "This state is not saved. Start again without that machine, or test it: the run goes on from its checkpoint."
    )


def compare_repeated(step: int, names: Sequence[str], first: Tensor, second: Tensor, ranks: int) -> None:
    """Compare the checksums of what each rank computed twice, called by every rank with its own.

    `first` and `second`, [names]: of this rank's own loss, then of its gradients, which are sums over ranks. Raises
    `GuardStop` on all ranks alike if they differ on any, naming the ranks whose own loss does or, where it is gradients
    alone, those that saw it.
    """
    different = [names[index] for index in (first != second).nonzero().flatten().tolist()]
    loss = names[0] in different
    texts = _texts(json.dumps([platform.node(), different, loss]), ranks)
    told = [json.loads(text) for text in texts]
    saw = [rank for rank, (_, found, _) in enumerate(told) if found]
    if not saw:
        return
    blamed = [rank for rank in saw if told[rank][2]]
    if blamed:
        said = (
            f"{_who(blamed, told)} came to another loss of the same sequences: the fault is there, or on a rank that "
            "computes them together with it."
        )
    else:
        sums = _some(told[saw[0]][1])
        said = f"{_who(saw, told)} got other sums ({sums}): the fault is on one of the ranks that add to them."
    raise GuardStop(
        f"step {step}: the same batch, computed twice, gave other bits, which no arithmetic explains (a device or its "
        f"memory is at fault). {said} The step was not applied. Start again without that machine, or test it: the run "
        "goes on from its last checkpoint."
    )


def _key(name: str, shard: Shard) -> int:
    """63 bits that stand for this part of this tensor on every rank."""
    part = f"{name} {shard.offset} {tuple(shard.tensor.shape)}"
    return int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little") >> 1


Table = np.ndarray[tuple[int, int, int], np.dtype[np.int64]]
"""[ranks, parts, 2]: key and checksum. Where a rank has fewer parts than another, the rest is zeros."""


def _gathered(mine: Tensor, ranks: int) -> Table:
    """Every rank's rows, on every rank."""
    longest = torch.tensor(mine.shape[0])
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    padded = torch.zeros(int(longest), 2, dtype=torch.int64)
    padded[: mine.shape[0]] = mine
    everyone = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(everyone, padded)
    return torch.stack(everyone).numpy()


def _different(table: Table) -> list[int]:
    """Keys with more than one checksum."""
    keys, sums = table.reshape(-1, 2).T
    order = np.lexsort((sums, keys))
    keys, sums = keys[order], sums[order]
    return sorted({int(key) for key in keys[1:][(keys[1:] == keys[:-1]) & (sums[1:] != sums[:-1])]})


def _blamed(table: Table, key: int) -> tuple[bool, tuple[int, ...]]:
    """Whether most copies agree, and the ranks with the others; all that have a copy where there is no majority."""
    rows = {int(rank): int(table[rank, row, 1]) for rank, row in zip(*np.nonzero(table[:, :, 0] == key), strict=True)}
    (usual, votes), *_ = Counter(rows.values()).most_common(1)
    majority = 2 * votes > len(rows)
    return majority, tuple(rank for rank, found in rows.items() if not majority or found != usual)


def _who(ranks: Sequence[int], told: Sequence[Sequence[str]]) -> str:
    """`rank 1 (node-a)`, `ranks 0 (node-a) and 3 (node-b)`."""
    *most, last = [f"{rank} ({told[rank][0]})" for rank in ranks]
    return f"ranks {', '.join(most)} and {last}" if most else f"rank {last}"


def _some(names: Sequence[str]) -> str:
    """Up to five of them."""
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _texts(text: str, ranks: int) -> list[str]:
    """Every rank's text, by rank."""
    if ranks == 1:
        return [text]
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks)]
    dist.all_gather(lengths, torch.tensor([data.numel()]))
    padded = torch.zeros(int(max(lengths)), dtype=torch.uint8)
    padded[: data.numel()] = data
    everyone = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(everyone, padded)
    return [one[: int(length)].numpy().tobytes().decode() for one, length in zip(everyone, lengths, strict=True)]
