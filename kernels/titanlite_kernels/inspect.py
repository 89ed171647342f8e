"""`python -m titanlite_kernels.inspect`: compile every kernel for every target, and print what the machine code says.

Needs Triton, and no device. Exit code 1 when a kernel spills registers; 2 when nothing can be compiled here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import titanlite_kernels
from titanlite_kernels.build import TARGETS, Build, CannotBuild, compile_build


def builds() -> Iterator[Build]:
    """All that the operations of this package list as their `BUILDS`."""
    for module in pkgutil.iter_modules(titanlite_kernels.__path__):
        yield from getattr(importlib.import_module(f"titanlite_kernels.{module.name}"), "BUILDS", ())


def row(build: Build, target: str) -> dict[str, Any]:
    """One line of the table: `build` as compiled for `target`. `bytes_over_minimum` 1.0 means not a byte too many."""
    compiled = compile_build(build, target)
    return {
        "kernel": build.name,
        "target": target,
        "registers": compiled.registers,
        "spill_bytes": compiled.spill_bytes,
        "shared_bytes": compiled.shared_bytes,
        "vector_bytes": compiled.vector_bytes,
        "bytes_over_minimum": round(compiled.moved_bytes / build.minimal_bytes, 3),
        "tensor_cores": compiled.tensor_cores,
        "warps": compiled.warps,
        "shape": build.shape,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown, columns aligned."""
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m titanlite_kernels.inspect", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="compile for these only")
    parser.add_argument("--kernel", help="compile only kernels whose name contains this")
    asked = parser.parse_args(arguments)
    named = [build for build in builds() if (asked.kernel or "") in build.name]
    chosen = [(build, target) for build in named for target in asked.target if target in build.targets]
    if not chosen:
        parser.error(f"no kernel for {' or '.join(asked.target)} has a name that contains {asked.kernel!r}")
    try:
        rows = [row(build, target) for build, target in chosen]
    except CannotBuild as cause:
        print(cause, file=sys.stderr)
        return 2
    print(json.dumps(rows, indent=2) if asked.json else table(rows))
    spilling = [f"{row['kernel']} ({row['target']})" for row in rows if row["spill_bytes"]]
    if spilling:
        print(f"spill registers: {', '.join(spilling)}", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
