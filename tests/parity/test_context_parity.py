"""Attention over sequences that several ranks share, against all of it on one; whole runs are in test_lattice.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.parity import context_runs
from support.pool import Pool

CASES = {
    "plain": {"batch": 2, "seq": 24, "heads": 4, "kv_heads": 4, "documents": False, "window": 0},
    "grouped": {"batch": 1, "seq": 48, "heads": 6, "kv_heads": 3, "documents": False, "window": 0},
    "documents": {"batch": 3, "seq": 24, "heads": 6, "kv_heads": 2, "documents": True, "window": 0},
    "window": {"batch": 2, "seq": 24, "heads": 4, "kv_heads": 2, "documents": False, "window": 7},
    "narrow window": {"batch": 1, "seq": 48, "heads": 2, "kv_heads": 2, "documents": False, "window": 2},
    "documents in a window": {"batch": 3, "seq": 24, "heads": 6, "kv_heads": 2, "documents": True, "window": 5},
}

methods = pytest.mark.parametrize("method", ["all-gather", "ring"])
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def compare(pool: Pool, world: int, *arguments: Any, tolerance: float = 1e-12) -> None:
    """Results and gradients of all ranks' parts."""
    for found, expected in pool.run(context_runs.attend, world, *arguments):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


@methods
@cases
@pytest.mark.parametrize("world", [2, 3, 4])
def test_results_and_gradients(pool: Pool, world: int, case: dict[str, Any], method: str) -> None:
    compare(pool, world, method, case)


@methods
@cases
@pytest.mark.parametrize("how", ["compiled", "recomputed", "recomputed but for products", "by CUDA's path"])
def test_under(pool: Pool, how: str, case: dict[str, Any], method: str) -> None:
    """Compiled in one graph, by the steps before code is generated; or with kernels in the place of CUDA's."""
    compare(pool, 2 if how == "compiled" else 3, method, case, how)  # every rank compiles


@methods
@cases
def test_bfloat16_is_rounded_once_or_twice(pool: Pool, case: dict[str, Any], method: str) -> None:
    """Issue 14, item 0. Of what is summed, probabilities and their gradients are rounded to bfloat16, and the sums of
    single ranks' queries and of all are: five roundings at most from argument to result, each by a third of its unit's
    square in the mean, and these add up as squares do. The errors of single elements are luck.
    """
    found = pool.run(context_runs.attend, 3, method, {**case, "dtype": torch.bfloat16})
    for index, name in enumerate(("result", "queries", "keys", "values")):
        ours, true = (torch.cat([rank[side][index] for rank in found]).double() for side in (0, 1))
        assert ours.shape == true.shape
        assert (ours - true).norm() < (5 / 3) ** 0.5 * 2**-8 * true.norm(), name


def test_gradients_of_gathered_keys_are_rounded_after_their_sum(pool: Pool) -> None:
    """Bit for bit: sums of a few eight-bit numbers are exact in float32, and in bfloat16 they are not."""
    for found, expected in pool.run(context_runs.gathered_gradients, 3):
        assert torch.equal(found, expected)
