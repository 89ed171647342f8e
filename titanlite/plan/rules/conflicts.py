"""Keys that are right by themselves and cannot be had together, would be regretted, or do nothing beside the others."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from operator import attrgetter

from titanlite.errors import Finding, warning
from titanlite.optim.base import OPTIMIZERS
from titanlite.optim.schedules import SCHEDULES
from titanlite.plan.kernels import OPERATIONS, QUANTISE, attends_by_lengths
from titanlite.plan.layout import Layout, layout_of
from titanlite.plan.rules.run import find_model
from titanlite.plan.stages import FIXED_STAGES, SPLIT_BACKWARD, V_SHAPED
from titanlite.recipe.sections import WATCHDOG_PATIENCE, Float8, Pipeline, Recipe


def _report(rows: list[tuple[str, object, str, str]], severity: str = "error") -> Iterator[Finding]:
    """A finding for each row (key, whether its rule is broken, what is wrong, the fix) whose rule is."""
    return (Finding(key, problem, fix, severity=severity) for key, broken, problem, fix in rows if broken)


def together(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Keys that cannot be had together, or not without another."""
    parallel, saved, recompute, compiled = recipe.parallel, recipe.checkpoint, recipe.recompute, recipe.compile.enabled
    budget, validated = recompute.budget is not None, recipe.validation.every_steps
    by_lengths = find_model(recipe)[1] is not None and attends_by_lengths(recipe)
    return _report([
        ("checkpoint.resume_from", saved.warm_start is not None and saved.resume_from is not None,
         "a run begins with the weights of a checkpoint, or the state of one;", "give warm_start or resume_from."),
        ("checkpoint.keep_best", saved.keep_best and saved.keep_last and not (validated and saved.every_steps),
         "the best are those of least validation loss;", "give validation.every_steps and checkpoint.every_steps too."),
        ("resilience.rerun_every", recipe.resilience.rerun_every and not recipe.run.deterministic,
         "a sum in another order would blame sound hardware;", "write run.deterministic = true, or rerun_every = 0."),
        ("parallel.async_tp", parallel.async_tp and parallel.tp > 1 and not compiled,
         "it is the compiler that splits the products;", "write compile.enabled = true, or async_tp = false."),
        ("recompute.budget", budget and not compiled, "it is the compiler that chooses what to recompute;",
         'write compile.enabled = true, or recompute.mode = "selective" instead.'),
        ("recompute.budget", budget and recompute.mode != "none", "recompute.mode chooses too;", "give one."),
        *((f"debug.{key}", compiled and getattr(recipe.debug, key), "compile.enabled fuses what it watches;",
           "write compile.enabled = false while you look.") for key in ("find_nonfinite", "trace_shapes")),
        *((f"kernels.{key}", recipe.precision.compute == "float64" and getattr(recipe.kernels, key) == "triton",
           "Triton's kernels compute in float32;", 'write "auto", or another precision.compute than float64.')
          for key in ("backend", *OPERATIONS, QUANTISE)),
        ("kernels.attention", recipe.kernels.attention == "cudnn" and by_lengths,
         "cuDNN's attention is over whole sequences, not within data.document_mask, model.window or parallel.cp;",
         'write "auto", or "flash".'),
        ("kernels.attention", recipe.kernels.attention != "auto" and recipe.precision.compute != "bfloat16",
         "its kernels compute in bfloat16;", 'write "auto", or precision.compute = "bfloat16".'),
        ("parallel.offload", parallel.offload and world == 1,
         "only what ranks share can rest in the host's memory, and one shares nothing;",
         "write false, or start 2 ranks or more (titanlite check --world 2)."),
    ])  # fmt: skip


def regretted(recipe: Recipe, world: int) -> Iterator[Finding]:
    """What can be had, and is seldom meant."""
    parallel, saved, guards, float8 = recipe.parallel, recipe.checkpoint, recipe.resilience, recipe.precision.float8
    longest, timeout = WATCHDOG_PATIENCE * guards.watchdog_seconds, parallel.timeout_seconds
    return _report([
        *((f"resilience.{key}", getattr(guards, key) == "rollback" and not (saved.every_steps or saved.every_minutes),
           "without checkpoints on the way, the run goes back to its very beginning;", "set checkpoint.every_steps.")
          for key in ("on_nonfinite", "on_spike")),
        ("resilience.watchdog_seconds", world > 1 and longest >= timeout,
         f"ranks fail after parallel.timeout_seconds = {timeout:g}, and a first step or a save may take {longest:g} s "
         "before it is found to hang;", "lower it, or raise the time-out."),
        ("precision.float8.recipe", float8.enabled and float8.recipe == "mxfp8",
         "GPUs before Blackwell emulate products of blocks, slower than bfloat16;", "on such GPUs, choose another."),
        ("data.validation", recipe.data.validation and not recipe.validation.every_steps,
         "these sets are never read, for validation.every_steps is 0;", "set validation.every_steps."),
    ], "warning")  # fmt: skip


def split_backward(recipe: Recipe, layout: Layout) -> Iterator[Finding]:
    """Schedules that compute gradients of inputs and of weights at different times, and V-shaped ones, exclude much."""
    schedule, found, compiled = recipe.parallel.pipeline.schedule, version("torch"), recipe.compile.enabled
    split, (spec, config) = layout.pp > 1 and schedule in SPLIT_BACKWARD, find_model(recipe)
    tied = spec is not None and spec.tied(config)
    # Before 2.13, torch takes the sum of the gradients of a function with several results, such as the fused RMSNorm,
    # for the first one's, and frees functions written in Python that it comes back to, such as the loss by chunks.
    is_old = tuple(map(int, found.split(".")[:2])) < (2, 13)
    other, apart = "or choose 1F1B or Interleaved1F1B.", f"{schedule} takes gradients of inputs and weights apart, and"
    return _report([
        ("parallel.pipeline.schedule", tied and layout.pp > 1 and schedule in V_SHAPED,
         f"{schedule} has the ends of the model on one rank, and they share the tied embedding;",
         f"write model.tie_embeddings = false, {other}"),
        ("parallel.zero_stage", split and recipe.parallel.zero_stage == 3,
         f"{schedule} gets wrong gradients once stage 3 has released weights;", f"write zero_stage = 2, {other}"),
        ("recompute.mode", split and recipe.recompute.mode != "none",
         f"{apart} would recompute a block for each weight;", f'write "none", {other}'),
        ("compile.enabled", split and compiled, f"{apart} compiled blocks only know both;", f"write false, {other}"),
        ("precision.float8.enabled", split and recipe.precision.float8.enabled,
         f"{apart} float8 linears only know both;", f"write false, {other}"),
        ("parallel.pipeline.schedule", split and is_old,
         f"{schedule} needs torch 2.13; this is {found}, with wrong gradients;", f"install torch 2.13, {other}"),
    ])  # fmt: skip


def unused_keys(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Keys that were changed from their defaults and do nothing beside the others."""
    parallel, guards, layout, defaults = recipe.parallel, recipe.resilience, layout_of(recipe.parallel, world), Recipe()
    stage, pipeline, actions = parallel.zero_stage, parallel.pipeline, (guards.on_nonfinite, guards.on_spike)
    uncut = layout is not None and layout.size > 1 and layout.dp_shard * layout.cp == 1
    copied = layout is None or max(layout.weights(stage)[0], layout.tp, layout.pp) > 1
    cut = layout.weights(stage)[1] if layout is not None else 0
    fixed = parallel.pp > 1 and pipeline.schedule in FIXED_STAGES
    float8 = [f"precision.float8.{key}" for key in Float8.model_fields]
    rows: list[tuple[bool, str, list[str]]] = [
        ("skip" not in actions, "neither on_nonfinite nor on_spike skips", ["resilience.max_skips"]),
        ("rollback" not in actions, "neither on_nonfinite nor on_spike goes back", ["resilience.max_rollbacks"]),
        (guards.on_spike == "off", 'on_spike is "off"', ["resilience.spike_zscore", "resilience.spike_window"]),
        (recipe.data.workers == 0, "without data.workers nothing is fetched ahead", ["data.prefetch"]),
        (recipe.data.fim_rate == 0, "data.fim_rate is 0", ["data.fim_tokens"]),
        (recipe.checkpoint.keep_last == 0, "keep_last 0 keeps all", ["checkpoint.keep_every", "checkpoint.keep_best"]),
        (recipe.validation.every_steps == 0, "validation.every_steps is 0", ["validation.sequences"]),
        (recipe.precision.compute == "float64", "a float64 run sums its gradients in float64", ["precision.reduce"]),
        (not recipe.precision.float8.enabled, "float8.enabled is false", [*float8, "kernels.float8_quantise"]),
        (recipe.recompute.mode == "none", 'recompute.mode is "none"', ["recompute.every"]),
        (recipe.recompute.mode != "selective", 'recompute.mode is not "selective"', ["recompute.keep"]),
        (parallel.pp == 1, "parallel.pp is 1", [f"parallel.pipeline.{key}" for key in Pipeline.model_fields]),
        (fixed, f"{pipeline.schedule} fixes it", ["parallel.pipeline.stages_per_rank"]),
        (not copied, "no rank holds a copy of what another does", ["resilience.check_replicas_every"]),
        (cut == 1 and parallel.tp == 1, "no weights are cut, and no activations", ["precision.float8.all_gather"]),
        (parallel.cp == 1, "parallel.cp is 1", ["parallel.cp_method"]),
        (parallel.tp == 1, "parallel.tp is 1", ["parallel.async_tp"]),
        (uncut and stage > 0, "every rank is a copy: there is none to cut over", ["parallel.zero_stage"]),
        (stage == 0 or uncut, "no weights are cut, so none are gathered", ["parallel.prefetch"]),
        (stage == 0 and parallel.dp_shard > 1, "stage 0 cuts nothing, its ranks are copies", ["parallel.dp_shard"]),
    ]
    for what, registry, always in (("optimizer", OPTIMIZERS, "clip_norm"), ("schedule", SCHEDULES, "warmup_steps")):
        section = getattr(recipe, what)
        if section.name in registry:
            others = type(section).model_fields.keys() - {"name", always, *registry.get(section.name).keys}
            rows.append((True, f"the {what} is {section.name}", [f"{what}.{key}" for key in sorted(others)]))
    for key, reason in ((key, reason) for does_nothing, reason, keys in rows if does_nothing for key in keys):
        if attrgetter(key)(recipe) != attrgetter(key)(defaults):
            yield warning(key, f"has no effect here: {reason};", "leave it out.")
