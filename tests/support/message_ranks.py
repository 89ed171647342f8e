"""What a rank does in the tests of messages."""

from __future__ import annotations

from titanlite.parallel.messages import gathered


def said(rank: int, world: int, lengths: list[int]) -> tuple[list[bytes], list[bytes]]:
    """What this rank hears if each says its number so many times: where all hear it, and where the first alone."""
    message = bytes([rank]) * lengths[rank]
    return gathered(message, world), gathered(message, world, on_first_alone=True)
