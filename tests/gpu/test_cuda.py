"""What only a CUDA device can show: the CPU's numbers, no host sync in a step, compiled blocks, bitwise resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.whole import shards_of

import titanlite.models.loss
from titanlite.cli.main import run_command
from titanlite.cli.train import main
from titanlite.data.loader import train_loader
from titanlite.data.splits import open_data
from titanlite.models.init import initialise
from titanlite.models.llama_spec import PRESETS, SPEC, initial_std
from titanlite.optim.base import Weights, optimizer_spec
from titanlite.parallel.model import GradientAccumulation, ParallelModel, no_sync
from titanlite.parallel.world import World
from titanlite.plan.layout import BatchPlan
from titanlite.recipe.sections import Data, Optimizer, Recipe
from titanlite.training.step import take_step
from titanlite.training.train_state import TrainState

pytestmark = pytest.mark.gpu

CONFIG = PRESETS["debug"]


def losses(device: str, dtype: torch.dtype, optimizer_name: str, steps: int = 6, compiled: bool = False) -> list[float]:
    """The curve of a few steps on the embedded corpus, in two microbatches."""
    from titanlite.parallel.units import compile_units

    model = SPEC.build(CONFIG, dtype).to(torch.promote_types(dtype, torch.float32))
    initialise(shards_of(model).table, lambda name: initial_std(CONFIG, name), 0)
    model.to(device)
    if compiled:
        compile_units(model, SPEC, tokens=4 * 128)
    weights, recipe = Weights(dict(model.named_parameters())), Recipe(optimizer=Optimizer(name=optimizer_name, lr=3e-3))
    optimizer = optimizer_spec(optimizer_name).build(recipe, SPEC, weights, dtype)
    passes = GradientAccumulation(model, no_sync)
    parallel = ParallelModel(model, World(0, 1, torch.device(device)), shards_of(model), passes)
    plan = BatchPlan(global_batch=8, data_ranks=1, data_rank=0, microbatch=4)
    curve = []
    for batch in train_loader(open_data(Data(), 128, 0).train, plan, range(0, 8 * steps, 8)):
        valid = torch.tensor(float(batch.valid_tokens), dtype=torch.float64, device=device)
        loss = parallel.forward_backward(batch.to(torch.device(device)), valid)
        norm = parallel.shards.clip_gradients(1.0)
        for lr, rule in optimizer.rules:
            rule.step(lr, torch.isfinite(norm))
        model.zero_grad(set_to_none=True)
        curve.append(loss.item())
    return curve


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_curve_is_the_cpus_in_float64(optimizer: str) -> None:
    assert losses("cuda", torch.float64, optimizer) == pytest.approx(losses("cpu", torch.float64, optimizer), rel=1e-9)


@pytest.mark.parametrize("compiled", [False, True])
def test_bfloat16_follows_float32(compiled: bool) -> None:
    exact = losses("cuda", torch.float32, "adamw")
    assert losses("cuda", torch.bfloat16, "adamw", compiled=compiled) == pytest.approx(exact, rel=1e-2)


FLOAT8 = {"precision": {"float8": {"enabled": True, "min_size": 0}}}
COMPILED = {"compile": {"enabled": True}}


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("sections", [{}, FLOAT8, COMPILED, FLOAT8 | COMPILED], ids=str)
def test_a_step_does_not_wait_for_the_device(
    sections: dict[str, Any], chunks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With kernels where the recipe chooses them, and with head and loss by chunks."""
    if chunks:
        monkeypatch.setattr(titanlite.models.loss, "LARGE_LOGITS", 0)
    base = {
        "training": {"steps": 4, "global_batch": 8, "sequence_length": 128},
        "optimizer": {"name": "muon"},
        "resilience": {"on_spike": "skip", "spike_window": 8},
    }
    recipe, device = Recipe.model_validate(base | sections), torch.device("cuda")
    learner = TrainState(recipe, World(0, 1, device))
    learner.initialise()
    plan = BatchPlan(global_batch=8, data_ranks=1, data_rank=0, microbatch=4)
    loader = train_loader(open_data(recipe.data, 128, 0).train, plan, range(0, 32, 8), pin_memory=True)
    for step, batch in enumerate(loader, 1):
        if step == 4:  # the first steps allocate, compile and autotune
            torch.cuda.set_sync_debug_mode("error")
        try:
            take_step(learner, step, batch.to(device), 1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[run]\noutput_dir = "{tmp_path}"\ndeterministic = true\n[training]\nsteps = 12\n[metrics]\nlog_every = 1\n'
    )

    def run(*arguments: str) -> int:
        return run_command(main, [str(recipe), *arguments])

    assert run("--run.name=whole") == 0
    assert run("--run.name=parts", "--run.stop_after_step=5") == 75
    assert run("--run.name=parts") == 0
    curves = [
        [(row["step"], row["loss"], row["grad_norm"]) for row in map(json.loads, lines) if "loss" in row]
        for lines in ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts"))
    ]
    assert len(curves[0]) == 12 and curves[0] == curves[1]
