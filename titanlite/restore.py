"""What a run's state begins with: the values of its own checkpoint, of another run's, or initial ones.

Refuses what would train on in silence with wrong numbers: ranks that read different texts, and another text, or another
recipe, than the checkpoint's run had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from titanlite.checkpoint.examine import recipe_of
from titanlite.checkpoint.format import Manifest
from titanlite.checkpoint.manager import CheckpointManager
from titanlite.checkpoint.save import environment
from titanlite.checkpoint.snapshots import Snapshots
from titanlite.checkpoint.storage import read_manifest
from titanlite.errors import DataError
from titanlite.learner import Learner
from titanlite.models.shard import Shard
from titanlite.observe.run_folder import Start, require_same_run
from titanlite.parallel.world import World
from titanlite.recipe.sections import Recipe

_ALONE_REFUSED = "Give the new run a recipe that differs in less."


def restore(
    learner: Learner,
    state: Mapping[str, Shard],
    recipe: Recipe,
    world: World,
    checkpoints: CheckpointManager,
    snapshots: Snapshots | None,
    corpus: str,
    tokenizer: str,
    start: Start,
    say: Callable[[str], None],
) -> Manifest | None:
    """Give `state`, this rank's part of all that the learner changes, its values; the manifest of the checkpoint that
    the run goes on from, or None if it begins.

    `corpus` and `tokenizer` are the fingerprints of the training text and of what made tokens of it. Called by all
    ranks. Raises `CheckpointError`, `DataError` and `UsageError`.
    """
    _require_one_corpus(world, corpus)
    manifest = _loaded(state, recipe, checkpoints, snapshots, start)
    if manifest is not None:
        _require_same_tokenizer(manifest, tokenizer, start)
        _require_same_corpus(manifest, corpus, start)
    if snapshots is not None:
        snapshots.begin_line()  # before later checkpoints go: a later snapshot must not come back in their place
    if start.step is not None:
        checkpoints.set_aside_after(start.step)
    if manifest is not None:
        _tell_other_environment(manifest, world, say)
        learner.guards.resumed()
        return manifest
    learner.initialise()
    if recipe.checkpoint.warm_start is not None:
        weights = {name: shard for name, shard in state.items() if name.startswith("model.")}
        folder = checkpoints.begins_with(Path(recipe.checkpoint.warm_start))
        checkpoints.load_from(folder, weights, "model.", convert=True)
        say(f"begins with the weights of {folder}")
    return None


def _loaded(
    state: Mapping[str, Shard],
    recipe: Recipe,
    checkpoints: CheckpointManager,
    snapshots: Snapshots | None,
    start: Start,
) -> Manifest | None:
    if start.step is not None:
        return checkpoints.load_chosen(start.step, state)
    if snapshots is not None:
        manifest = checkpoints.load_latest(state, newer=lambda step: snapshots.load_latest(state, newer_than=step))
    else:
        manifest = checkpoints.load_latest(state)
    if manifest is not None or recipe.checkpoint.resume_from is None:
        return manifest
    folder = checkpoints.begins_with(Path(recipe.checkpoint.resume_from))
    require_same_run(recipe_of(read_manifest(folder), folder), recipe, start.may_change, f"{folder} is", _ALONE_REFUSED)
    return checkpoints.load_from(folder, state)


def _require_one_corpus(world: World, corpus: str) -> None:
    if not world.all_equal(int(corpus, 16) >> 1):
        raise DataError(
            f"rank {world.rank} reads another corpus than others. Every machine must see the same files"
            " (data.corpus; for 'python-stdlib', run the same Python)."
        )


def _require_same_tokenizer(manifest: Manifest, tokenizer: str, start: Start) -> None:
    if _differs("tokenizer", tokenizer, manifest, start):
        raise DataError(
            f"the tokenizer is not what it was when the checkpoint of step {manifest.step} was written: its file has "
            "changed, or its special tokens. Put it back to go on with this run, give the new one a run of its own by "
            "another run.name, or go on with it by --allow-change data.tokenizer --allow-change data.corpus."
        )


def _require_same_corpus(manifest: Manifest, corpus: str, start: Start) -> None:
    if _differs("corpus", corpus, manifest, start):
        raise DataError(
            f"the training text is not what it was when the checkpoint of step {manifest.step} was written: a file of "
            "data.corpus has changed (for 'python-stdlib': another Python runs). Put it back to go on with this run, "
            "give the new text a run of its own by another run.name, or go on with it by --allow-change data.corpus."
        )


def _differs(name: str, fingerprint: str, manifest: Manifest, start: Start) -> bool:
    """Whether the `data` key of this name has another fingerprint than the checkpoint's, and may not."""
    allowed = any(fnmatchcase(f"data.{name}", pattern) for pattern in start.may_change)
    return not allowed and manifest.values.get(name, fingerprint) != fingerprint


def _tell_other_environment(manifest: Manifest, world: World, say: Callable[[str], None]) -> None:
    """Other versions or devices round otherwise: the curve goes on, but not bit for bit."""
    before, here = manifest.environment, environment(world.device)
    changed = [f"{key} {before.get(key, 'unknown')} -> {now}" for key, now in here.items() if before.get(key) != now]
    if changed:
        say(f"warning: the checkpoint was written elsewhere ({', '.join(changed)}): numbers may round differently.")
