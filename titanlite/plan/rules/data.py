"""Rules about `[data]`: sources, their weights over the run, validation sets. No file is opened here."""

from __future__ import annotations

from collections.abc import Iterator

from titanlite.errors import Finding, UsageError
from titanlite.plan.layout import sample_schedule
from titanlite.plan.rules.lookup import find_steps, warning
from titanlite.recipe.paths import expand
from titanlite.recipe.sections import Data, Recipe
from titanlite.registry import did_you_mean
from titanlite.text import format_count


def paths_in(data: Data) -> list[tuple[str, list[str]]]:
    """The key and the paths of each source and validation set."""
    named: list[tuple[str, str | list[str] | None]] = [("data.corpus", data.corpus)]
    named += [(f"data.sources.{index}.path", each.path) for index, each in enumerate(data.sources)]
    named += [(f"data.validation.{index}.path", each.path) for index, each in enumerate(data.validation)]
    return [(key, [path] if isinstance(path, str) else path) for key, path in named if path is not None]


def homes(recipe: Recipe, world: int) -> Iterator[Finding]:
    """`~` and `~user` are homes on this machine, in every key that is a path; `run.vocabulary` opens the tokenizer."""
    keys = [("run.output_dir", recipe.run.output_dir), ("resilience.snapshot_dir", recipe.resilience.snapshot_dir)]
    keys += [(f"checkpoint.{key}", getattr(recipe.checkpoint, key) or "") for key in ("warm_start", "resume_from")]
    for key, path in [*keys, *((key, path) for key, paths in paths_in(recipe.data) for path in paths)]:
        try:
            expand(path)
        except UsageError as error:
            yield Finding(key, str(error))


def sources(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Sources instead of a corpus, each with a name of its own, no path twice, and weights for all or none."""
    data = recipe.data
    if data.sources and data.corpus is not None:
        yield Finding("data.corpus", "there are data.sources too;", "make it one of them, or take them out.")
    for key, tables in (("data.sources", data.sources), ("data.validation", data.validation)):
        names = [each.name for each in tables]
        for index, name in enumerate(names):
            if name in names[:index]:
                yield Finding(f"{key}.{index}.name", f"'{name}' is another one's name too;", "give each its own.")
    for key, paths in paths_in(data):
        if twice := next((path for path in paths if paths.count(path) > 1), None):
            yield Finding(key, f"names '{twice}' twice, which would read it twice;", "take one of them out.")
    weighted = [each.weight is not None for each in data.sources]
    if any(weighted) and data.stages:
        problem = "data.stages gives the weights, and this one would have no effect;"
        yield Finding(f"data.sources.{weighted.index(True)}.weight", problem, "take it out, or the stages.")
    elif any(weighted) and not all(weighted):
        problem = "has no weight, and others have: weights and sizes are not to be compared;"
        yield Finding(f"data.sources.{weighted.index(False)}", problem, "give all sources weights, or none.")


def stages(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Stages follow each other, know their sources, and leave none out."""
    data, names = recipe.data, [each.name for each in recipe.data.sources]
    if not data.stages:
        return
    if not names:
        yield Finding("data.stages", "there are no sources to weigh;", "name them by [[data.sources]].")
        return
    for index, stage in enumerate(data.stages):
        for name in stage.weights:
            if name not in names:
                hint = did_you_mean(name, names) or f"they are {', '.join(names)}."
                yield Finding(f"data.stages.{index}.weights.{name}", "there is no such source;", hint)
        if not stage.weights:
            yield Finding(f"data.stages.{index}.weights", "no source has a weight;", "give one at least.")
        last = index + 1 == len(data.stages)
        if last and stage.until is not None:
            yield Finding(f"data.stages.{index}.until", "the last stage goes on to the end;", "take it out.")
        elif not last and stage.until is None:
            yield Finding(f"data.stages.{index}", "ends nowhere, and another stage follows;", "write until = tokens.")
    ends = [stage.until for stage in data.stages if stage.until is not None]
    if ends != sorted(set(ends)):
        yield Finding("data.stages", "stages must end later than those before them;", "put them in order.")
    for index, name in enumerate(names):
        if not any(name in stage.weights for stage in data.stages):
            problem = f"no stage gives '{name}' a weight, so it would never be read;"
            yield Finding(f"data.sources.{index}", problem, "name it in a stage, or take it out.")
    steps, training = find_steps(recipe), recipe.training
    if steps is not None:
        tokens = steps * training.global_batch * training.sequence_length
        for index, end in enumerate(ends):
            if end >= tokens:
                problem = f"the run ends after {format_count(tokens)} tokens, so no later stage comes;"
                yield warning(f"data.stages.{index}.until", problem, "train for longer, or end it earlier.")


def never_read(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Batches to skip are ones that the run comes to, and validation sets are read."""
    if (steps := find_steps(recipe)) is not None:
        last = sample_schedule(recipe).end_sample(steps) // recipe.training.global_batch
        if unreached := sorted(batch for batch in set(recipe.data.skip_steps) if batch > last):
            problem = f"the run ends with batch {last}, and does not come to {', '.join(map(str, unreached))};"
            yield warning("data.skip_steps", problem, "take them out.")
    if recipe.data.validation and not recipe.validation.every_steps:
        problem = "these sets are never read, for validation.every_steps is 0;"
        yield warning("data.validation", problem, "set validation.every_steps.")
