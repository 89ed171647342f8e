"""Graph breaks and recompilations of real training steps on the CPU, of a small model in each mode."""

from __future__ import annotations

from functools import cache
from unittest.mock import patch

import torch
from torch import nn
from torch._dynamo.utils import counters
from train_step import random_batch

from titanlite.parallel.world import World
from titanlite.recipe.sections import Recipe
from titanlite.training.step import take_step
from titanlite.training.train_state import TrainState

STEPS = 4
MODEL = {"dim": 128, "layers": 2, "heads": 8, "kv_heads": 8, "ffn_dim": 256}  # what 8 ranks can divide, in float8 too


@cache
def count_recompiles(precision: str, recompute: str, tp: int) -> tuple[int, int]:
    """Graph breaks in titanlite's training steps of that mode, and compilations after the second step."""
    float8 = {"float8": {"enabled": True, "recipe": precision, "min_size": 0}}
    recipe = Recipe.model_validate(
        {
            "model": MODEL,
            "training": {"sequence_length": 64, "global_batch": 4, "microbatch": 2},
            "parallel": {"tp": tp},
            "precision": {} if precision == "bf16" else float8,
            "recompute": {"mode": recompute},
            "compile": {"enabled": True},
        }
    )
    torch._dynamo.reset()
    counters.clear()
    compile_module = nn.Module.compile

    def compile_without_inductor(module: nn.Module, **settings: object) -> None:
        compile_module(module, **{**settings, "backend": "aot_eager"})

    with patch.object(nn.Module, "compile", compile_without_inductor):
        state = TrainState(recipe, World(0, tp, torch.device("cpu")))
        state.initialise()
        compiled = []
        for step in range(1, STEPS + 1):
            take_step(state, step, random_batch(recipe, state.config.vocab_size, tp), 1.0)
            compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[1] > 0, "nothing was compiled"
    return sum(counters["graph_break"].values()), compiled[-1] - compiled[1]
