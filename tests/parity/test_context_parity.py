"""Attention over sequences that several ranks share, against all of it on one; whole runs are in test_lattice.py."""

from __future__ import annotations

from typing import Any

import context_runs
import pytest
import torch
from pool import Pool

CASES = {
    "plain": {"batch": 2, "seq": 24, "heads": 4, "kv_heads": 4, "documents": False},
    "grouped": {"batch": 1, "seq": 48, "heads": 6, "kv_heads": 3, "documents": False},
    "documents": {"batch": 3, "seq": 24, "heads": 6, "kv_heads": 2, "documents": True},
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
@pytest.mark.parametrize("how", ["compiled", "recomputed", "recomputed but for products"])
def test_under(pool: Pool, how: str, case: dict[str, Any], method: str) -> None:
    """Compiled in one graph, by the steps before code is generated."""
    compare(pool, 2 if how == "compiled" else 3, method, case, how)  # every rank compiles


@methods
@cases
def test_bfloat16_is_rounded_once_or_twice(pool: Pool, case: dict[str, Any], method: str) -> None:
    """Sums over keys and ranks are of rounded summands, some of which are around 4."""
    compare(pool, 3, method, {**case, "dtype": torch.bfloat16}, tolerance=4 * 2**-8)
