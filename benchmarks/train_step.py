"""Tokens/s, MFU and peak memory of a full training step of any preset, on random tokens.

python benchmarks/train_step.py --preset llama3.2-1b --sequence 8192 --compile        # one JSON object on stdout
python benchmarks/train_step.py --preset debug --sequence 128 --steps 3               # small, for a CPU
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from titanlite.data.loader import Batch
from titanlite.models.init import initialise
from titanlite.models.spec import spec_of
from titanlite.observe.flops import mfu, peak_flops
from titanlite.observe.metrics import peak_memory_bytes
from titanlite.optim.build import Weights, build_optimizer
from titanlite.optim.clip import clip_gradients
from titanlite.parallel.compiled import compile_units
from titanlite.parallel.program import PlainLoop, Program
from titanlite.parallel.shards import Shards
from titanlite.parallel.world import World
from titanlite.precision.casting import compute_dtype, master_dtype
from titanlite.recipe.sections import Model, Optimizer, Precision, Resilience
from titanlite.resilience.guards import Guards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama3.2-1b")
    parser.add_argument("--sequence", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=1, help="sequences in one microbatch")
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--compute", default="bfloat16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments)))


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Median step over `steps`, after `warmup` steps that allocate and compile."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = Precision(compute=arguments.compute)
    spec = spec_of(arguments.preset)
    config = spec.configure(Model(preset=arguments.preset))
    with device:
        model = spec.build(config, compute_dtype(precision)).to(master_dtype(precision))
    initialise(Shards.of(model).table, lambda name: spec.initial_std(config, name), 0)
    if arguments.compile:
        compile_units(model, spec)
    optimizer = build_optimizer(Optimizer(name=arguments.optimizer), spec, Weights.of(model), compute_dtype(precision))
    program, guards = (
        Program(model, World(0, 1, device), Shards.of(model), PlainLoop(model)),
        Guards(Resilience(), device),
    )
    parameters = list(model.parameters())
    batch = _random_batch(arguments, config.vocab_size, device)

    seconds = []
    for step in range(1, arguments.warmup + arguments.steps + 1):
        _synchronise(device)
        before = time.perf_counter()
        loss = program.forward_backward(batch)
        norm = clip_gradients(parameters, 1.0)
        optimizer.step(1.0, guards.judge(step, loss, norm))
        model.zero_grad(set_to_none=True)
        _synchronise(device)
        seconds.append(time.perf_counter() - before)
    median = statistics.median(seconds[arguments.warmup :])
    tokens_per_second = batch.valid_tokens / median
    flops = spec.flops_per_token(config, arguments.sequence)
    card = torch.cuda.get_device_name() if device.type == "cuda" else ""
    return {
        **vars(arguments),
        "device": card or "cpu",
        "parameters": spec.parameter_count(config),
        "first_step_seconds": seconds[0],
        "step_seconds_median": median,
        "tokens_per_second": tokens_per_second,
        "tflops": tokens_per_second * flops / 1e12,
        "mfu": mfu(tokens_per_second, flops, peak_flops(card)),
        "memory_peak_gib": peak_memory_bytes(device) / 2**30,
        "loss": loss.item(),
    }


def _random_batch(arguments: argparse.Namespace, vocab_size: int, device: torch.device) -> Batch:
    shape = (arguments.microbatches, arguments.batch, arguments.sequence)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab_size, (*shape[:2], arguments.sequence + 1), generator=generator).to(device)
    sequences = arguments.microbatches * arguments.batch
    return Batch(
        tokens=tokens[..., :-1].contiguous(),
        labels=tokens[..., 1:].contiguous(),
        positions=None,
        documents=None,
        samples=tuple(range(sequences)),
        sequences=sequences,
        valid_tokens=sequences * arguments.sequence,
    )


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
