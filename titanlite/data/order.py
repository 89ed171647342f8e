"""The order of samples as a function: sample i of the run -> its place in the source, in O(1) time and memory.

There is nothing to save that a restart could lose: the state of the data is the number of samples consumed.
"""

from __future__ import annotations

import hashlib
import struct
from functools import lru_cache
from math import isqrt
from typing import Any

_ROUNDS = 8
_MASK = 2**64 - 1


def sample_position(sample: int, n: int, seed: int, source: str) -> int:
    """Place, in [0, n), of the source's sample number `sample` (from 0, over all epochs).

    Every run of n samples from a multiple of n on (an epoch) visits each place once, each epoch in its own order.
    """
    epoch, index = divmod(sample, n)
    return _permute(index, n, _keys(seed, source, epoch))


def _permute(index: int, n: int, keys: tuple[int, ...]) -> int:
    """Image of `index` by a keyed bijection of [0, n): a Feistel network over a `rows x columns` grid just large enough
    to hold n.

    Each round shifts one coordinate, modulo its range, by a hash of the other: invertible whatever the hash is. An
    image in the few cells beyond n is sent through again until it falls below n (cycle walking); the grid has fewer
    than `rows` such cells, about sqrt(n), so that is rare. A grid, unlike the usual pair of bit strings, fits any n:
    the next power of four may be four times as large. Python integers only, so every platform gives the same order.
    """
    rows = isqrt(n - 1) + 1
    columns = -(-n // rows)
    while True:
        here, there = divmod(index, columns)
        for key in keys:  # an even number of them, so that rows are rows again
            here, there = there, (here + mix64(there + key)) % rows
            rows, columns = columns, rows
        index = here * columns + there
        if index < n:
            return index


@lru_cache(maxsize=256)
def _keys(seed: int, source: str, epoch: int) -> tuple[int, ...]:
    """One of 64 bits a round."""
    # The name comes last: with two integers before it, no two triples are written alike.
    digest = hashlib.blake2b(f"{seed}/{epoch}/{source}".encode(), digest_size=8 * _ROUNDS).digest()
    return struct.unpack(f"<{_ROUNDS}Q", digest)


def mix64(x: Any) -> Any:
    """A 64-bit hash of an integer, or of each in an array of uint64: two rounds of multiply and xor-shift (constants of
    Stafford's variant 13).
    """
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
