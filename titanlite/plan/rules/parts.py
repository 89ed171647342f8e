"""Into how many parts the ranks cut the tensors of a checkpoint, and how many its table has room for."""

from __future__ import annotations

MAX_CHUNKS = 2**23
"""At about 150 bytes each. 405B on 16,384 ranks (tp 8 x pp 16 x 128) make 2.8 million with AdamW's moments; 70B that
4,096 ranks cut make 7.4 million. The rule `layout.parts` refuses a run that would make more."""
SHARED_BYTES = 2**24
"""A box is cut so that the processes that have it share its writing, but not into parts smaller than this."""
FILE_BYTES = 2**29
"""A new file begins when the one before would grow past this. Files are what is read at once, and by whom."""


def part_count(rows: int, nbytes: int, copies: int, file_bytes: int) -> int:
    """Into how many parts the `copies` processes that hold a box of `rows` rows and `nbytes` bytes cut it."""
    return min(rows, max(1, -(-nbytes // file_bytes), min(copies, nbytes // SHARED_BYTES)))
