"""Runs the whole lattice, for an hour, and writes it as a table.

`PYTHONPATH=tests python -m support.parity.parity_table docs/parity.md`

Exits with 1 if a point that the recipe check lets through differs from one process.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from support.parity.compare import RELATIVE, curve_difference, reference, run, weights_difference
from support.parity.lattice import Point, points
from support.parity.parity_runs import small_recipe, write_corpus
from support.pool import Pool
from titanlite.plan.rules import apply_rules

_HEAD = """# Parity

Written by `PYTHONPATH=tests python -m support.parity.parity_table docs/parity.md` with torch {torch}; do not edit.

Each line is a run of six steps on gloo processes against the same recipe on one process, all in float64: the largest
relative difference of any loss, gradient norm and validation loss, and of any parameter after the last step. The limit
is {limit:g}. A line without numbers is refused by `titanlite check`, with the reason. The model has 5 blocks, 6 heads
and 3 heads of keys and values, unless the line says otherwise.

| layout | curve | weights |
|---|---|---|
"""


def line(pool: Pool, corpus: str, point: Point) -> tuple[str, bool]:
    """A point's line of the table, and whether it is as it should be."""
    recipe = small_recipe(corpus, **point.sections)
    refused = [f for f in apply_rules(recipe, point.ranks) if f.severity == "error"]
    if refused:
        return f"| {point.name} | refused | {refused[0].key}: {refused[0].problem} {refused[0].fix} |", True
    expected = reference(corpus, **point.sections)
    try:
        found = run(pool, point.ranks, recipe)
    except AssertionError as error:
        return f"| {point.name} | **failed** | {str(error).splitlines()[-1]} |", False
    curve = max(curve_difference(result, expected) for result in found)
    weights, name = weights_difference(found[0], expected)
    good = max(curve, weights) < RELATIVE
    return f"| {point.name} | {curve:.0e} | {weights:.0e}{'' if good else f' **{name}**'} |", good


def main(target: Path) -> int:
    torch.set_num_threads(1)
    pool, lines, wrong = Pool(), [], 0
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder) / "corpus.txt")
        for point in points():
            text, good = line(pool, corpus, point)
            print(text, flush=True)
            lines.append(text)
            wrong += not good
    pool.close()
    end = f"\n{len(lines)} layouts, {sum('| refused |' in text for text in lines)} of them refused, {wrong} wrong.\n"
    target.write_text(_HEAD.format(torch=torch.__version__, limit=RELATIVE) + "\n".join(lines) + "\n" + end)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
