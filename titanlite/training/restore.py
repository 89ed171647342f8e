"""What a run's state begins with: the values of its own checkpoint, of another run's, or initial ones.

Refuses what would train on in silence with wrong numbers: ranks that read different texts, and another text, or another
recipe, than the checkpoint's run had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from titanlite.checkpoint.format import Manifest
from titanlite.checkpoint.manager import BACK_TO, CheckpointManager
from titanlite.checkpoint.save import environment
from titanlite.checkpoint.snapshots import Snapshots
from titanlite.checkpoint.storage import read_manifest, recipe_of
from titanlite.corpus.tokenizers import UNKNOWN, is_another
from titanlite.data.audit import reordered_steps as listed
from titanlite.data.splits import DataSplits
from titanlite.errors import DataError, Finding, RecipeError
from titanlite.models.shard import Shard
from titanlite.models.spec import spec_of
from titanlite.observe.run_folder import Start, require_same_run
from titanlite.parallel.world import World
from titanlite.plan.describe import WEIGHTS_DEPEND_NOT_ON, model_differences
from titanlite.recipe.paths import expand
from titanlite.recipe.sections import Recipe
from titanlite.training.train_state import TrainState

_DECIDE_SAMPLES = (
    *("data.corpus", "data.sources", "data.stages", "data.packing", "data.text_key", "data.validation_percent"),
    *("data.tokenizer", "data.separator", "data.special_tokens", "data.fim_rate", "data.fim_tokens"),
    *("training.sequence_length", "run.seed"),
)
"""Keys of the recipe that say which samples there are, and in which order; who lets one of them change means it."""
_MAY_BE_MEANT = ("model.rope_theta", "model.rope_scaling", "model.norm_eps")
"""What a run that begins with another's weights may change of the model: for a longer context, say."""
_ALONE_REFUSED = "Give the new run a recipe that differs in less."


def restore(
    learner: TrainState,
    state: Mapping[str, Shard],
    recipe: Recipe,
    world: World,
    checkpoints: CheckpointManager,
    snapshots: Snapshots | None,
    data: DataSplits,
    start: Start,
    say: Callable[[str], None],
    last: int | None = None,
) -> Manifest | None:
    """Give `state`, this rank's part of all that training changes, its values; the manifest of the checkpoint that
    the run goes on from (of its own, the newest up to step `last`), or None if it begins.

    Called by all ranks. Raises `CheckpointError`, `DataError` and `UsageError`.
    """
    if not world.all_equal(data.fingerprint):
        raise DataError(
            f"rank {world.rank} reads another corpus than others. Every machine must see the same files (data.corpus, "
            "data.sources, data.validation; for 'python-stdlib', run the same Python)."
        )
    if start.step is not None:
        manifest: Manifest | None = checkpoints.load_chosen(start.step, state)
    elif snapshots is not None:
        newer = snapshots.load_latest
        manifest = checkpoints.load_latest(state, newer=lambda step: newer(state, newer_than=step))
    else:
        manifest = checkpoints.load_latest(state, last=last)
    if manifest is None and recipe.checkpoint.resume_from is not None:
        manifest = _resume_from(expand(recipe.checkpoint.resume_from), state, recipe, checkpoints, start)
    if manifest is not None:
        _require_same_tokenizer(manifest, data, start)
        _require_same_order(manifest, data, start)
    if snapshots is not None:
        snapshots.begin_generation()  # before later checkpoints go: a later snapshot must not come back in their place
    if start.step is not None:
        checkpoints.set_aside_after(start.step)
    if manifest is not None:
        _warn_of_changes(manifest, data, world, say)
        learner.guards.resume()
    elif recipe.checkpoint.warm_start is None:
        learner.initialise()
    else:
        folder = checkpoints.begins_with(expand(recipe.checkpoint.warm_start))
        _require_own_weights(folder, recipe, data, start, say)
        learner.initialise()
        weights = {name: shard for name, shard in state.items() if name.startswith("model.")}
        checkpoints.load_from(folder, weights, "model.", convert=True)
        say(f"begins with the weights of {folder}")
    return manifest


def _resume_from(
    path: Path, state: Mapping[str, Shard], recipe: Recipe, checkpoints: CheckpointManager, start: Start
) -> Manifest:
    """Load another run's whole state."""
    folder = checkpoints.begins_with(path)
    require_same_run(recipe_of(read_manifest(folder), folder), recipe, start.may_change, f"{folder} is", _ALONE_REFUSED)
    loaded = checkpoints.load_from(folder, state)
    return replace(loaded, values={**loaded.values, BACK_TO: -1})  # the steps there are not this run's


def _require_own_weights(
    folder: Path, recipe: Recipe, data: DataSplits, start: Start, say: Callable[[str], None]
) -> None:
    """Weights of the same shapes compute something else in another model, and mean something else by another
    tokenizer: warn of what may be meant, refuse the rest unless it is allowed by name. Raises `RecipeError`.
    """
    manifest = read_manifest(folder)
    trained = recipe_of(manifest, folder)
    changed: dict[str, tuple[Any, Any]] = {
        f"model.{key}": values
        for key, values in model_differences(trained.model, recipe.model).items()
        if key not in WEIGHTS_DEPEND_NOT_ON
    }
    before, now = (spec_of(each.preset) for each in (trained.model, recipe.model))
    fits = before.shapes(before.configure(trained.model)) == now.shapes(now.configure(recipe.model))
    if is_another(data.tokenizer, recorded := manifest.values.get("tokenizer")):
        keys, name = ("tokenizer", "separator", "special_tokens"), recipe.data.tokenizer
        pairs = {f"data.{key}": (getattr(trained.data, key), getattr(recipe.data, key)) for key in keys}
        old = UNKNOWN if recorded == UNKNOWN else f"{name} of other content"
        changed |= {key: pair for key, pair in pairs.items() if pair[0] != pair[1]} or {"data.tokenizer": (old, name)}
    refused = [
        key
        for key in changed
        if key not in _MAY_BE_MEANT and not (fits and any(fnmatchcase(key, pattern) for pattern in start.may_change))
    ]
    lines = {key: f"{old!r} for the weights of {folder}, {new!r} here;" for key, (old, new) in changed.items()}
    if refused:
        fix = "give it the value that they were trained with"
        or_allowed = ", or, if you mean the change: --allow-change {}" if fits else ": their shapes fit no other."
        raise RecipeError([Finding(key, lines[key], fix + or_allowed.format(key)) for key in refused])
    for key, line in lines.items():
        say(f"warning: {key}: {line} they were trained with the first.")


def reordered_steps(manifest: Manifest | None, data: DataSplits, say: Callable[[str], None]) -> list[int]:
    """The steps that were the first in another order of samples than the step before, up to the one after the
    checkpoint. The state itself lists them: what it is that led to it.
    """
    if manifest is None:
        return []
    steps = listed(manifest.values)
    if not _changed(manifest, data.train.past(manifest.samples)):
        return steps
    first = manifest.step + 1
    say(f"warning: from step {first} on samples come in another order: some texts may be read again, others never.")
    return sorted({*steps, first})


def _require_same_tokenizer(manifest: Manifest, data: DataSplits, start: Start) -> None:
    changed = is_another(data.tokenizer, manifest.values.get("tokenizer"))
    if changed and not any(fnmatchcase("data.tokenizer", pattern) for pattern in start.may_change):
        raise DataError(
            f"the tokenizer is not what it was when the checkpoint of step {manifest.step} was written: its file has "
            "changed, or its special tokens. Put it back to go on with this run, give the new one a run of its own by "
            "another run.name, or go on with it by --allow-change data.tokenizer."
        )


def _require_same_order(manifest: Manifest, data: DataSplits, start: Start) -> None:
    """What was read up to the checkpoint must be what this recipe puts there. Raises `DataError`."""
    if any(fnmatchcase(key, pattern) for key in _DECIDE_SAMPLES for pattern in start.may_change):
        return
    changed = _changed(manifest, data.train.past(manifest.samples))
    texts = [key.removeprefix("text/") for key in changed if key != "order"]
    way_out = "give the new one a run of its own by another run.name, or go on with it by --allow-change data.corpus."
    if texts:
        raise DataError(
            f"the training text ({', '.join(texts)}) is not what it was when the checkpoint of step {manifest.step} "
            "was written: a file of it has changed (for 'python-stdlib': another Python runs). Put it back to go on "
            f"with this run, {way_out}"
        )
    if changed:
        tokens = manifest.samples * data.train.sources[0].sequence_length
        sizes = ", ".join(f"{each.name} = {each.windows}" for each in data.train.sources)
        raise DataError(
            f"data order changed: samples before step {manifest.step} differ from the checkpoint's, and resuming would "
            "repeat or skip data. What data.sources and data.stages change must be still to come: let the stage with "
            f"the weights so far end by until = {tokens:_}, and begin another with the new ones (without weights, "
            f"sources had those of their sizes: {sizes}). Or put the old order back, {way_out}"
        )


def _changed(manifest: Manifest, now: Mapping[str, str]) -> list[str]:
    """Keys of the manifest's values that are others now; what it says nothing of has not changed."""
    return [key for key, value in now.items() if manifest.values.get(key, value) != value]


def _warn_of_changes(manifest: Manifest, data: DataSplits, world: World, say: Callable[[str], None]) -> None:
    """Of validation texts, whose losses then compare with later ones only, and of versions or devices that round
    otherwise: then the curve goes on, but not bit for bit.
    """
    if changed := _changed(manifest, data.validation_texts):
        names = ", ".join(key.removeprefix("validation/") for key in changed)
        say(f"warning: validation reads another text than before ({names}): its losses compare with later ones only.")
    before, here = manifest.environment, environment(world.device)
    changed = [f"{key} {before.get(key, 'unknown')} -> {now}" for key, now in here.items() if before.get(key) != now]
    if changed:
        say(f"warning: the checkpoint was written elsewhere ({', '.join(changed)}): numbers may round differently.")
