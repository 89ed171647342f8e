"""Rules about the run, its model and its data: amounts, names, sizes, schedules, sources. No file of data is opened."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from titanlite.corpus.tokenizers import separator_warning, tokenizer_of
from titanlite.errors import Finding, UsageError, warning
from titanlite.models.spec import spec_of
from titanlite.optim.base import OPTIMIZERS, optimizer_spec
from titanlite.optim.schedules import SCHEDULES, lr_factor, schedule_named
from titanlite.plan.kernels import KERNELS
from titanlite.plan.layout import ceil_div, divisors, sample_schedule, total_steps
from titanlite.plan.sinks import SINKS
from titanlite.recipe.paths import expand
from titanlite.recipe.sections import Recipe
from titanlite.registry import Registry, did_you_mean
from titanlite.text import format_count, join_choices

MOST_STEPS = 2**32  # records of what is read (`data/read_log.py`) have 32 bits for a step
_SPARE_ROWS = 1024  # a smaller vocabulary costs nothing, whatever uses it


def find_model(recipe: Recipe) -> tuple[Any, Any]:
    """The model's family and sizes; None for an unknown preset, which the rule `names` reports."""
    try:
        spec = spec_of(recipe.model.preset)
    except UsageError:
        return None, None
    return spec, spec.configure(recipe.model)


def amount(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Exactly one of steps and tokens, and no more steps than can be recorded."""
    training = recipe.training
    if training.steps is None and training.tokens is None:
        fix = 'give training.steps, or training.tokens such as "2M".'
        yield Finding("training", "neither steps nor tokens is given, so the run has no end;", fix)
    elif training.steps is not None and training.tokens is not None:
        problem = f"steps = {training.steps} and tokens = {training.tokens} are both given;"
        yield Finding("training.tokens", problem, "give one of the two.")
    elif total_steps(training) >= MOST_STEPS:
        key = "training.steps" if training.tokens is None else "training.tokens"
        yield Finding(key, f"the run would have {total_steps(training):,} steps;", f"give fewer than {MOST_STEPS:,}.")


def names(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Optimizer, schedule, metrics sinks, kernels and the preset are registered."""
    chosen: list[tuple[str, Registry, str]] = [
        ("optimizer.name", OPTIMIZERS, recipe.optimizer.name),
        ("schedule.name", SCHEDULES, recipe.schedule.name),
        *(("metrics.sinks", SINKS, name) for name in recipe.metrics.sinks),
        *((f"kernels.{each}", known, getattr(recipe.kernels, each) or "auto") for each, known in KERNELS.items()),
    ]
    for key, registry, name in chosen:
        if name not in registry and not (key.startswith("kernels.") and name in ("auto", "torch")):
            hint = did_you_mean(name, list(registry)) or f"known: {', '.join(registry)}."
            yield Finding(key, f"there is no {registry.kind} '{name}';", hint)
    try:
        spec_of(recipe.model.preset)
    except UsageError as error:
        yield Finding("model.preset", str(error))


def heads(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Heads divide the width evenly, key and value heads divide the heads."""
    _, config = find_model(recipe)
    if config is None:
        return
    if config.heads % config.kv_heads:
        problem = f"{config.heads} heads cannot share {config.kv_heads} key and value heads evenly;"
        yield Finding("model.kv_heads", problem, f"choose {join_choices(divisors(config.heads))}.")
    if config.dim % config.heads:
        fix = f"choose a multiple of {config.heads}, such as {ceil_div(config.dim, config.heads) * config.heads}."
        yield Finding("model.dim", f"dim {config.dim} is not a multiple of the {config.heads} heads;", fix)
    elif config.head_dim % 2:
        problem = f"rotary embeddings turn pairs, and the head size {config.dim} / {config.heads} is odd;"
        yield Finding("model.heads", problem, "choose heads such that dim / heads is even.")


def windows(recipe: Recipe, world: int) -> Iterator[Finding]:
    """A pattern of windows is repeated evenly over the layers; a window is shorter than the sequence."""
    _, config = find_model(recipe)
    if config is None:
        return
    length, longest = recipe.training.sequence_length, max(config.window, default=0)
    if len(config.window) > 1 and config.layers % len(config.window):
        problem = f"a pattern of {len(config.window)} windows does not repeat evenly over {config.layers} layers;"
        yield Finding("model.window", problem, f"give {join_choices(divisors(config.layers))} windows.")
    if longest >= length:
        problem = f"a window of {longest} tokens holds all of training.sequence_length {length};"
        yield warning("model.window", problem, f"write 0 for all tokens, or less than {length}.")


def rope(recipe: Recipe, world: int) -> Iterator[Finding]:
    """The two bounds of the frequency scaling are in order."""
    scaling = recipe.model.rope_scaling
    if scaling is not None and scaling.low_freq_factor >= scaling.high_freq_factor:
        problem = f"{scaling.low_freq_factor:g} must be below high_freq_factor {scaling.high_freq_factor:g};"
        yield Finding("model.rope_scaling.low_freq_factor", problem, "Llama 3.1 has 1 and 4.")


def vocabulary(recipe: Recipe, world: int) -> Iterator[Finding]:
    """The tokenizer is there, its separator ends texts, and each of its tokens has a row in the embedding."""
    try:
        tokenizer = tokenizer_of(recipe.data)
    except UsageError as error:
        yield Finding("data.tokenizer", str(error))
        return
    if finding := separator_warning(tokenizer, recipe.data.separator):
        yield finding
    _, config = find_model(recipe)
    tokens = tokenizer.vocab_size
    rows, enough = config.vocab_size if config else tokens, ceil_div(tokens, 16) * 16
    problem = f"the tokenizer '{recipe.data.tokenizer}' has {tokens:,} tokens, and the vocabulary {rows:,} rows"
    if rows < tokens:
        yield Finding("model.vocab_size", f"{problem};", f"write {enough}, which is also a multiple of 16.")
    elif rows > max(_SPARE_ROWS, 2 * tokens):
        fix = f"name the model's own tokenizer, or write model.vocab_size = {enough}."
        yield warning("data.tokenizer", f"{problem}, most of them never read or trained;", fix)


def ranges(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Each number keeps its value in the format that it is used in: what the optimizer takes in the weights' own,
    all others in float32, which bfloat16 has the range of."""
    wide = recipe.precision.compute == "float64"
    for key, value in _floats(recipe.model_dump()):
        name = "float64" if wide and key.startswith("optimizer.") else "float32"
        least, most, unit = _FORMATS[name]
        if key == "optimizer.eps" and value < math.sqrt(least):
            problem = f"{value:g} is too small in {name}: where a gradient's square is 0, it divides by eps alone;"
            yield Finding(key, problem, f"write at least {math.sqrt(least):.2g}; 1e-8 is usual.")
        elif 0 < value < least or value > most:
            problem = f"{value:g} becomes {'0' if value < 1 else 'infinite'} in {name}, which it is used in;"
            yield Finding(key, problem, f"write a number from {least:.3g} to {most:.3g}.")
        elif key.startswith("optimizer.") and 0 < 1 - value < unit:
            problem = f"{value!r} becomes 1 in {name}: nothing new would count;"
            yield Finding(key, problem, f"write {1 - unit!r} at most.")


_FORMATS = {"float32": (2.0**-126, (2 - 2.0**-23) * 2.0**127, 2.0**-24), "float64": (2.0**-1022, math.inf, 2.0**-53)}
"""Smallest normal number, largest one, and the distance from 1 to the next number below."""


def _floats(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every floating-point number of a dumped recipe; those of an array by its key, those of tables by theirs."""
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, tuple):
        for each in value:
            yield from _floats(each, key)
    elif isinstance(value, list | dict):
        for name, each in enumerate(value) if isinstance(value, list) else value.items():
            yield from _floats(each, f"{key}.{name}" if key else str(name))


def decay_rate(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Weight decay shrinks weights; it must not flip their sign."""
    optimizer = recipe.optimizer
    if optimizer.name not in OPTIMIZERS:
        return
    for name in optimizer_spec(optimizer.name).rates:
        key, rate = f"optimizer.{name}", getattr(optimizer, name)
        if rate * optimizer.weight_decay >= 1:
            problem = f"{rate:g} x weight_decay {optimizer.weight_decay:g} >= 1: a step would wipe out or flip weights;"
            yield Finding(key, problem, "lower one of the two.")


def paths(recipe: Recipe, world: int) -> Iterator[Finding]:
    """`~` and `~user` are homes on this machine, and no key names a path twice; `vocabulary` opens the tokenizer."""
    data, saved = recipe.data, recipe.checkpoint
    named: dict[str, str | list[str] | None] = {
        **{"run.output_dir": recipe.run.output_dir, "resilience.snapshot_dir": recipe.resilience.snapshot_dir},
        **{"checkpoint.warm_start": saved.warm_start, "checkpoint.resume_from": saved.resume_from},
        **{"data.corpus": data.corpus},
        **{f"data.sources.{index}.path": each.path for index, each in enumerate(data.sources)},
        **{f"data.validation.{index}.path": each.path for index, each in enumerate(data.validation)},
    }
    for key, value in named.items():
        paths = [value] if isinstance(value, str) else value or []
        if twice := next((path for path in paths if paths.count(path) > 1), None):
            yield Finding(key, f"names '{twice}' twice, which would read it twice;", "take one of them out.")
        for path in paths:
            try:
                expand(path)
            except UsageError as error:
                yield Finding(key, str(error))


def sources(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Sources instead of a corpus, each with a name of its own, and weights for all or none."""
    data = recipe.data
    if data.sources and data.corpus is not None:
        yield Finding("data.corpus", "there are data.sources too;", "make it one of them, or take them out.")
    for key, tables in (("data.sources", data.sources), ("data.validation", data.validation)):
        names = [each.name for each in tables]
        for index, name in enumerate(names):
            if name in names[:index]:
                yield Finding(f"{key}.{index}.name", f"'{name}' is another one's name too;", "give each its own.")
    weighted = [each.weight is not None for each in data.sources]
    if any(weighted) and data.stages:
        problem = "data.stages gives the weights, and this one would have no effect;"
        yield Finding(f"data.sources.{weighted.index(True)}.weight", problem, "take it out, or the stages.")
    elif any(weighted) and not all(weighted):
        problem = "has no weight, and others have: weights and sizes are not to be compared;"
        yield Finding(f"data.sources.{weighted.index(False)}", problem, "give all sources weights, or none.")


def stages(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Stages follow each other, know their sources, and leave none out."""
    stages, names = recipe.data.stages, [each.name for each in recipe.data.sources]
    if stages and not names:
        yield Finding("data.stages", "there are no sources to weigh;", "name them by [[data.sources]].")
        return
    for index, stage in enumerate(stages):
        for name in (name for name in stage.weights if name not in names):
            hint = did_you_mean(name, names) or f"they are {', '.join(names)}."
            yield Finding(f"data.stages.{index}.weights.{name}", "there is no such source;", hint)
        if not stage.weights:
            yield Finding(f"data.stages.{index}.weights", "no source has a weight;", "give one at least.")
        is_last = index + 1 == len(stages)
        if is_last and stage.until is not None:
            yield Finding(f"data.stages.{index}.until", "the last stage goes on to the end;", "take it out.")
        elif not is_last and stage.until is None:
            yield Finding(f"data.stages.{index}", "ends nowhere, and another stage follows;", "write until = tokens.")
    ends = [stage.until for stage in stages if stage.until is not None]
    if ends != sorted(set(ends)):
        yield Finding("data.stages", "stages must end later than those before them;", "put them in order.")
    for index, name in enumerate(names):
        if stages and not any(name in stage.weights for stage in stages):
            problem = f"no stage gives '{name}' a weight, so it would never be read;"
            yield Finding(f"data.sources.{index}", problem, "name it in a stage, or take it out.")


def schedule(recipe: Recipe, steps: int) -> Iterator[Finding]:
    """Warm-up and decay fit into the run. Only a warning, since a few steps of a long recipe are a usual trial."""
    section = recipe.schedule
    if section.name not in SCHEDULES:
        return
    to_try = "to try the first steps of a longer run, use run.stop_after_step."
    room = steps - section.warmup_steps
    keys = schedule_named(section.name).keys
    if section.warmup_steps and room <= 0:
        problem = f"a warm-up of {section.warmup_steps} steps leaves nothing of a run of {steps};"
        yield warning("schedule.warmup_steps", problem, f"choose fewer than {steps}; {to_try}")
    elif (section.decay_steps or 0) > room and "decay_steps" in keys:
        problem = f"{section.decay_steps} steps of decay start below the peak: warm-up leaves {room};"
        yield warning("schedule.decay_steps", problem, f"choose at most {room}; {to_try}")
    elif section.name == "wsd" and section.decay_steps is None and steps // 5 > room:
        problem = f"wsd decays over the last {steps // 5} steps, and warm-up leaves {room}: there is no peak;"
        yield warning("schedule.warmup_steps", problem, f"write schedule.decay_steps = {room} at most; {to_try}")
    if steps == 1 and lr_factor(1, section, 1) == 0:
        problem = f"the only step of this run is the last of {section.name}, at a rate of 0;"
        yield warning("schedule.final_lr_ratio", problem, 'write more than 0, or name = "constant".')


def never_reached(recipe: Recipe, steps: int) -> Iterator[Finding]:
    """Intervals, limits, stages and batches that lie beyond the end of the run."""
    for section in ("validation", "checkpoint"):
        if (value := getattr(recipe, section).every_steps) > steps:
            problem = f"{value} is more than the run's {steps} steps, so there is one at the end alone;"
            yield warning(f"{section}.every_steps", problem, "lower it, or set 0.")
    stop = recipe.run.stop_after_step
    if stop is not None and stop >= steps:
        yield warning("run.stop_after_step", f"the run ends at step {steps}, before {stop} stops it;", "leave it out.")
    tokens = steps * recipe.training.global_batch * recipe.training.sequence_length
    for index, stage in enumerate(recipe.data.stages):
        if stage.until is not None and stage.until >= tokens:
            problem = f"the run ends after {format_count(tokens)} tokens, so no later stage comes;"
            yield warning(f"data.stages.{index}.until", problem, "train for longer, or end it earlier.")
    last = sample_schedule(recipe).end_sample(steps) // recipe.training.global_batch
    if unreached := sorted(batch for batch in set(recipe.data.skip_steps) if batch > last):
        problem = f"the run ends with batch {last}, and does not come to {', '.join(map(str, unreached))};"
        yield warning("data.skip_steps", problem, "take them out.")
