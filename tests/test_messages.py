"""Messages of other lengths arrive whole, by rank, and where they are meant to."""

from __future__ import annotations

import pytest
from support import message_ranks
from support.pool import Pool

from titanlite.parallel.messages import gathered


@pytest.mark.parametrize("lengths", [[3, 0, 70_000], [0, 0, 0]])
def test_all_messages_are_heard(pool: Pool, lengths: list[int]) -> None:
    all_of_them = [bytes([rank]) * length for rank, length in enumerate(lengths)]
    heard = pool.run(message_ranks.said, 3, lengths)
    assert [everywhere for everywhere, _ in heard] == [all_of_them] * 3
    assert [at_first for _, at_first in heard] == [all_of_them, [], []]


def test_a_process_alone_hears_itself() -> None:
    assert gathered(b"\0\1", 1) == gathered(b"\0\1", 1, on_first_alone=True) == [b"\0\1"]
