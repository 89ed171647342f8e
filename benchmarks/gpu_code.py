"""What the compiler makes of one block for an H100, counted on a machine without a GPU; docs/gpu_code.md explains it.

python benchmarks/gpu_code.py --only 8b bf16 tp1      # rows of the 8B block in bfloat16 without tensor parallelism
python benchmarks/gpu_code.py --json                  # all rows: about a quarter of an hour
python benchmarks/gpu_code.py --write                 # all rows, into the page
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from h100.blocks import TOKENS, Mode, build, modes
from h100.codegen import Graph, capture, count_collectives, generate, pretend_h100
from h100.steps import count_recompiles
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from titanlite.models.layers import cpu_stands_for
from titanlite.parallel import collectives

PAGE = Path(__file__).parents[1] / "docs" / "gpu_code.md"
MARKS = "<!-- rows: written by benchmarks/gpu_code.py -->\n", "<!-- end of rows -->\n"
MIB = 2**20


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="rows with all of: 8b titanlite full tp8 …"
    )
    parser.add_argument("--json", action="store_true", help="a list of rows on stdout")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}; needs torchao")
    parser.add_argument("--code", type=Path, metavar="FOLDER", help="keep what the compiler wrote")
    arguments = parser.parse_args(argv)
    chosen = [mode for mode in modes() if set(arguments.only) <= {*map(str, asdict(mode).values()), f"tp{mode.tp}"}]
    codes = {mode.code for mode in modes()}
    if "torchao" not in codes:
        print(
            "torchao is not installed: its rows are left out (pip install --no-deps torchao==0.18.0)", file=sys.stderr
        )
    if arguments.write and (arguments.only or "torchao" not in codes):
        parser.error("--write replaces the whole table: torchao must be installed, and --only not given")
    rows = measure(chosen, arguments.code)
    print(json.dumps(rows) if arguments.json else format_table(rows))
    if arguments.write:
        start, end = MARKS
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(start)
        PAGE.write_text(before + start + format_table(rows) + end + rest.partition(end)[2], encoding="utf-8")
    return 0


def measure(chosen: list[Mode], folder: Path | None = None) -> list[dict[str, Any]]:
    """A row for each mode; the code goes to `folder`. Afterwards this process takes CUDA for present."""
    warnings.filterwarnings("ignore", message="Set timeout is now only supported|Torchinductor does not support")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    captured = []
    for mode in chosen:
        fakes = FakeTensorMode(allow_non_fake_inputs=True)
        block, inputs = build(mode, fakes)
        with fakes, cpu_stands_for("cuda"):
            graphs, recompiles = capture(block, inputs)
            overlapped = graphs
            if mode.tp > 1:  # async tensor parallelism is given the messages in another form
                with patch.object(collectives, "OVERLAPPED", {dist.group.WORLD.group_name}):
                    overlapped, _ = capture(block, inputs)
        breaks = 0  # or `capture` would have failed
        if mode.code == "titanlite":
            breaks, recompiles = count_recompiles(mode.precision, mode.recompute, mode.tp)
        captured.append((mode, graphs, overlapped, breaks, recompiles))
    pretend_h100()
    return [_row(*each, folder) for each in captured]


def _row(
    mode: Mode, graphs: list[Graph], overlapped: list[Graph], breaks: int, recompiles: int, folder: Path | None
) -> dict[str, Any]:
    forward, backward = (generate(graph) for graph in sorted(graphs, key=lambda graph: graph.is_backward))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, kernels in (("forward", forward), ("backward", backward)):
            words = map(str, (*asdict(mode).values(), name))
            (folder / f"{'-'.join(words)}.py").write_text(kernels.code, encoding="utf-8")
    fused = [count_collectives(graph) for graph in overlapped]
    return {
        **asdict(mode),
        "launches_forward": forward.launches,
        "launches_backward": backward.launches,
        "mib_forward": round(forward.bytes / MIB, 1),
        "mib_backward": round(backward.bytes / MIB, 1),
        "mib_kept": round(forward.kept / MIB, 1),
        "mib_unavoidable": round(sum(unavoidable_bytes(mode)) / MIB, 1),
        "collectives": sum(found for found, _ in fused),
        "collectives_fused": sum(joined for _, joined in fused),
        "graph_breaks": breaks,
        "recompiles": recompiles,
    }


def unavoidable_bytes(mode: Mode) -> tuple[int, int]:
    """What any code reads and writes in the block's forward and backward pass: every product and attention its factors
    and its result, and every chain of other operations between them what comes in and goes out, each once.

    Queries, keys and values come of one product, and so do gate and up. Vectors (norms' weights, scales) are left out.
    """
    config, tokens, part = mode.config, TOKENS, TOKENS // mode.tp  # of the residual stream a rank has a part
    dim, ffn = config.dim, config.ffn_dim // mode.tp
    q, k = config.heads * config.head_dim // mode.tp, config.kv_heads * config.head_dim // mode.tp
    products = ((dim, q + 2 * k), (q, dim), (dim, 2 * ffn), (ffn, dim))  # inputs and outputs of each
    cast = mode.precision != "bf16"
    keeps_wide = mode.precision == "rowwise_with_hp_grad_weight"  # products for weights' gradients are in bfloat16
    factor = 1 if cast else 2  # bytes of an element of a product's factor
    other = 1 if cast and not keeps_wide else 2

    def multiply(rows: int, inner: int, columns: int, size: int) -> int:
        return size * inner * (rows + columns) + 2 * rows * columns

    log_sums = 4 * tokens * config.heads // mode.tp
    attention = 2 * tokens * 2 * (q + k) + log_sums
    weights = sum(inputs * outputs for inputs, outputs in products) * 3 * cast  # read in bfloat16, written in float8
    tables = 4 * tokens * config.head_dim  # a cosine and a sine for each pair
    rotation = 2 * tokens * 2 * (q + k) + tables
    # Both norms read the stream and write a factor; the second adds first, as the end of the block does alone.
    norms = part * (2 * dim + factor * dim + 3 * 2 * dim + factor * dim)
    gates = tokens * ffn * (2 * 2 + factor)
    last = part * 3 * 2 * dim
    casts = tokens * q * 3 * cast  # of attention's result
    chains = norms + rotation + gates + casts + weights
    forward = chains + last + attention + sum(multiply(tokens, *sizes, factor) for sizes in products)

    # Gradients are factors of two products: in float8 once by rows and once by columns, or also in bfloat16.
    grad = 2 if not cast else 1 + other
    to_inputs = sum(multiply(tokens, outputs, inputs, factor) for inputs, outputs in products)
    to_weights = sum(multiply(outputs, tokens, inputs, other) for inputs, outputs in products)
    backward = to_inputs + to_weights + attention + 2 * tokens * 2 * (q + k) + weights
    backward += 2 * part * 4 * 2 * dim  # of each norm: its input, its result's and the stream's gradient, its gradient
    backward += 2 * tokens * (q + k) + tables + tokens * (q + k) * grad
    backward += tokens * ffn * (3 * 2 + 2 * grad)
    if cast:  # the inputs once more by columns; gradients that no chain forms: of values, and of both sums
        backward += 0 if keeps_wide else tokens * sum(inputs for inputs, _ in products)
        backward += tokens * (k + 2 * dim) * (2 + (1 if keeps_wide else 2))
    # A second time: factors that are not kept, without what their chains read where a chain of gradients reads it too.
    if mode.recompute == "selective":
        backward += rotation + (0 if cast else 2 * (2 * part * dim + tokens * ffn))
    if mode.recompute == "full":
        backward += norms + rotation + casts + weights + factor * tokens * ffn
        backward += attention + sum(multiply(tokens, *sizes, factor) for sizes in products[:3])
    return forward, backward


def format_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    heads = "block", "code", "precision", "recompute", "tp", "launches", "MiB", "of it unavoidable", "MiB kept"
    lines = [" | ".join((*heads, "fused collectives", "breaks, recompiles")), " | ".join(["---"] * (len(heads) + 2))]
    for row in rows:
        mib = row["mib_forward"] + row["mib_backward"]
        cells = [row[key] for key in ("block", "code", "precision", "recompute", "tp")]
        cells.append(f"{row['launches_forward']} + {row['launches_backward']}")
        cells.append(f"{row['mib_forward']:,.0f} + {row['mib_backward']:,.0f}")
        cells.append(f"{row['mib_unavoidable']:,.0f} ({row['mib_unavoidable'] / mib:.0%})")
        cells.append(f"{row['mib_kept']:,.0f}")
        cells.append(f"{row['collectives_fused']} of {row['collectives']}" if row["collectives"] else "")
        cells.append(f"{row['graph_breaks']}, {row['recompiles']}")
        lines.append(" | ".join(map(str, cells)))
    return "".join(f"| {line} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
