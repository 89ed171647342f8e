"""The compiler's code for an H100, made here: one block is held to its launches and bytes, and the page to the tool."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TORCH = "2.13"  # whose compiler the numbers are of

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="inductor writes code for GPUs with Triton alone"),
    pytest.mark.skipif(not version("torch").startswith(f"{TORCH}."), reason=f"the numbers are torch {TORCH}'s"),
]


def count(*words: str) -> list[dict[str, Any]]:
    """The tool's rows, from a process of its own: it takes CUDA for present until it ends."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_code.py"), "--json", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def test_a_block_launches_and_moves_no_more_than_before() -> None:
    """Where a change lowers a number, lower it here; the page is made anew by `gpu_code.py --write`."""
    (row,) = count("--only", "8b", "titanlite", "bf16", "none", "tp1")
    assert row["launches_forward"] <= 6 and row["launches_backward"] <= 8
    assert row["mib_forward"] <= 3281.1 and row["mib_backward"] <= 6227.2
    assert row["mib_kept"] <= 1089.1
    assert row["graph_breaks"] == 0 and row["recompiles"] == 0
    # In MiB: a value of the residual stream for each token is 64, of keys 16, of the hidden layer 224; weights are 32
    # for queries and outputs, 8 for keys and for values, 112 for each of the other three. Products, from in to out:
    products = (64 + 96 + 48) + (64 + 64 + 32) + (64 + 448 + 224) + (224 + 64 + 112)
    attention = 2 * (64 + 16) + 1, (64 + 16) + (2 * 64 + 2 * 16) + 1 + 80  # 1: float32 sums, a token and head
    chains = (64 + 64) + (2 * 80 + 4) + (4 * 64) + (3 * 224) + (3 * 64)  # norm, rotation, sum and norm, gates, sum
    gradients = 4 * 64 + (2 * 80 + 4) + 4 * 64 + 5 * 224
    assert row["mib_unavoidable"] == 3 * products + sum(attention) + chains + gradients


@pytest.mark.slow
def test_the_page_has_the_tools_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao", reason="the page has torchao's rows")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu_code import MARKS, PAGE, format_table

    rows = count()
    assert format_table(rows) == PAGE.read_text(encoding="utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0]
    for row in rows:
        assert row["mib_unavoidable"] <= row["mib_forward"] + row["mib_backward"], row
        assert row["graph_breaks"] == 0 and row["recompiles"] == 0, row
    alike = {tuple(row[key] for key in ("code", "block", "precision", "recompute", "tp")): row for row in rows}
    for (code, *mode), theirs in alike.items():
        if code == "torchtitan" and mode[-1] == 1:
            ours = alike[("titanlite", *mode)]
            for what in ("launches", "mib"):
                counted = [row[f"{what}_forward"] + row[f"{what}_backward"] for row in (ours, theirs)]
                assert counted[0] <= counted[1], (what, mode, counted)
