"""What a rank does in the tests of messages."""

from __future__ import annotations

from titanlite.parallel.world import gather_bytes


def exchange(rank: int, world: int, lengths: list[int]) -> tuple[list[bytes], list[bytes]]:
    """What this rank receives if each sends its number, repeated: by all-gather, and by gather."""
    message = bytes([rank]) * lengths[rank]
    return gather_bytes(message, world, on_all=True), gather_bytes(message, world)
