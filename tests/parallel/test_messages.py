"""Messages of other lengths arrive whole, by rank, and where they are meant to."""

from __future__ import annotations

import pytest
from support import message_ranks
from support.pool import Pool

from titanlite.parallel.world import gather_bytes


@pytest.mark.parametrize("lengths", [[3, 0, 70_000], [0, 0, 0]])
def test_messages_arrive_whole(pool: Pool, lengths: list[int]) -> None:
    sent = [bytes([rank]) * length for rank, length in enumerate(lengths)]
    received = pool.run(message_ranks.exchange, 3, lengths)
    assert [everywhere for everywhere, _ in received] == [sent] * 3
    assert [at_first for _, at_first in received] == [sent, [], []]


def test_one_process_has_its_own() -> None:
    assert gather_bytes(b"\0\1", 1, on_all=True) == gather_bytes(b"\0\1", 1) == [b"\0\1"]
