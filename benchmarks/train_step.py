"""Tokens/s, MFU and peak memory of a full training step of any recipe, on random tokens; one JSON object on stdout.

python benchmarks/train_step.py --compile.enabled=true --precision.float8.enabled=true
python benchmarks/train_step.py --model.preset=debug --training.sequence_length=128 --steps 3      # small, for a CPU

Any key of a recipe may be given; the others are those of `train_step.toml`. What runs is the trainer's own `Learner`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from titanlite.check import checked
from titanlite.data.loader import Batch
from titanlite.learner import Learner
from titanlite.observe.flops import mfu, peak_flops
from titanlite.observe.metrics import peak_memory_bytes
from titanlite.parallel.layout import agreed_layout, batch_plan
from titanlite.parallel.world import World
from titanlite.recipe.load import load_recipe, parse_with_overrides
from titanlite.recipe.sections import Recipe

BASE = Path(__file__).with_suffix(".toml")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warmup", type=int, default=3, help="steps that allocate and compile")
    parser.add_argument("--steps", type=int, default=10, help="steps that are measured")
    arguments, overrides = parse_with_overrides(parser, argv)
    loaded = load_recipe(BASE, overrides)
    checked(loaded, 1)
    print(json.dumps({"overrides": overrides, **measure(loaded.recipe, arguments.warmup, arguments.steps)}))


def measure(recipe: Recipe, warmup: int, steps: int) -> dict[str, object]:
    """Median step over `steps`, after `warmup` steps."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    learner = Learner(recipe, World(0, 1, device))
    learner.initialise()
    batch = _random_batch(recipe, learner.config.vocab_size).to(device)

    seconds = []
    for step in range(1, warmup + steps + 1):
        _synchronise(device)
        before = time.perf_counter()
        loss, _ = learner.step(step, batch, 1.0)
        _synchronise(device)
        seconds.append(time.perf_counter() - before)
    median = statistics.median(seconds[warmup:])
    tokens_per_second = batch.valid_tokens / median
    flops = learner.spec.flops_per_token(learner.config, recipe.training.sequence_length)
    card = torch.cuda.get_device_name() if device.type == "cuda" else ""
    return {
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


def _random_batch(recipe: Recipe, vocab_size: int) -> Batch:
    plan = batch_plan(recipe, agreed_layout(recipe.parallel, 1), 0)
    shape, length = (plan.microbatches, plan.microbatch), recipe.training.sequence_length
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab_size, (*shape, length + 1), generator=generator)
    return Batch(
        tokens=tokens[..., :-1].contiguous(),
        labels=tokens[..., 1:].contiguous(),
        positions=None,
        documents=None,
        samples=tuple(range(plan.global_batch)),
        sequences=plan.global_batch,
        valid_tokens=plan.global_batch * length,
    )


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1:])
