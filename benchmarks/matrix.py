"""The training steps worth comparing: models x ways to run them, each a process with a memory peak of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from parts import ROOT, Part, run

COMPILED = ("--compile.enabled=true",)
FLOAT8 = (*COMPILED, "--precision.float8.enabled=true")
WAYS: dict[str, tuple[str, ...]] = {
    "eager": ("--kernels.backend=torch", "--kernels.linear_cross_entropy=off"),
    "kernels": (),
    "compiled": COMPILED,
    "compiled, Triton kernels": (*COMPILED, "--kernels.backend=triton"),
    "compiled, selective recompute": (*COMPILED, "--recompute.mode=selective"),
    "compiled, full recompute": (*COMPILED, "--recompute.mode=full"),
    "compiled, float8": FLOAT8,
    "compiled, float8 rowwise": (*FLOAT8, "--precision.float8.recipe=rowwise"),
    "compiled, Muon": (*COMPILED, "--optimizer.name=muon"),
}
MODELS: dict[str, tuple[str, ...]] = {
    "1B": ("--model.preset=llama3.2-1b", "--training.global_batch=2"),
    "3B": ("--model.preset=llama3.2-3b", "--training.global_batch=2"),
    "8 layers of 8B": ("--model.preset=llama3-8b", "--model.layers=8", "--training.global_batch=2"),
    "debug": ("--model.preset=debug", "--training.sequence_length=128", "--precision.float8.min_size=0"),
}
"""Sequences of 8,192, a pass for each of two; weights, gradients and AdamW's moments of the 8B would not fit on a card
whole."""


@dataclass(frozen=True)
class Step:
    """One cell; keys of `MODELS` and `WAYS`."""

    model: str
    way: str

    @property
    def name(self) -> str:
        return f"{self.model}, {self.way}"

    def part(self, timeout_seconds: float, breakdown: bool = True, overrides: Sequence[str] = ()) -> Part:
        """As a process. Small models take few steps."""
        steps = ["--warmup", "2", "--steps", "3"] if self.model == "debug" else []
        flags = [*steps, *(["--breakdown"] if breakdown else [])]
        command = [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), *flags]
        return Part(self.name, [*command, *MODELS[self.model], *WAYS[self.way], *overrides], timeout_seconds)


STEPS = (
    *(Step("1B", way) for way in ("eager", "compiled", "compiled, float8")),
    *(
        Step("3B", way)
        for way in ("compiled", "compiled, selective recompute", "compiled, full recompute", "compiled, float8")
    ),
    *(Step("8 layers of 8B", way) for way in WAYS if "recompute" not in way),
)
SMALL = tuple(Step("debug", way) for way in WAYS)


def run_matrix(small: bool, out: Path | None, overrides: Sequence[str]) -> int:
    """The command; returns its exit code. `overrides` hold for every run."""
    cuda = torch.cuda.is_available()
    if not cuda and not small:
        print("no CUDA device here; --small measures the debug model on the CPU", file=sys.stderr)
        return 2
    done = []
    for step in possible(SMALL if small else STEPS, cuda):
        done.append(run(step.part(300, overrides=overrides)) | {"model": step.model, "way": step.way})
        print(f"{step.name}: {done[-1]['outcome']} ({done[-1]['seconds']} s)", file=sys.stderr, flush=True)
    card = torch.cuda.get_device_name() if cuda else "cpu"
    report = {"date": date.today().isoformat(), "device": card, "torch": torch.__version__, "steps": done}
    write(out, "train_step", report, table(done))
    print(table(done))
    return 0 if all(row["outcome"] == "passed" for row in done) else 1


def possible(steps: Iterable[Step], cuda: bool) -> list[Step]:
    """Those that this machine can run: Triton's kernels need a GPU."""
    return [step for step in steps if cuda or "Triton" not in step.way]


def write(out: Path | None, name: str, report: dict[str, Any], markdown: str) -> None:
    """The report as JSON, and beside it as Markdown."""
    folder = out or ROOT / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{report['date']}-{report['device'].replace(' ', '_')}"
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown + "\n", encoding="utf-8")


def table(done: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a step; speed and memory also over those of the model's first row that was measured."""
    lines = [
        "| model | way | tokens/s | ratio | MFU | peak GiB | ratio | first step, s | gemm | attention | idle |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    firsts: dict[str, dict[str, Any]] = {}
    for row in done:
        if "result" not in row:
            lines.append(f"| {row['model']} | {row['way']} | {row['outcome']} " + "| " * 8 + "|")
            continue
        got = row["result"]
        first = firsts.setdefault(row["model"], got)
        speed, memory = (got[key] / first[key] for key in ("tokens_per_second", "memory_peak_gib"))
        used = f"{got['mfu']:.1%}" if got["mfu"] is not None else ""
        classes = (got.get("breakdown") or {"classes": {}})["classes"]
        shares = " | ".join(
            f"{classes[name]['share']:.1%}" if name in classes else "" for name in ("gemm", "attention", "idle")
        )
        lines.append(
            f"| {row['model']} | {row['way']} | {got['tokens_per_second']:,.0f} | {speed:.2f} | {used} "
            f"| {got['memory_peak_gib']:.1f} | {memory:.2f} | {got['first_step_seconds']:.1f} | {shares} |"
        )
    return "\n".join(lines)
