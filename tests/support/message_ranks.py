"""What a rank does in the tests of messages."""

from __future__ import annotations

from titanlite.parallel.world import all_gather_bytes, gather_bytes


def exchange(rank: int, world: int, lengths: list[int]) -> tuple[list[bytes], list[bytes]]:
    """What this rank receives if each sends its number, repeated: by all-gather, and by gather."""
    message = bytes([rank]) * lengths[rank]
    return all_gather_bytes(message, world), gather_bytes(message, world)
