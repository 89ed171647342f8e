"""One training run of a small model, as the parity tests compare it: losses, gradient norms, final weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from titanlite.checkpoint.manager import CheckpointManager
from titanlite.data.splits import open_data
from titanlite.observe.journal import Journal
from titanlite.observe.rows import Row
from titanlite.parallel.world import World
from titanlite.recipe.load import to_toml
from titanlite.recipe.sections import Recipe
from titanlite.trainer import Trainer

Curve = dict[str, list[float]]


class _Kept:
    """A sink that keeps the rows."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def write(self, row: Row) -> None:
        self.rows.append(row)

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def small_recipe(corpus: str, **sections: dict[str, Any]) -> Recipe:
    """Five layers, six heads, three of keys and values; six steps in float64, logged each."""
    values: dict[str, dict[str, Any]] = {
        "model": {
            "preset": "debug", "dim": 36, "layers": 5, "heads": 6, "kv_heads": 3, "ffn_dim": 50, "vocab_size": 259,
        },
        "data": {"corpus": corpus, "validation_percent": 10.0},
        "training": {"steps": 6, "sequence_length": 24, "global_batch": 8},
        "validation": {"every_steps": 3, "sequences": 5},
        "optimizer": {"lr": 1e-2},
        "precision": {"compute": "float64"},
        "metrics": {"log_every": 1, "tensorboard": False},
    }  # fmt: skip
    for name, keys in sections.items():
        values[name] = {**values.get(name, {}), **keys}
    return Recipe.model_validate(values)


def train(rank: int, world: int, recipe_json: str, folder: str | None = None) -> tuple[Curve, dict[str, torch.Tensor]]:
    """Run it (from the checkpoint in `folder`, if there is one); what the run gave, the same on every rank."""
    recipe = Recipe.model_validate_json(recipe_json)
    data = open_data(recipe.data, recipe.training.sequence_length, recipe.run.seed)
    journal, kept = Journal(), _Kept()
    journal.add(kept)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoints = CheckpointManager(Path(folder or scratch), None, print)
        checkpoints.prepare()
        place = World(rank, world, torch.device("cpu"))
        trainer = Trainer(recipe, to_toml(recipe), place, data, checkpoints, journal)
        trainer.run()
    keys = ("loss", "grad_norm", "validation_loss", "bits_per_byte")
    curve = {key: [row[key] for row in kept.rows if key in row] for key in keys}
    return curve, {
        name: tensor.detach().clone() for name, tensor in trainer.shards.whole(trainer.weights, keep=True).items()
    }


def train_with_fault(rank: int, world: int, fault: str, recipe_json: str) -> tuple[Curve, dict[str, torch.Tensor]]:
    """`train`, with one of the mistakes that the parity tests are there to find."""
    import pytest
    from torch.distributed.fsdp import FSDPModule

    from titanlite import trainer
    from titanlite.optim.clip import clip_gradients
    from titanlite.parallel.program import Program
    from titanlite.parallel.shards import Shard, Shards

    with pytest.MonkeyPatch.context() as patch:
        if fault == "gradients are means":
            set_factor = FSDPModule.set_gradient_divide_factor
            patch.setattr(FSDPModule, "set_gradient_divide_factor", lambda self, _: set_factor(self, 2.0))
        elif fault == "a microbatch is dropped":
            token_losses = Program._token_losses

            def dropped(self: Program, batch: Any, index: int) -> torch.Tensor:
                return token_losses(self, batch, index) * (0.0 if index == 1 else 1.0)

            patch.setattr(Program, "_token_losses", dropped)
        elif fault == "a rank begins with another's rows":
            shard = Shards._shard

            def shifted(self: Shards, parameter: torch.nn.Parameter) -> Shard:
                right = shard(self, parameter)
                return Shard(right.rows, max(right.first - 1, 0), right.shape)

            patch.setattr(Shards, "_shard", shifted)
        else:
            patch.setattr(trainer, "clip_gradients", lambda tensors, norm, **_: clip_gradients(tensors, norm))
        return train(rank, world, recipe_json)
