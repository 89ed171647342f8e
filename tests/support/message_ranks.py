"""What a rank does in the tests of messages."""

from __future__ import annotations

import pytest
import torch

from titanlite.parallel.ranks import Ranks


def exchange(rank: int, world: int, lengths: list[int]) -> tuple[list[bytes], list[bytes]]:
    """What this rank receives if each sends its number, repeated: by all-gather, and by gather."""
    ranks, message = Ranks(rank, world), bytes([rank]) * lengths[rank]
    return ranks.gather(message, on_all=True), ranks.gather(message)


def add_up(rank: int, world: int) -> list[float]:
    """Sum and maximum of the ranks' numbers, and the first one's; whether all say the same."""
    ranks, number = Ranks(rank, world).apart(200), torch.tensor(float(rank))
    numbers = [ranks.sum(number.clone()), ranks.max(number.clone()), ranks.broadcast(number)]
    return [*map(float, numbers), ranks.all_equal(-(2**62)), ranks.all_equal(rank)]


def fail(rank: int, world: int, kinds: list[type[Exception]]) -> tuple[str, str]:
    """How a call ends in which each rank raises an error of its kind."""
    with pytest.raises(Exception, match="oh") as failure:
        Ranks(rank, world).run_on_all_ranks(lambda: (_ for _ in ()).throw(kinds[rank]("oh")))
    return type(failure.value).__name__, str(failure.value)
