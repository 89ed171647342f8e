"""The parts of `scripts/gpu_check.sh`, the most telling first: each a process of its own with a time-out.

A deadline holds for all. One JSON and one Markdown table of all, written anew after each part.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import matrix
from matrix import Step
from parts import ROOT, Part, run
from titanlite_kernels.bench import format_rows
from train_step import breakdown_table

DEADLINE_SECONDS = 520
"""Under nine minutes with what is left to do when a part is stopped."""
LEAST_SECONDS = 15
"""With less left, a part is not begun."""
LARGE, DEBUG = "8 layers of 8B", "debug"
BFLOAT16, FLOAT8 = (Step(LARGE, way) for way in ("compiled", "compiled, float8"))
PRECISIONS = {
    "float32": ["--precision.compute=float32"],
    "bfloat16": [],
    "float8 tensorwise": ["--precision.float8.enabled=true"],
    "float8 rowwise": ["--precision.float8.enabled=true", "--precision.float8.recipe=rowwise"],
}


def parts(small: bool, scratch: str) -> list[Part]:
    """What is run, in order, with sizes for a GPU or, if `small`, such that a CPU finishes in a few minutes."""
    large = DEBUG if small else LARGE
    test = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    bench = [sys.executable, "-m", "titanlite_kernels.bench", "--json", "-", *([] if small else ["--models", "8B"])]
    interpreted = {"TRITON_INTERPRET": "1"} if small else {}
    exact = (
        Part(f"kernels against float64: {file.stem.removeprefix('run_')}", [*test, str(file)], 60, interpreted)
        for file in sorted((ROOT / "tests" / "kernels").glob("run_*.py"))
    )
    selective = "compiled, selective recompute"
    further = [
        Step(large, "compiled, float8 rowwise"),
        Step("3B", selective),
        Step(large, "compiled, Triton kernels"),
        Step("1B", "compiled"),
        Step(large, "compiled, Muon"),
    ]
    if small:  # a CPU compiles for longer than it runs all the rest
        further = [Step(DEBUG, selective)]
    steps = [Step(large, way).part(120) for way in (BFLOAT16.way, FLOAT8.way, "kernels", "eager")]
    return [
        *exact,
        Part("kernels against a copy and others", bench, 120),
        *steps[:2],
        Part("attention by mode", [sys.executable, "benchmarks/attention.py", *["--small"] * small], 60),
        *_precisions(),
        Part("tests on the GPU", [*test, "tests/gpu"], 120),
        *steps[2:],
        *_runs(scratch),
        *(step.part(120) for step in further),
    ]


def _precisions() -> Iterator[Part]:
    for name, keys in PRECISIONS.items():
        part = Step(DEBUG, "kernels").part(60, breakdown=False, overrides=keys)
        yield Part(f"a few steps in {name}", part.command, 60)


def _runs(scratch: str) -> Iterator[Part]:
    """The trainer itself: with `[debug]`'s tools, and stopped and gone on with."""
    short = [
        "--training.steps=20",
        "--schedule.decay_steps=5",
        "--validation.sequences=16",
        "--metrics.tensorboard=false",
    ]
    train = [sys.executable, "-m", "titanlite.train", "configs/debug.toml", f"--run.output_dir={scratch}", *short]
    looked_at = ["--run.name=looked-at", "--debug.find_nonfinite=true", "--debug.trace_shapes=true"]
    yield Part("debug mode", [*train, *looked_at], 60)
    resumed = '"$@" --run.stop_after_step=10; test $? -eq 75 && "$@"'
    yield Part("stopped and resumed", ["bash", "-c", resumed, "resumed", *train, "--run.name=resumed"], 90)


# ---- what was found --------------------------------------------------------------------------------------------------


def targets(results: list[dict[str, Any]]) -> list[tuple[str, str, bool]]:
    """What was aimed at, what was measured, and whether that is enough; only of what was measured."""
    got = {row["name"]: row["result"] for row in results if "result" in row}
    found = list(_losses(got))
    kernels = got.get("kernels against a copy and others", {"rows": []})["rows"]
    for row in kernels:
        name = f"{row['operation']}, {row['model']}"
        if row["share_of_copy"] is not None:
            found.append((f"{name}: 85 % of a copy", f"{row['share_of_copy']:.1%}", row["share_of_copy"] >= 0.85))
            rivals = {who: row[who] for who in ("compiled", "liger") if isinstance(row[who], float)}
            found += [(f"{name}: no slower than {who}", f"{of:.2f}x", of >= 1) for who, of in rivals.items()]
        if row["share_of_eager_peak"] is not None:
            share = row["share_of_eager_peak"]
            found.append((f"{name}: 15 % of eager's memory", f"{share:.1%}", share < 0.15))
    plain, float8 = got.get(BFLOAT16.name), got.get(FLOAT8.name)
    if plain and plain["mfu"] is not None:
        found.append((f"{BFLOAT16.name}: 50 % MFU", f"{plain['mfu']:.1%}", plain["mfu"] >= 0.5))
    if plain and float8:
        ratio = float8["tokens_per_second"] / plain["tokens_per_second"]
        found.append((f"{FLOAT8.name}: 1.25 times bfloat16", f"{ratio:.2f}x", ratio >= 1.25))
    return found


def _losses(got: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, bool]]:
    """The same steps in every precision: float8 rounds the third digit of products, and not that of a loss."""
    losses = {name: got[f"a few steps in {name}"]["loss"] for name in PRECISIONS if f"a few steps in {name}" in got}
    exact = losses.pop("float32", None)
    for name, loss in losses.items() if exact else ():
        apart = abs(loss / exact - 1)
        yield f"{name}: the loss of float32 within 1 %", f"{apart:.2%}", apart < 0.01


def markdown(report: dict[str, Any]) -> str:
    """The parts, the targets, the kernels, and where the time of each step goes."""
    results = report["parts"]
    where = f"{report['device']}, torch {report['torch']}"
    pieces = [f"{report['date']}, {where}, {report['seconds']:.0f} s", table(results)]
    if report["targets"]:
        rows = [f"| {of['aim']} | {of['measured']} | {'met' if of['met'] else 'missed'} |" for of in report["targets"]]
        pieces.append("\n".join(["| target | measured | |", "| --- | --- | --- |", *rows]))
    for row in results:
        got = row.get("result", {})
        if "rows" in got:
            roofs = f"a copy {got['copy_gb_per_second']:,} GB/s, a matrix product {got['matmul_tflops']} TFLOP/s"
            pieces += [f"{row['name'].capitalize()} ({roofs}):", format_rows(got["rows"])]
        if "attention" in got:
            lines = [f"| {' | '.join(got['attention'][0])} |", f"|{' --- |' * len(got['attention'][0])}"]
            cells = (
                [f"{v:.3g}" if isinstance(v, float) else str(v) for v in each.values()] for each in got["attention"]
            )
            pieces.append("\n".join([*lines, *(f"| {' | '.join(each)} |" for each in cells)]))
        if got.get("breakdown"):
            pieces += [f"{row['name']}:", breakdown_table(got["breakdown"])]
    return "\n\n".join(pieces)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row a part."""
    lines = ["| part | outcome | s | tokens/s | MFU | peak GiB |", "| --- | --- | --- | --- | --- | --- |"]
    for row in results:
        got = row.get("result", {})
        rate = f"{got['tokens_per_second']:,.0f}" if "tokens_per_second" in got else ""
        use = f"{got['mfu']:.1%}" if got.get("mfu") is not None else ""
        memory = f"{got['memory_peak_gib']:.1f}" if "memory_peak_gib" in got else ""
        lines.append(f"| {row['name']} | {row['outcome']} | {row['seconds']} | {rate} | {use} | {memory} |")
    return "\n".join(lines)


def main() -> int:
    """Exit code 1 if a part failed; what the deadline left out is said, and fails nothing."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, help="folder for the results (default: benchmarks/results)")
    parser.add_argument("--small", action="store_true", help="the same parts at a size for a CPU")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help=f"for all ({DEADLINE_SECONDS} on a GPU)")
    arguments = parser.parse_args()

    import torch

    cuda = torch.cuda.is_available()
    if not cuda and not arguments.small:
        print("no CUDA device here; --small runs the same parts on the CPU", file=sys.stderr)
        return 2
    card = torch.cuda.get_device_name() if cuda else "cpu"
    deadline = arguments.deadline or (DEADLINE_SECONDS if cuda else float("inf"))
    report: dict[str, Any] = {"date": date.today().isoformat(), "device": card, "torch": torch.__version__, "parts": []}
    results = report["parts"]
    with tempfile.TemporaryDirectory() as scratch:
        for part in parts(arguments.small, scratch):
            left = deadline - (time.monotonic() - started)
            if left < LEAST_SECONDS:
                results.append({"name": part.name, "outcome": "left out: the deadline", "seconds": 0.0})
            else:
                patience = part.timeout_seconds if cuda else 4 * part.timeout_seconds
                results.append(run(replace(part, timeout_seconds=patience), left))
            print(f"{part.name}: {results[-1]['outcome']} ({results[-1]['seconds']} s)", file=sys.stderr, flush=True)
            report["seconds"] = time.monotonic() - started
            named = ("aim", "measured", "met")
            report["targets"] = [dict(zip(named, of, strict=True)) for of in targets(results)] if cuda else []
            matrix.write(arguments.out, "gpu_check", report, markdown(report))
    print(markdown(report))
    return 1 if any(row["outcome"].startswith(("failed", "over")) for row in results) else 0


if __name__ == "__main__":
    sys.exit(main())
