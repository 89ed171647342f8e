"""Rules about the model and the run: amounts, names, sizes, schedules, limits. Each: (recipe, world) -> findings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from titanlite.corpus.tokenizers import separator_warning, tokenizer_of
from titanlite.errors import Finding, UsageError
from titanlite.models.spec import spec_of
from titanlite.optim.base import OPTIMIZERS, optimizer_spec
from titanlite.optim.schedules import SCHEDULES, lr_factor, schedule_named
from titanlite.plan.kernels import KERNELS
from titanlite.plan.layout import ceil_div, total_steps
from titanlite.plan.rules.lookup import divisors, find_config, find_steps, warning
from titanlite.plan.sinks import SINKS
from titanlite.recipe.sections import Recipe
from titanlite.registry import Registry, did_you_mean
from titanlite.text import join_choices

MOST_STEPS = 2**32
"""Records of what is read (`data/read_log.py`) have 32 bits for a step."""
_SPARE_ROWS = 1024
"""A smaller vocabulary costs nothing, whatever uses it."""


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
        yield Finding(key, f"the run would have {total_steps(training):,} steps;", f"{MOST_STEPS:,} is too many.")


def names(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Optimizer, schedule, metrics sinks, kernels and the preset are registered."""
    chosen: list[tuple[str, Registry, str]] = [
        ("optimizer.name", OPTIMIZERS, recipe.optimizer.name),
        ("schedule.name", SCHEDULES, recipe.schedule.name),
        *(("metrics.sinks", SINKS, name) for name in recipe.metrics.sinks),
    ]
    for operation, kernels in KERNELS.items():
        if (name := getattr(recipe.kernels, operation)) not in (None, "auto", "torch"):
            chosen.append((f"kernels.{operation}", kernels, name))
    for key, registry, name in chosen:
        if name not in registry:
            hint = did_you_mean(name, list(registry)) or f"known: {', '.join(registry)}."
            yield Finding(key, f"there is no {registry.kind} '{name}';", hint)
    try:
        spec_of(recipe.model.preset)
    except UsageError as error:
        yield Finding("model.preset", str(error))


def heads(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Heads divide the width evenly, key and value heads divide the heads."""
    config = find_config(recipe)
    if config is None:
        return
    if config.heads % config.kv_heads:
        problem = f"{config.heads} heads cannot share {config.kv_heads} key and value heads evenly;"
        yield Finding("model.kv_heads", problem, f"choose {join_choices(divisors(config.heads))}.")
    if config.dim % config.heads:
        fix = f"choose a multiple of {config.heads}, such as {ceil_div(config.dim, config.heads) * config.heads}."
        yield Finding("model.dim", f"dim {config.dim} is not a multiple of the {config.heads} heads;", fix)
    elif config.head_dim % 2:
        problem = f"the head size {config.dim} / {config.heads} = {config.head_dim} is odd, and rotary embeddings"
        yield Finding("model.heads", f"{problem} turn pairs of values;", "choose heads such that dim / heads is even.")


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
    tokens = tokenizer.vocab_size
    config = find_config(recipe)
    if config is not None and config.vocab_size < tokens:
        whose = "the byte tokenizer's" if recipe.data.tokenizer == "bytes" else f"{recipe.data.tokenizer}'s"
        problem = f"{config.vocab_size} rows are too few for {whose} {tokens} tokens;"
        rows = ceil_div(tokens, 16) * 16
        yield Finding("model.vocab_size", problem, f"write {rows}, which is also a multiple of 16.")
    elif config is not None and config.vocab_size > max(_SPARE_ROWS, 2 * tokens):
        problem = f"{recipe.data.tokenizer} has {tokens:,} tokens, and the vocabulary {config.vocab_size:,} rows:"
        fix = f"name the model's own tokenizer, or write model.vocab_size = {ceil_div(tokens, 16) * 16}."
        yield warning("data.tokenizer", f"{problem} most would never be read or trained;", fix)


def schedule(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Warm-up and decay fit into the run. Only a warning, since a few steps of a long recipe are a usual trial."""
    steps, section = find_steps(recipe), recipe.schedule
    if steps is None or section.name not in SCHEDULES:
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
        problem = f"wsd decays over the last {steps // 5} of {steps} steps, and warm-up leaves {room} of them: the rate"
        fix = f"write schedule.decay_steps = {room} at most; {to_try}"
        yield warning("schedule.warmup_steps", f"{problem} never comes to its peak;", fix)
    if steps == 1 and lr_factor(1, section, 1) == 0:
        problem = f"the only step of this run is the last of {section.name}, at a rate of 0: nothing is trained;"
        yield warning("schedule.final_lr_ratio", problem, 'write more than 0, or name = "constant".')


def ranges(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Each number keeps its value in the format that it is used in: what the optimizer takes in the weights' own,
    all others in float32, which bfloat16 has the range of."""
    wide = recipe.precision.compute == "float64"
    for key, value in _floats(recipe):
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
    """Every floating-point number of a recipe; those of an array by its key, those of tables by theirs."""
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, tuple):
        for each in value:
            yield from _floats(each, key)
    elif isinstance(value, BaseModel | list | dict):
        items = enumerate(value) if isinstance(value, list) else dict(value).items()
        for name, each in items:
            yield from _floats(each, f"{key}.{name}" if key else str(name))


def decay_rate(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Weight decay shrinks weights; it must not flip their sign."""
    optimizer = recipe.optimizer
    if optimizer.name not in OPTIMIZERS:
        return
    for name in optimizer_spec(optimizer.name).rates:
        key, rate = f"optimizer.{name}", getattr(optimizer, name)
        if rate * optimizer.weight_decay >= 1:
            problem = f"{rate:g} times the weight decay {optimizer.weight_decay:g} is 1 or more: a step would wipe out"
            yield Finding(key, f"{problem} or flip every weight;", "lower one of the two.")


def never_reached(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Intervals and limits that lie beyond the end of the run."""
    steps = find_steps(recipe)
    if steps is None:
        return
    limits = [
        ("validation.every_steps", recipe.validation.every_steps, "only the end is validated;"),
        ("checkpoint.every_steps", recipe.checkpoint.every_steps, "nothing is saved before the end;"),
    ]
    for key, value, consequence in limits:
        if value > steps:
            yield warning(key, f"{value} is more than the run's {steps} steps: {consequence}", "lower it, or set 0.")
    stop = recipe.run.stop_after_step
    if stop is not None and stop >= steps:
        yield warning("run.stop_after_step", f"the run ends at step {steps}, before {stop} stops it;", "leave it out.")
