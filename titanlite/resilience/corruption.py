"""Silent corruption: copies of a value have the same bits, and so does what is computed twice. Here that is checked.

Values are compared by integer sums that are formed on the device, exact in any order; only these travel between ranks.
"""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from titanlite.errors import GuardStop
from titanlite.models.shard import Shard
from titanlite.parallel.ranks import Ranks
from titanlite.text import list_some


def checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's 64-bit words and of the bytes left over, modulo 2^64 (int64): any bit changes it."""
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


def compare_replicas(step: int, held: Mapping[str, Shard], ranks: Ranks) -> None:
    """Compare the copies of each part of a tensor that more than one rank holds; called by every rank with its parts.

    Raises `GuardStop` on all ranks alike where copies differ. It names the ranks that disagree with most of the others,
    or, where there is no majority, all that hold a copy.
    """
    if ranks.size == 1:
        return
    copied = {_key(name, shard): (name, shard.tensor) for name, shard in held.items() if shard.copies > 1}
    sums = checksums(tensor for _, tensor in copied.values()).cpu()
    own = torch.stack((torch.tensor(list(copied)), sums), dim=1).numpy().tobytes()
    parts = [np.frombuffer(data, np.int64).reshape(-1, 2) for data in ranks.gather(own, on_all=True)]
    table = np.concatenate([np.insert(part, 0, rank, axis=1) for rank, part in enumerate(parts)])  # rank, key, checksum
    keys, counts = np.unique(np.unique(table[:, 1:], axis=0)[:, 0], return_counts=True)
    different: list[int] = keys[counts > 1].tolist()
    if not different:
        return
    held_here = [(key, copied[key][0]) for key in different if key in copied]
    answers = ranks.run_on_all_ranks(lambda: [platform.node(), held_here])
    names = {key: name for _, known in answers for key, name in known}
    found: dict[tuple[bool, tuple[int, ...]], list[str]] = {}
    for key in different:
        rows = {rank: value for rank, _, value in table[table[:, 1] == key].tolist()}
        (usual, votes), *_ = Counter(rows.values()).most_common(1)
        majority = 2 * votes > len(rows)
        blamed = tuple(rank for rank, value in rows.items() if not majority or value != usual)
        found.setdefault((majority, blamed), []).append(names[key])
    hosts = [host for host, _ in answers]
    lines = [
        f"\n  {_name_ranks(blamed, hosts)} {'differ from most copies of' if majority else 'hold different copies of'} "
        f"{list_some(tensors)}"
        for (majority, blamed), tensors in found.items()
    ]
    raise _fault(step, "copies of the same values differ in their bits", "".join(lines) + "\nThis state is not saved.")


def compare_repeated(step: int, names: Sequence[str], first: Tensor, second: Tensor, ranks: Ranks) -> None:
    """Compare the checksums of what each rank computed twice, called by every rank with its own.

    `first` and `second`, [names]: of this rank's own loss, then of its gradients, which are sums over ranks. Raises
    `GuardStop` on all ranks alike if they differ on any, naming the ranks whose own loss does or, where it is gradients
    alone, those that saw it.
    """
    different = [names[index] for index in (first != second).nonzero().flatten().tolist()]
    answers = ranks.run_on_all_ranks(lambda: [platform.node(), different])
    hosts = [host for host, _ in answers]
    saw = [rank for rank, (_, found) in enumerate(answers) if found]
    if not saw:
        return
    blamed = [rank for rank in saw if names[0] in answers[rank][1]]
    if blamed:
        where = (
            f"{_name_ranks(blamed, hosts)} computed another loss of the same sequences: the fault is there, or on a "
            "rank that computes them together with it."
        )
    else:
        sums = list_some(answers[saw[0]][1])
        where = f"{_name_ranks(saw, hosts)} got other sums ({sums}): the fault is on one of the ranks that add to them."
    raise _fault(step, "the same batch, computed twice, gave other bits", f" {where} The step was not applied.")


def _fault(step: int, what: str, where: str) -> GuardStop:
    return GuardStop(
        f"step {step}: {what}, which no arithmetic explains (a device or its memory is at fault).{where} Start again "
        "without that machine, or test it: the run goes on from its last checkpoint."
    )


def _key(name: str, shard: Shard) -> int:
    """63 bits that stand for this part of this tensor on every rank."""
    part = f"{name} {shard.offset} {tuple(shard.tensor.shape)}"
    return int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little") >> 1


def _name_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """`rank 1 (node-a)`, `ranks 0 (node-a) and 3 (node-b)`."""
    *most, last = [f"{rank} ({hosts[rank]})" for rank in ranks]
    return f"ranks {', '.join(most)} and {last}" if most else f"rank {last}"
