"""What a run's state begins with: the values of its own checkpoint, of another run's, or initial ones.

Refuses what would train on in silence with wrong numbers: ranks that read different texts, and another text, or another
recipe, than the checkpoint's run had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from titanlite.checkpoint.format import Manifest
from titanlite.checkpoint.load import load_state
from titanlite.checkpoint.manager import BACK_TO
from titanlite.checkpoint.save import environment
from titanlite.checkpoint.storage import read_manifest, recipe_of
from titanlite.corpus.tokenizers import UNKNOWN, is_another
from titanlite.data.read_log import reordered_steps
from titanlite.errors import DataError, Finding, RecipeError
from titanlite.models.spec import spec_of
from titanlite.observe.run_folder import Start, require_same_run
from titanlite.plan.describe import WEIGHTS_DEPEND_NOT_ON, model_differences
from titanlite.recipe.paths import expand
from titanlite.training.setup import Run
from titanlite.training.train_state import TrainState

_DECIDE_SAMPLES = (
    *("data.corpus", "data.sources", "data.stages", "data.packing", "data.text_key", "data.validation_percent"),
    *("data.tokenizer", "data.separator", "data.special_tokens", "data.fim_rate", "data.fim_tokens"),
    *("training.sequence_length", "run.seed"),
)
"""Keys of the recipe that say which samples there are, and in which order; who lets one of them change means it."""
_MAY_BE_MEANT = ("model.rope_theta", "model.rope_scaling", "model.norm_eps")
"""What a run that begins with another's weights may change of the model: for a longer context, say."""


def restore(learner: TrainState, run: Run, start: Start, last: int | None = None) -> None:
    """Give all that training changes the values of the checkpoint that the run goes on from (of its own, the newest up
    to step `last`, or as `start` says), or those that it begins with; `run.progress` too.

    Called by all ranks. Raises `CheckpointError`, `DataError` and `UsageError`.
    """
    state, checkpoints, settings = learner.shards_by_name(), run.checkpoints, run.recipe.checkpoint
    snapshots = run.snapshots if last is None else None
    if not run.world.all_equal(run.data.fingerprint):
        raise DataError(
            f"rank {run.world.rank} reads another corpus than others. Every machine must see the same files "
            "(data.corpus, data.sources, data.validation; for 'python-stdlib', run the same Python)."
        )
    if start.step is not None:
        manifest: Manifest | None = checkpoints.load_chosen(start.step, state)
    else:
        manifest = checkpoints.load_latest(state, last=last, snapshots=snapshots.find(state) if snapshots else ())
    if manifest is None and settings.resume_from is not None:
        folder = checkpoints.begins_with(expand(settings.resume_from))
        way_out, theirs = "Give the new run a recipe that differs in less.", recipe_of(read_manifest(folder), folder)
        require_same_run(theirs, run.recipe, start.may_change, f"{folder} is", way_out)
        manifest = load_state(folder, state, ranks=checkpoints.ranks)
        manifest = replace(manifest, values={**manifest.values, BACK_TO: -1})  # the steps there are not this run's
    reordered = _compare_data(manifest, run, start) if manifest is not None else []
    if snapshots is not None:
        snapshots.begin_generation()  # before later checkpoints go: a later snapshot must not come back in their place
    if start.step is not None:
        checkpoints.set_aside_after(start.step)
    if manifest is not None:
        _warn_of_changes(manifest, run)
        learner.guards.resume()
    else:
        learner.initialise()
        if settings.warm_start is not None:
            folder = checkpoints.begins_with(expand(settings.warm_start))
            _require_own_weights(folder, run, start)
            weights = {name: shard for name, shard in state.items() if name.startswith("model.")}
            load_state(folder, weights, "model.", checkpoints.ranks, convert=True)
            run.logger.info(f"begins with the weights of {folder}")
    learner.guards.skips_in_a_row = run.progress.resume(manifest, reordered)


def _require_own_weights(folder: Path, run: Run, start: Start) -> None:
    """Weights of the same shapes compute something else in another model, and mean something else by another
    tokenizer: warn of what may be meant, refuse the rest unless it is allowed by name. Raises `RecipeError`.
    """
    manifest, recipe = read_manifest(folder), run.recipe
    trained = recipe_of(manifest, folder)
    changed: dict[str, tuple[Any, Any]] = {
        f"model.{key}": values
        for key, values in model_differences(trained.model, recipe.model).items()
        if key not in WEIGHTS_DEPEND_NOT_ON
    }
    before, now = (spec_of(each.preset) for each in (trained.model, recipe.model))
    fits = before.shapes(before.configure(trained.model)) == now.shapes(now.configure(recipe.model))
    if is_another(run.data.tokenizer, recorded := manifest.values.get("tokenizer")):
        keys, name = ("tokenizer", "separator", "special_tokens"), recipe.data.tokenizer
        pairs = {f"data.{key}": (getattr(trained.data, key), getattr(recipe.data, key)) for key in keys}
        old = UNKNOWN if recorded == UNKNOWN else f"{name} of other content"
        changed |= {key: pair for key, pair in pairs.items() if pair[0] != pair[1]} or {"data.tokenizer": (old, name)}
    refused = [key for key in changed if key not in _MAY_BE_MEANT and not (fits and _is_allowed(start, key))]
    lines = {key: f"{old!r} for the weights of {folder}, {new!r} here;" for key, (old, new) in changed.items()}
    if refused:
        fix = "give it the value that they were trained with"
        or_allowed = ", or, if you mean the change: --allow-change {}" if fits else ": their shapes fit no other."
        raise RecipeError([Finding(key, lines[key], fix + or_allowed.format(key)) for key in refused])
    for key, line in lines.items():
        run.logger.info(f"warning: {key}: {line} they were trained with the first.")


def _compare_data(manifest: Manifest, run: Run, start: Start) -> list[int]:
    """What was read up to the checkpoint must be what this recipe puts there, unless it may be something else. Returns
    the steps that were, or the next one that is, the first in another order of samples. Raises `DataError`.
    """
    data, written = run.data, f"the checkpoint of step {manifest.step} was written"
    own_run = "give the new one a run of its own by another run.name, or go on with it by --allow-change"
    if is_another(data.tokenizer, manifest.values.get("tokenizer")) and not _is_allowed(start, "data.tokenizer"):
        raise DataError(
            f"the tokenizer is not what it was when {written}: its file has changed, or its special tokens. "
            f"Put it back to go on with this run, {own_run} data.tokenizer."
        )
    steps, first = reordered_steps(manifest.values), manifest.step + 1
    changed = _changed(manifest, data.train.past(manifest.samples))
    texts = [key.removeprefix("text/") for key in changed if key != "order"]
    if not changed:
        return steps
    if _is_allowed(start, *_DECIDE_SAMPLES):
        warning = f"warning: from step {first} on samples come in another order: "
        run.logger.info(f"{warning}some texts may be read again, others never.")
        return sorted({*steps, first})
    if texts:
        raise DataError(
            f"the training text ({', '.join(texts)}) is not what it was when {written}: a file of it has changed (for "
            f"'python-stdlib': another Python runs). Put it back to go on with this run, {own_run} data.corpus."
        )
    tokens = manifest.samples * data.train.sources[0].sequence_length
    sizes = ", ".join(f"{each.name} = {each.windows}" for each in data.train.sources)
    raise DataError(
        f"data order changed: samples before step {manifest.step} differ from the checkpoint's, and resuming would "
        "repeat or skip data. What data.sources and data.stages change must be still to come: let the stage with "
        f"the weights so far end by until = {tokens:_}, and begin another with the new ones (without weights, "
        f"sources had those of their sizes: {sizes}). Or put the old order back, {own_run} data.corpus."
    )


def _is_allowed(start: Start, *keys: str) -> bool:
    """Whether the user lets one of these change, by --allow-change."""
    return any(fnmatchcase(key, pattern) for key in keys for pattern in start.may_change)


def _changed(manifest: Manifest, now: Mapping[str, str]) -> list[str]:
    """Keys of the manifest's values that are others now; what it says nothing of has not changed."""
    return [key for key, value in now.items() if manifest.values.get(key, value) != value]


def _warn_of_changes(manifest: Manifest, run: Run) -> None:
    """Of validation texts, whose losses then compare with later ones only, and of versions or devices that round
    otherwise: then the curve goes on, but not bit for bit.
    """
    say = run.logger.info
    if changed := _changed(manifest, run.data.validation_texts):
        names = ", ".join(key.removeprefix("validation/") for key in changed)
        say(f"warning: validation reads another text than before ({names}): its losses compare with later ones only.")
    before, here = manifest.environment, environment(run.world.device)
    changed = [f"{key} {before.get(key, 'unknown')} -> {now}" for key, now in here.items() if before.get(key) != now]
    if changed:
        say(f"warning: the checkpoint was written elsewhere ({', '.join(changed)}): numbers may round differently.")
