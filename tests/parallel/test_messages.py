"""What ranks say to each other arrives whole, where it is meant to; an error of one ends a call on all."""

from __future__ import annotations

import pytest
from support import message_ranks
from support.pool import Pool

from titanlite.errors import DamagedCheckpointError, DataError
from titanlite.parallel.ranks import ALONE


@pytest.mark.parametrize("lengths", [[3, 0, 70_000], [0, 0, 0]])
def test_messages_arrive_whole(pool: Pool, lengths: list[int]) -> None:
    sent = [bytes([rank]) * length for rank, length in enumerate(lengths)]
    received = pool.run(message_ranks.exchange, 3, lengths)
    assert [everywhere for everywhere, _ in received] == [sent] * 3
    assert [at_first for _, at_first in received] == [sent, [], []]


def test_one_process_has_its_own() -> None:
    assert ALONE.gather(b"\0\1", on_all=True) == ALONE.gather(b"\0\1") == [b"\0\1"]
    assert message_ranks.add_up(0, 1) == [0, 0, 0, True, True]


def test_numbers_are_the_same_on_all_ranks(pool: Pool) -> None:
    assert pool.run(message_ranks.add_up, 3) == [[3, 2, 0, True, False]] * 3


def test_the_gravest_error_ends_a_call_on_all_ranks(pool: Pool) -> None:
    said = ("UsageError", "rank 1: oh (1 other rank failed too)")
    assert pool.run(message_ranks.fail, 2, [DamagedCheckpointError, DataError]) == [said] * 2
