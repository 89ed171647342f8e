"""titanlite's Trainer as `titanlite train` builds it: the same recipe, data, guards, metrics and loop.

The loop is not touched. Only the data stands at the gate: a step begins with reading its first sample.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rules import Gate, Settings

from titanlite.checkpoint.manager import CheckpointManager
from titanlite.corpus.tokenizers import Tokens
from titanlite.data.splits import Split, open_data
from titanlite.models.spec import spec_of
from titanlite.observe.jsonl import JsonlSink
from titanlite.observe.logger import RunLogger
from titanlite.parallel.world import join_world
from titanlite.recipe.load import load_recipe
from titanlite.training.setup import Run
from titanlite.training.trainer import Trainer


@dataclass(frozen=True)
class GatedSplit(Split):
    """A split that waits at the gate before a step's first sample."""

    gate: Gate
    global_batch: int

    def sample(self, number: int) -> Tokens:
        if number % self.global_batch == 0:
            self.gate.boundary()
        return super().sample(number)


def main() -> None:
    settings = Settings.from_command_line()
    folder = Path(settings.folder)
    compile_blocks = f"--compile.enabled={str(settings.compile).lower()}"
    loaded = load_recipe(folder / "recipe.toml", [compile_blocks])
    recipe = loaded.recipe
    data = open_data(recipe.data, recipe.training.sequence_length, recipe.run.seed, validated=False)
    spec = spec_of(recipe.model.preset)
    gate = Gate(spec.parameter_count(spec.configure(recipe.model)))
    gated = GatedSplit(**vars(data.train), gate=gate, global_batch=recipe.training.global_batch)
    with join_world(recipe.run.deterministic, recipe.parallel.timeout_seconds) as world:
        logger = RunLogger()
        logger.sinks["jsonl"] = JsonlSink(folder / "metrics.jsonl", 0, logger.info)
        checkpoints = CheckpointManager(folder / "checkpoints", logger.info, world)
        Trainer(Run(recipe, loaded.text, world, replace(data, train=gated), checkpoints, logger)).train()


if __name__ == "__main__":
    main()
