"""Keys that are right by themselves and cannot be had together, would be regretted, or do nothing beside the others."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from operator import attrgetter

from titanlite.errors import Finding
from titanlite.optim.base import OPTIMIZERS, optimizer_spec
from titanlite.optim.schedules import SCHEDULES, schedule_named
from titanlite.plan.kernels import OPERATIONS, QUANTISE
from titanlite.plan.layout import layout_of
from titanlite.plan.rules.lookup import find_config, find_spec, warning
from titanlite.plan.stages import V_SHAPED, fixes_stages, splits_backward
from titanlite.recipe.sections import WATCHDOG_PATIENCE, Float8, Pipeline, Recipe


def checkpoints(recipe: Recipe, world: int) -> Iterator[Finding]:
    """A run begins with one checkpoint at most, goes back to one, and judges as best what is validated and saved."""
    section, guards = recipe.checkpoint, recipe.resilience
    if section.warm_start is not None and section.resume_from is not None:
        problem = "the run would begin with the weights of one checkpoint and the whole state of another;"
        yield Finding("checkpoint.resume_from", problem, "give warm_start or resume_from.")
    if section.keep_best and section.keep_last and not (recipe.validation.every_steps and section.every_steps):
        problem = f"the best {section.keep_best} are known by the validation loss at the step that is saved;"
        yield Finding("checkpoint.keep_best", problem, "give validation.every_steps and checkpoint.every_steps too.")
    for key in ("on_nonfinite", "on_spike"):
        if getattr(guards, key) == "rollback" and not (section.every_steps or section.every_minutes):
            problem = "without checkpoints on the way, a bad step sends the run back to its very beginning;"
            yield warning(f"resilience.{key}", problem, "set checkpoint.every_steps.")


def guards(recipe: Recipe, world: int) -> Iterator[Finding]:
    """What is compared bit for bit is repeatable, and hangs are found before the process group gives up."""
    if recipe.resilience.rerun_every and not recipe.run.deterministic:
        problem = "a device may add in another order the second time, and sound hardware would be blamed;"
        yield Finding("resilience.rerun_every", problem, "write run.deterministic = true, or rerun_every = 0.")
    seconds, timeout = recipe.resilience.watchdog_seconds, recipe.parallel.timeout_seconds
    if world > 1 and WATCHDOG_PATIENCE * seconds >= timeout:
        limits = f"{WATCHDOG_PATIENCE} x {seconds:g} s, for a save or a first step, is not below {timeout:g} s"
        problem = f"{limits} (parallel.timeout_seconds), after which ranks fail without naming the one they wait for;"
        yield warning("resilience.watchdog_seconds", problem, "lower it, or raise the time-out.")


def compiler(recipe: Recipe, world: int) -> Iterator[Finding]:
    """What only the compiler can do, and what it leaves no room for."""
    recompute, compiled = recipe.recompute, recipe.compile.enabled
    enable = "write compile.enabled = true, or"
    if recipe.parallel.async_tp and recipe.parallel.tp > 1 and not compiled:
        problem = "it is the compiler that splits the products and overlaps their parts with communication;"
        yield Finding("parallel.async_tp", problem, f"{enable} async_tp = false.")
    if recompute.budget is not None and not compiled:
        problem = "it is the compiler that chooses what to recompute within a budget;"
        yield Finding("recompute.budget", problem, f'{enable} recompute.mode = "selective" instead.')
    if recompute.budget is not None and recompute.mode != "none":
        yield Finding("recompute.budget", f'recompute.mode = "{recompute.mode}" chooses too;', "give one of the two.")
    for key in ("find_nonfinite", "trace_shapes"):
        if getattr(recipe.debug, key) and compiled:
            problem = "watches every module, and compile.enabled fuses them into one;"
            yield Finding(f"debug.{key}", problem, "write compile.enabled = false while you look.")


def formats(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Kernels and devices compute in the formats that are asked for."""
    for name in ("backend", *OPERATIONS, QUANTISE):
        if recipe.precision.compute == "float64" and getattr(recipe.kernels, name) == "triton":
            problem = "Triton's kernels compute in float32, and precision.compute is float64;"
            yield Finding(f"kernels.{name}", problem, 'write "auto", or compute in another precision.')
    if recipe.precision.float8.enabled and recipe.precision.float8.recipe == "mxfp8":
        problem = "GPUs below compute capability 10.0 (Blackwell) emulate products of blocks, slower than bfloat16;"
        yield warning("precision.float8.recipe", problem, "for speed on such GPUs, choose another.")


def memory(recipe: Recipe, world: int) -> Iterator[Finding]:
    """It is sharding that moves weights between host and device; a ring has no kernel under a mask of documents."""
    if recipe.parallel.offload and world == 1:
        problem = "one rank has no others to share weights with, and only shared ones can rest in the host's memory;"
        yield Finding("parallel.offload", problem, "write false, or start 2 ranks or more (titanlite check --world 2).")
    if recipe.parallel.cp > 1 and recipe.parallel.cp_method == "ring" and recipe.data.document_mask:
        problem = "with data.document_mask, scores are formed without a kernel, in float32, many times slower;"
        yield warning("parallel.cp_method", problem, 'write "all-gather".')


def split_backward(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Schedules that compute gradients of inputs and of weights at different times, and V-shaped ones, exclude much."""
    schedule, layout, spec = recipe.parallel.pipeline.schedule, layout_of(recipe.parallel, world), find_spec(recipe)
    if layout is None or layout.pp == 1:
        return
    other = "choose 1F1B or Interleaved1F1B."
    if spec is not None and spec.tied(find_config(recipe)) and schedule in V_SHAPED:
        problem = f"{schedule} has the first and the last stage on one rank, and they share the tied embedding;"
        yield Finding("parallel.pipeline.schedule", problem, f"write model.tie_embeddings = false, or {other}")
    if not splits_backward(schedule):
        return
    if recipe.parallel.zero_stage == 3:
        problem = f"{schedule} needs the weights where stage 3 has released them, and would compute wrong gradients;"
        yield Finding("parallel.zero_stage", problem, f"write zero_stage = 2, or {other}")
    if recipe.recompute.mode != "none":
        problem = f"{schedule} runs a block's backward once for its inputs and once for each of its weights, and would"
        yield Finding("recompute.mode", f"{problem} compute the block anew each time;", f'write "none", or {other}')
    apart = f"{schedule} computes gradients of inputs and of weights apart, and"
    if recipe.compile.enabled:
        yield Finding("compile.enabled", f"{apart} compiled blocks only know both;", f"write false, or {other}")
    if recipe.precision.float8.enabled:
        yield Finding("precision.float8.enabled", f"{apart} float8 linears only know both;", f"write false, or {other}")
    # Before 2.13, torch takes the sum of the gradients of a function with several results, such as the fused RMSNorm,
    # for the first one's, and frees functions written in Python that it comes back to, such as the loss by chunks.
    found = version("torch")
    if tuple(map(int, found.split(".")[:2])) < (2, 13):
        problem = f"{schedule} needs torch 2.13, and this is {found}, which may compute wrong gradients of weights;"
        yield Finding("parallel.pipeline.schedule", problem, f"install torch 2.13, or {other}")


UnusedKey = tuple[str, bool, str]
"""(key, whether it does nothing here, why)"""


def unused_keys(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Keys that were changed from their defaults and do nothing beside the others."""
    defaults = Recipe()
    for key, does_nothing, reason in (*_of_the_run(recipe), *_of_the_updates(recipe), *_of_the_layout(recipe, world)):
        if does_nothing and attrgetter(key)(recipe) != attrgetter(key)(defaults):
            yield warning(key, f"has no effect here: {reason};", "leave it out.")


def _of_the_run(recipe: Recipe) -> list[UnusedKey]:
    guards, plain = recipe.resilience, not recipe.precision.float8.enabled
    actions = (guards.on_nonfinite, guards.on_spike)
    return [
        ("resilience.max_skips", "skip" not in actions, "neither on_nonfinite nor on_spike skips"),
        ("resilience.max_rollbacks", "rollback" not in actions, "neither on_nonfinite nor on_spike goes back"),
        *((f"resilience.spike_{key}", guards.on_spike == "off", 'on_spike is "off"') for key in ("zscore", "window")),
        ("data.prefetch", recipe.data.workers == 0, "without data.workers nothing is fetched ahead"),
        ("data.fim_tokens", recipe.data.fim_rate == 0, "data.fim_rate is 0"),
        ("checkpoint.keep_every", recipe.checkpoint.keep_last == 0, "keep_last = 0 keeps every checkpoint"),
        ("checkpoint.keep_best", recipe.checkpoint.keep_last == 0, "keep_last = 0 keeps every checkpoint"),
        ("validation.sequences", recipe.validation.every_steps == 0, "validation.every_steps is 0"),
        ("precision.reduce", recipe.precision.compute == "float64", "a float64 run sums its gradients in float64"),
        *((f"precision.float8.{key}", plain, "precision.float8.enabled is false") for key in Float8.model_fields),
        ("kernels.float8_quantise", plain, "precision.float8.enabled is false"),
        ("recompute.every", recipe.recompute.mode == "none", 'recompute.mode is "none"'),
    ]


def _of_the_updates(recipe: Recipe) -> Iterator[UnusedKey]:
    """Keys of `[optimizer]` and `[schedule]` that the chosen ones do not read, by their own account."""
    optimizer, schedule = recipe.optimizer, recipe.schedule
    if optimizer.name in OPTIMIZERS:
        used = {"name", "clip_norm", *optimizer_spec(optimizer.name).keys}
        for key in type(optimizer).model_fields:
            yield f"optimizer.{key}", key not in used, f"the optimizer is {optimizer.name}"
    if schedule.name in SCHEDULES:
        used = {"name", "warmup_steps", *schedule_named(schedule.name).keys}
        for key in type(schedule).model_fields:
            yield f"schedule.{key}", key not in used, f"the schedule is {schedule.name}"


def _of_the_layout(recipe: Recipe, world: int) -> list[UnusedKey]:
    parallel, layout = recipe.parallel, layout_of(recipe.parallel, world)
    stage, pipeline = parallel.zero_stage, parallel.pipeline
    uncut = layout is not None and layout.size > 1 and layout.dp_shard * layout.cp == 1
    copied = layout is None or max(layout.weights(stage)[0], layout.tp, layout.pp) > 1
    cut = layout.weights(stage)[1] if layout is not None else 0
    fixed = parallel.pp > 1 and fixes_stages(pipeline.schedule)
    return [
        *((f"parallel.pipeline.{name}", parallel.pp == 1, "parallel.pp is 1") for name in Pipeline.model_fields),
        ("parallel.pipeline.stages_per_rank", fixed, f"{pipeline.schedule} fixes it"),
        ("resilience.check_replicas_every", not copied, "no rank holds a copy of what another does"),
        ("precision.float8.all_gather", cut == 1 and parallel.tp == 1, "no weights are cut, and no activations"),
        ("parallel.cp_method", parallel.cp == 1, "parallel.cp is 1"),
        ("parallel.async_tp", parallel.tp == 1, "parallel.tp is 1"),
        ("parallel.zero_stage", uncut and stage > 0, "every rank is a copy: there is none to cut over"),
        ("parallel.prefetch", stage == 0 or uncut, "no weights are cut, so none are gathered"),
        ("parallel.dp_shard", stage == 0 and parallel.dp_shard > 1, "in stage 0 nothing is cut, its ranks are copies"),
    ]
