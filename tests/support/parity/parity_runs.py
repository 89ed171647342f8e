"""One training run of a small model, as the parity tests compare it: losses, gradient norms, final weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import support.mixture  # noqa: F401 - registers the family
from support.runs import Curve, KeptRows
from titanlite.checkpoint.manager import CheckpointManager
from titanlite.checkpoint.snapshots import Snapshots
from titanlite.data.splits import open_data
from titanlite.errors import StoppedEarly
from titanlite.models.init import initialise
from titanlite.models.shard import Shard
from titanlite.models.spec import spec_of
from titanlite.observe.logger import RunLogger
from titanlite.observe.run_folder import GO_ON, Start
from titanlite.parallel.apply import build
from titanlite.parallel.ranks import Ranks
from titanlite.parallel.shards import Shards
from titanlite.parallel.world import World
from titanlite.recipe.load import to_toml
from titanlite.recipe.sections import Recipe
from titanlite.training.setup import Run
from titanlite.training.trainer import Trainer

Part = tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]
"""Name, offset in the whole, shape of the whole, values."""


def write_corpus(path: Path) -> str:
    """A few sentences, each another; returns the path."""
    # With characters beyond ASCII: their bytes are tokens in the upper half of the vocabulary.
    path.write_text("".join(f"{n}³ = {n**3}, and √{n} is {n**0.5:.3f} – é.\n" for n in range(400)), encoding="utf-8")
    return str(path)


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


def train(rank: int, world: int, recipe_json: str, folder: str | None = None) -> tuple[Curve, list[Part]]:
    """Run it (from the checkpoint in `folder`, if there is one); the curve, and what this rank holds of the weights."""
    with open_trainer(rank, world, recipe_json, folder) as (trainer, kept):
        trainer.train()
    return kept.curve(), _held(trainer.state.shards)


def train_until_stopped(rank: int, world: int, recipe_json: str, folder: str, memory: str | None = None) -> list[Part]:
    """What this rank holds of the state, all of it, that the last checkpoint in `folder` is of, and the last snapshot
    in `memory`.
    """
    with open_trainer(rank, world, recipe_json, folder, memory=memory) as (trainer, _), suppress(StoppedEarly):
        trainer.train()
    return _parts(trainer.state.shards_by_name())


def train_on(
    rank: int,
    world: int,
    recipe_json: str,
    may_change: tuple[str, ...] = (),
    folder: str | None = None,
    memory: str | None = None,
) -> tuple[list[Part], Curve, list[Part]]:
    """What this rank holds of the state that the run begins with; then as `train`."""
    with open_trainer(rank, world, recipe_json, folder, Start(may_change=may_change), memory) as (trainer, kept):
        begun = _parts(trainer.state.shards_by_name())
        trainer.train()
    return begun, kept.curve(), _held(trainer.state.shards)


@contextmanager
def open_trainer(
    rank: int, world: int, recipe_json: str, folder: str | None = None, start: Start = GO_ON, memory: str | None = None
) -> Iterator[tuple[Trainer, KeptRows]]:
    """`memory`: where the two machines that the ranks are on have a folder each, which stays as if they had crashed."""
    recipe = Recipe.model_validate_json(recipe_json)
    data = open_data(recipe.data, recipe.training.sequence_length, recipe.run.seed)
    logger, kept = RunLogger(), KeptRows()
    logger.sinks["kept"] = kept
    with _shared_folder(world) as scratch:
        checkpoints = CheckpointManager(Path(folder or scratch), print, Ranks(rank, world))
        snapshots = None
        if memory is not None:
            machine = Path(memory) / str(2 * rank // world)
            machine.mkdir(parents=True, exist_ok=True)
            checkpoints.folder.mkdir(exist_ok=True)
            snapshots = Snapshots(machine, checkpoints.folder, print, Ranks(rank, world))
            snapshots.prepare()
            snapshots.close = lambda: None  # type: ignore[method-assign]
        place = World(rank, world, torch.device("cpu"))
        run = Run(recipe, to_toml(recipe), place, data, checkpoints, logger, start, snapshots=snapshots)
        yield Trainer(run), kept


def _held(shards: Shards) -> list[Part]:
    return _parts({**shards.table, **shards.buffers})


def _parts(table: Mapping[str, Shard]) -> list[Part]:
    return [(name, shard.offset, shard.shape, shard.tensor.detach().clone()) for name, shard in table.items()]


def assemble(parts: Iterable[Part]) -> dict[str, torch.Tensor]:
    """The whole tensors from what all ranks of a run hold of them, copies being equal."""
    whole: dict[str, torch.Tensor] = {}
    held: dict[str, torch.Tensor] = {}
    for name, offset, shape, values in parts:
        tensor = whole.setdefault(name, values.new_empty(shape))
        known = held.setdefault(name, torch.zeros(shape, dtype=torch.bool))
        box = tuple(slice(start, start + size) for start, size in zip(offset, values.shape, strict=True))
        assert torch.equal(tensor[box][known[box]], values[known[box]]), f"two ranks hold different values of {name}"
        tensor[box] = values
        known[box] = True
    assert all(known.all() for known in held.values()), "some values are held by no rank"
    return whole


@contextmanager
def _shared_folder(world: int) -> Iterator[str]:
    """A temporary folder, the same on all ranks."""
    with tempfile.TemporaryDirectory() as folder:
        folders = [folder]
        if world > 1:
            dist.broadcast_object_list(folders)
        yield folders[0]
        if world > 1:
            dist.barrier()


def table_of(model: torch.nn.Module) -> dict[str, Shard]:
    """A whole model's parameters."""
    return {name: Shard.whole(parameter.detach()) for name, parameter in model.named_parameters()}


def initial_weights(rank: int, world: int, recipe_json: str) -> list[Part]:
    """What this rank holds of a model that was just built and filled."""
    recipe = Recipe.model_validate_json(recipe_json)
    spec = spec_of(recipe.model.preset)
    config = spec.configure(recipe.model)
    model = build(spec, config, recipe, World(rank, world, torch.device("cpu")))
    initialise(model.shards.table, lambda name: spec.initial_std(config, name), recipe.run.seed)
    return _held(model.shards)
