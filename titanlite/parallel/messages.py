"""What each rank has to say, brought together: bytes of any length, by collectives that want all of one length.

Nothing is pickled. What is said, and what follows from it, is the callers' matter.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def as_tensor(message: bytes) -> Tensor:
    """A copy of the bytes, of which there must be some: uint8 [length]."""
    return torch.frombuffer(bytearray(message), dtype=torch.uint8)


def gathered(
    message: bytes, ranks: int, group: dist.ProcessGroup | None = None, *, on_first_alone: bool = False
) -> list[bytes]:
    """All ranks' messages, by rank; with `on_first_alone` on the first rank, and nothing on the others.

    Called by all `ranks` of the group, that of hosts (None: the default one).
    """
    if ranks == 1:
        return [message]
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks)]
    dist.all_gather(lengths, torch.tensor([len(message)]), group)
    padded = as_tensor(message.ljust(max(1, int(max(lengths))), b"\0"))
    if on_first_alone:
        received = [torch.empty_like(padded) for _ in lengths] if dist.get_rank(group) == 0 else None
        dist.gather(padded, received, group_dst=0, group=group)
    else:
        received = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(received, padded, group)
    return [data[: int(length)].numpy().tobytes() for data, length in zip(received or (), lengths, strict=False)]
