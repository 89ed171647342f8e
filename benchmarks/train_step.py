"""Tokens/s, MFU and peak memory of a full training step of any recipe, on random tokens; a JSON object on stdout.

python benchmarks/train_step.py --compile.enabled=true --precision.float8.enabled=true --breakdown
python benchmarks/train_step.py --matrix                                # the usual dozen, as a table
python benchmarks/train_step.py --model.preset=debug --training.sequence_length=128 --steps 3      # small, for a CPU

Any key of a recipe may be given; the others are those of `train_step.toml`. What runs is the trainer's own
`TrainState`; its weights are drawn on the device, for the trainer's draw takes longer than what is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from breakdown import OPTIMIZER, breakdown
from matrix import run_matrix
from titanlite_kernels.bench import matmul_flops
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from titanlite.cli.check import check_recipe
from titanlite.models.attention.kernels import attention_kernels
from titanlite.observe.metrics import mfu, peak_flops, peak_memory_bytes
from titanlite.optim.base import UpdateRule
from titanlite.parallel.model import Batch
from titanlite.parallel.world import World
from titanlite.plan.layout import batch_plan, require_layout
from titanlite.recipe.load import load_recipe, parse_with_overrides
from titanlite.recipe.sections import Recipe
from titanlite.training.step import take_step
from titanlite.training.train_state import TrainState

BASE = Path(__file__).with_suffix(".toml")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warmup", type=int, default=3, help="steps that allocate and compile")
    parser.add_argument("--steps", type=int, default=10, help="steps that are measured")
    parser.add_argument("--breakdown", action="store_true", help="profile one more step: what takes its time")
    parser.add_argument("--matrix", action="store_true", help="run the usual dozen and write a table of them")
    parser.add_argument("--small", action="store_true", help="with --matrix: the debug model, on a CPU too")
    parser.add_argument("--out", type=Path, help="with --matrix: folder for the results")
    arguments, overrides = parse_with_overrides(parser, argv)
    if arguments.matrix:
        return run_matrix(arguments.small, arguments.out, overrides)
    loaded = load_recipe(BASE, overrides)
    check_recipe(loaded, 1)
    for measured in measure(loaded.recipe, arguments.warmup, arguments.steps, arguments.breakdown):
        print(json.dumps({"overrides": overrides, **measured}), flush=True)
    if arguments.breakdown:
        print(breakdown_table(measured["breakdown"]), file=sys.stderr)
    return 0


def measure(recipe: Recipe, warmup: int, steps: int, with_breakdown: bool) -> Iterator[dict[str, Any]]:
    """Median step over `steps`, after `warmup` steps; then again with the breakdown: a profiler may end a process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with attention_kernels(recipe.kernels.attention, device):
        yield from _measure(recipe, device, warmup, steps, with_breakdown)


def _measure(
    recipe: Recipe, device: torch.device, warmup: int, steps: int, with_breakdown: bool
) -> Iterator[dict[str, Any]]:
    learner = TrainState(recipe, World(0, 1, device))
    _initialise(learner)
    batch = random_batch(recipe, learner.config.vocab_size).to(device)

    seconds = []
    for step in range(1, warmup + steps + 1):
        _synchronise(device)
        before = time.perf_counter()
        loss, *_ = take_step(learner, step, batch, 1.0)
        _synchronise(device)
        seconds.append(time.perf_counter() - before)
    median = statistics.median(seconds[warmup:])
    tokens_per_second = batch.valid_tokens / median
    flops = learner.spec.flops_per_token(learner.config, recipe.training.sequence_length)
    card = torch.cuda.get_device_name() if device.type == "cuda" else ""
    measured: dict[str, Any] = {
        "device": card or "cpu",
        "torch": torch.__version__,
        "parameters": learner.spec.parameter_count(learner.config),
        "first_step_seconds": seconds[0],
        "step_seconds_median": median,
        "tokens_per_second": tokens_per_second,
        "tflops": tokens_per_second * flops / 1e12,
        "mfu": mfu(tokens_per_second, flops, peak_flops(card)),
        "memory_peak_gib": peak_memory_bytes(device) / 2**30,
        "loss": loss.item(),
    }
    yield measured
    if with_breakdown:
        # The products alone, and half of the square that MFU counts for attention: causal kernels leave the rest out.
        products = learner.spec.flops_per_token(learner.config, 0)
        work = {"gemm": batch.valid_tokens * products, "attention": batch.valid_tokens * (flops - products) / 2}
        first = warmup + steps + 1
        trace, profiled = _traced(learner, lambda step: take_step(learner, first + step, batch, 1.0), device)
        yield measured | {"breakdown": _against_roof(trace, profiled, work, device)}


def _initialise(learner: TrainState) -> None:
    """As `TrainState.initialise`, with other random numbers."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, held in learner.shards.table.items():
            std = learner.spec.initial_std(learner.config, name)
            held.tensor.fill_(1.0) if std is None else held.tensor.normal_(0.0, std)
    for tensor in learner.optimizer.state().values():
        tensor.zero_()
    learner.guards.reset()


def random_batch(recipe: Recipe, vocab_size: int, world: int = 1) -> Batch:
    """The first data rank's, of `world` ranks."""
    plan = batch_plan(recipe, require_layout(recipe.parallel, world), 0)
    shape, length = (plan.microbatches, plan.microbatch), recipe.training.sequence_length
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab_size, (*shape, length + 1), generator=generator)
    return Batch(
        tokens=tokens[..., :-1].contiguous(),
        labels=tokens[..., 1:].contiguous(),
        positions=None,
        documents=None,
        samples=tuple(range(plan.global_batch)),
        first=0,
        sequences=plan.global_batch,
        valid_tokens=plan.global_batch * length,
    )


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# ---- where the time goes ---------------------------------------------------------------------------------------------


def _traced(
    learner: TrainState, step: Callable[[int], tuple[Tensor, Tensor]], device: torch.device
) -> tuple[dict[str, Any], float]:
    """A Chrome trace of a step, and the seconds that it took under the profiler, which has warmed up in one before."""

    def marked(rule: UpdateRule) -> Callable[..., None]:
        take = rule.step

        def step(*arguments: Any) -> None:
            with record_function(OPTIMIZER):
                take(*arguments)

        return step

    for _, rule in learner.optimizer.rules:
        rule.step = marked(rule)  # type: ignore[method-assign]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=1, active=1),
            acc_events=True,
            on_trace_ready=lambda done: done.export_chrome_trace(str(path)),
        ) as profiler:
            step(0)
            _synchronise(device)
            profiler.step()
            before = time.perf_counter()
            step(1)
            _synchronise(device)
            seconds = time.perf_counter() - before
            profiler.step()
        return json.loads(path.read_text(encoding="utf-8", errors="replace")), seconds


def _against_roof(
    trace: dict[str, Any], seconds: float, work: dict[str, float], device: torch.device
) -> dict[str, Any]:
    """By class: seconds, their share of the step, and of what `work` counts (in FLOPs) the rate and its share of the
    bfloat16 matrix product's, measured now."""
    found = breakdown(trace, device.type == "cuda")
    roof = matmul_flops(device)
    classes: dict[str, dict[str, float]] = {}
    for name, taken in [*found.seconds.items(), ("idle", max(0.0, seconds - found.busy))]:
        classes[name] = {"seconds": taken, "share": taken / seconds}
        if taken and name in work:
            classes[name] |= {"tflops": work[name] / taken / 1e12, "share_of_matmul": work[name] / taken / roof}
    return {
        "step_seconds": seconds,
        "matmul_tflops": roof / 1e12,
        "classes": classes,
        "unknown": asdict(found)["unknown"],
    }


def breakdown_table(found: dict[str, Any]) -> str:
    """In Markdown."""
    lines = ["| | ms | of the step | TFLOP/s | of a matrix product |", "| --- | --- | --- | --- | --- |"]
    for name, of in found["classes"].items():
        rate = f"{of['tflops']:,.3g} | {of['share_of_matmul']:.1%}" if "tflops" in of else "| "
        lines.append(f"| {name} | {1e3 * of['seconds']:.2f} | {of['share']:.1%} | {rate} |")
    lines.append(f"\nOne step under the profiler: {1e3 * found['step_seconds']:.1f} ms.")
    if found["unknown"]:
        named = (f"{name} ({1e3 * taken:.2f} ms)" for name, taken in found["unknown"].items())
        lines.append("other: " + ", ".join(named))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
