"""What a run will be, and what is wrong with it, before any device is touched.

One function a rule, each pure: (recipe, world) -> findings, with the numbers and the fix. Values that are wrong by
themselves never come here: `recipe/load.py` refuses them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from titanlite.errors import EXIT_DONE, EXIT_RECIPE, Finding, RecipeError, UsageError
from titanlite.models.spec import ModelSpec, spec_of
from titanlite.optim.names import OPTIMIZERS
from titanlite.optim.schedules import SCHEDULES
from titanlite.parallel.layout import Layout, batch_plan, ceil_div, layout_of, total_steps
from titanlite.recipe.explain import explain, key_schema
from titanlite.recipe.load import LoadedRecipe, load_recipe, parse_with_overrides
from titanlite.recipe.sections import Recipe
from titanlite.recipe.units import format_bytes, format_count
from titanlite.registry import Registry, did_you_mean

BYTE_VOCABULARY = 257  # 256 byte values, and the separator between documents


def check(recipe: Recipe, world: int = 1) -> list[Finding]:
    """Every rule's findings for `recipe` on `world` ranks, errors first; `LoadedRecipe.locate` adds file and line."""
    findings = [finding for rule in RULES for finding in rule(recipe, world)]
    return sorted(findings, key=lambda finding: finding.severity != "error")


def checked(loaded: LoadedRecipe, world: int = 1) -> list[Finding]:
    """The warnings about a loaded recipe, with file and line. Raises `RecipeError` with all errors if there are any."""
    findings = loaded.locate(check(loaded.recipe, world))
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        raise RecipeError(errors)
    return findings


def _warning(key: str, problem: str, fix: str) -> Finding:
    return Finding(key, problem, fix, severity="warning")


def amount(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Exactly one of steps and tokens."""
    training = recipe.training
    if training.steps is None and training.tokens is None:
        fix = 'give training.steps, or training.tokens such as "2M".'
        yield Finding("training", "neither steps nor tokens is given, so the run has no end;", fix)
    elif training.steps is not None and training.tokens is not None:
        problem = f"steps = {training.steps} and tokens = {training.tokens} are both given;"
        yield Finding("training.tokens", problem, "give one of the two.")


def names(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Optimizer and schedule are registered."""
    chosen: list[tuple[str, Registry, str]] = [
        ("optimizer.name", OPTIMIZERS, recipe.optimizer.name),
        ("schedule.name", SCHEDULES, recipe.schedule.name),
    ]
    for key, registry, name in chosen:
        if name not in registry:
            hint = did_you_mean(name, list(registry)) or f"known: {', '.join(registry)}."
            yield Finding(key, f"there is no {registry.kind} '{name}';", hint)


def preset(recipe: Recipe, world: int) -> Iterator[Finding]:
    """The preset exists."""
    try:
        spec_of(recipe.model.preset)
    except UsageError as error:
        yield Finding("model.preset", str(error))


def heads(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Heads divide the width evenly, key and value heads divide the heads."""
    config = _config(recipe)
    if config is None:
        return
    if config.heads % config.kv_heads:
        divisors = ", ".join(str(count) for count in range(1, config.heads + 1) if config.heads % count == 0)
        problem = f"{config.heads} heads cannot share {config.kv_heads} key and value heads evenly;"
        yield Finding("model.kv_heads", problem, f"choose one of {divisors}.")
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
        problem = f"low_freq_factor {scaling.low_freq_factor:g} must be below high_freq_factor"
        fix = "Llama 3.1 has 1 and 4."
        yield Finding("model.rope_scaling.low_freq_factor", f"{problem} {scaling.high_freq_factor:g};", fix)


def vocabulary(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Every token has a row in the embedding."""
    config = _config(recipe)
    if config is not None and recipe.data.tokenizer == "bytes" and config.vocab_size < BYTE_VOCABULARY:
        problem = f"{config.vocab_size} rows are too few for the byte tokenizer's {BYTE_VOCABULARY} tokens;"
        yield Finding("model.vocab_size", problem, "write 272, which is also a multiple of 16.")


def schedule(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Warm-up and decay fit into the run. Only a warning, since a few steps of a long recipe are a usual trial."""
    steps, section = _steps(recipe), recipe.schedule
    if steps is None:
        return
    to_try = "to try the first steps of a longer run, use run.stop_after_step."
    room = steps - section.warmup_steps
    if section.warmup_steps and room <= 0:
        problem = f"a warm-up of {section.warmup_steps} steps leaves nothing of a run of {steps};"
        yield _warning("schedule.warmup_steps", problem, f"choose fewer than {steps}; {to_try}")
    elif (section.decay_steps or 0) > room and section.name in ("linear", "cosine", "wsd"):
        problem = f"{section.decay_steps} steps of decay start below the peak: warm-up leaves {room};"
        yield _warning("schedule.decay_steps", problem, f"choose at most {room}; {to_try}")


def decay_rate(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Weight decay shrinks weights; it must not flip their sign."""
    optimizer = recipe.optimizer
    rates = {"optimizer.lr": optimizer.lr}
    if optimizer.name == "muon":
        rates["optimizer.muon_lr"] = optimizer.muon_lr
    for key, rate in rates.items():
        if rate * optimizer.weight_decay >= 1:
            problem = f"{rate:g} times the weight decay {optimizer.weight_decay:g} is 1 or more: a step would wipe out"
            yield Finding(key, f"{problem} or flip every weight;", "lower one of the two.")


def mesh(recipe: Recipe, world: int) -> Iterator[Finding]:
    """The mesh has as many places as there are ranks."""
    parallel = recipe.parallel
    if parallel.dp_shard == 0:
        yield Finding("parallel.dp_shard", "a model cannot be cut over 0 ranks;", "write -1 for all that are left.")
    elif layout_of(parallel, world) is None and parallel.dp_shard == -1:
        copies = parallel.dp_replicate
        problem = f"{world} rank{'s' * (world > 1)} cannot be shared out evenly to {copies} copies of the model;"
        divisors = ", ".join(str(count) for count in range(1, world + 1) if world % count == 0)
        fix = f"write one of {divisors}, or start a multiple of {copies} ranks (titanlite check --world {copies})."
        yield Finding("parallel.dp_replicate", problem, fix)
    elif layout_of(parallel, world) is None:
        asked = parallel.dp_replicate * parallel.dp_shard
        problem = f"dp_replicate {parallel.dp_replicate} x dp_shard {parallel.dp_shard} does not give {world}"
        fix = f"write dp_shard = -1 for all that are left, or start {asked} ranks (titanlite check --world {asked})."
        yield Finding("parallel.dp_shard", f"{problem} rank{'s' if world > 1 else ''};", fix)


def padding(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Sequences that are computed and weigh nothing, because the batch does not divide evenly."""
    training, plan = recipe.training, batch_plan(recipe.training, world, 0)
    computed = plan.microbatches * plan.microbatch * world
    if computed == training.global_batch:
        return
    share = ceil_div(training.global_batch, world)
    waste = f"{(computed - training.global_batch) / computed:.0%} are padding;"
    problem = f"{_times(world, plan.microbatches, plan.microbatch)} = {computed} sequences: {waste}"
    if share % plan.microbatch:
        fix = f"a microbatch that divides a rank's share of {share} wastes nothing."
        yield _warning("training.microbatch", problem, fix)
    else:
        even = ceil_div(training.global_batch, world) * world
        yield _warning("training.global_batch", problem, f"the next batch that {world} ranks share evenly is {even}.")


def _times(world: int, microbatches: int, microbatch: int) -> str:
    return f"{world} rank{'s' * (world > 1)} x {microbatches} microbatch{'es' * (microbatches > 1)} of {microbatch}"


def never_reached(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Intervals and limits that lie beyond the end of the run."""
    steps = _steps(recipe)
    if steps is None:
        return
    limits = [
        ("validation.every_steps", recipe.validation.every_steps, "only the end is validated;"),
        ("checkpoint.every_steps", recipe.checkpoint.every_steps, "nothing is saved before the end;"),
    ]
    for key, value, consequence in limits:
        if value > steps:
            yield _warning(
                key, f"{value} is more than the run's {steps} steps: {consequence}", "lower it if not meant."
            )
    stop = recipe.run.stop_after_step
    if stop is not None and stop >= steps:
        yield _warning("run.stop_after_step", f"the run ends at step {steps}, before {stop} stops it;", "leave it out.")


def without_effect(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Keys that were changed from their defaults and do nothing beside the others."""
    defaults = Recipe()
    name, optimizer = recipe.schedule.name, recipe.optimizer.name
    idle = [
        ("schedule", "decay_steps", name in ("constant", "sqrt"), f"the {name} schedule has no decay phase"),
        ("schedule", "decay_shape", name in SCHEDULES and name != "wsd", "only wsd has a decay of a chosen shape"),
        ("schedule", "final_lr_ratio", name == "constant", "the constant schedule stays at the peak"),
        ("optimizer", "muon_lr", optimizer == "adamw", "the optimizer is adamw"),
        ("optimizer", "muon_momentum", optimizer == "adamw", "the optimizer is adamw"),
        ("resilience", "max_skips", recipe.resilience.on_nonfinite == "stop", 'on_nonfinite = "stop" skips nothing'),
        ("data", "prefetch", recipe.data.workers == 0, "without data.workers nothing is fetched ahead"),
        ("validation", "sequences", recipe.validation.every_steps == 0, "validation.every_steps is 0"),
    ]
    for section, key, does_nothing, reason in idle:
        if does_nothing and getattr(getattr(recipe, section), key) != getattr(getattr(defaults, section), key):
            yield _warning(f"{section}.{key}", f"has no effect here: {reason};", "leave it out.")


def looking_inside(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Debug tools that watch every module need modules that run one by one."""
    if not recipe.compile.enabled:
        return
    for key in ("find_nonfinite", "trace_shapes"):
        if getattr(recipe.debug, key):
            problem = "watches every module, and compile.enabled fuses them into one;"
            yield Finding(f"debug.{key}", problem, "write compile.enabled = false while you look.")


Rule = Callable[[Recipe, int], Iterator[Finding]]

RULES: tuple[Rule, ...] = (
    amount,
    names,
    preset,
    heads,
    rope,
    vocabulary,
    schedule,
    decay_rate,
    mesh,
    padding,
    never_reached,
    without_effect,
    looking_inside,
)


def _spec(recipe: Recipe) -> ModelSpec | None:
    try:
        return spec_of(recipe.model.preset)
    except UsageError:
        return None


def _config(recipe: Recipe) -> Any:
    """The model's sizes; None for an unknown preset, which `preset` reports."""
    spec = _spec(recipe)
    return spec.configure(recipe.model) if spec else None


def _steps(recipe: Recipe) -> int | None:
    """Steps of the run; None where `amount` has something to report."""
    training = recipe.training
    return total_steps(training) if (training.steps is None) != (training.tokens is None) else None


def describe(recipe: Recipe, world: int = 1) -> dict[str, Any]:
    """What a recipe without errors will be on `world` ranks, in plain numbers: sizes, batches, bytes, operations."""
    spec = spec_of(recipe.model.preset)
    config = spec.configure(recipe.model)
    training, plan, steps = recipe.training, batch_plan(recipe.training, world, 0), total_steps(recipe.training)
    layout = layout_of(recipe.parallel, world)
    assert layout is not None, "the rule `mesh` refuses this"
    tokens_per_step = training.global_batch * training.sequence_length
    flops_per_token = spec.flops_per_token(config, training.sequence_length)
    return {
        "name": recipe.run.name,
        "preset": recipe.model.preset,
        "dim": config.dim,
        "layers": config.layers,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "ffn_dim": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "parameters": spec.parameter_count(config),
        "embedding_parameters": spec.embedding_parameters(config),
        "steps": steps,
        "tokens": steps * tokens_per_step,
        "tokens_per_step": tokens_per_step,
        "sequence_length": training.sequence_length,
        "global_batch": training.global_batch,
        "world": world,
        "mesh": dataclasses.asdict(layout),
        "microbatch": plan.microbatch,
        "microbatches": plan.microbatches,
        "state_bytes": _state_bytes(recipe, layout),
        "flops_per_token": flops_per_token,
        "flops": flops_per_token * steps * tokens_per_step,
    }


def _state_bytes(recipe: Recipe, layout: Layout) -> dict[str, int]:
    """Bytes on one rank of what lives from step to step, and of the weights gathered for a pass.

    AdamW keeps two moments a parameter, Muon one for the blocks' matrices, all in the weights' own format. What the
    ZeRO stage does not cut is there in whole: gradients below stage 2, gathered weights below stage 3. In stage 3
    those outside the blocks are, and two blocks: one at work, the next on its way.
    """
    spec = spec_of(recipe.model.preset)
    config = spec.configure(recipe.model)
    stage, ranks = recipe.parallel.zero_stage, layout.dp_shard
    parameters = spec.parameter_count(config)
    width = 8 if recipe.precision.compute == "float64" else 4
    compute_width = {"bfloat16": 2, "float32": 4, "float64": 8}[recipe.precision.compute]
    matrices = spec.matrix_parameters(config)
    moments = 2 * parameters - (matrices if recipe.optimizer.name == "muon" else 0)
    resting = matrices * max(config.layers - 2, 0) // config.layers if stage == 3 else 0
    parts = {
        "weights": ceil_div(width * parameters, ranks),
        "gathered": compute_width * (parameters - resting) if layout.data_ranks > 1 else 0,
        "gradients": ceil_div(width * parameters, ranks) if stage >= 2 else width * parameters,
        "optimizer": ceil_div(width * moments, ranks),
    }
    return {**parts, "total": sum(parts.values())}


def checkpoint_bytes(recipe: Recipe) -> int:
    """Bytes of a checkpoint's tensors: weights and optimizer states in whole, over however many ranks they lie."""
    states = _state_bytes(recipe, Layout(dp_replicate=1, dp_shard=1))
    return states["weights"] + states["optimizer"]


def report(recipe: Recipe, world: int = 1) -> str:
    """`describe` for people."""
    run = describe(recipe, world)
    memory = {part: format_bytes(count) for part, count in run["state_bytes"].items()}
    optimizer, shape = recipe.optimizer, recipe.schedule
    rates = f"lr {optimizer.lr:g}" + (f", muon_lr {optimizer.muon_lr:g}" if optimizer.name == "muon" else "")
    rows = {
        "model": f"{run['preset']}: {format_count(run['parameters'])} parameters"
        f" ({format_count(run['embedding_parameters'])} only looked up)",
        "": f"{run['layers']} layers, dim {run['dim']}, {run['heads']} heads ({run['kv_heads']} of keys and values),"
        f" ffn_dim {run['ffn_dim']}, vocabulary {run['vocab_size']}",
        "training": f"{format_count(run['tokens'])} tokens = {run['steps']} steps x {run['global_batch']} sequences"
        f" x {run['sequence_length']} tokens",
        "batch": f"{_times(world, run['microbatches'], run['microbatch'])}; {format_count(run['tokens_per_step'])}"
        " tokens a step",
        "mesh": ", ".join(f"{dimension} {degree}" for dimension, degree in run["mesh"].items()),
        "optimizer": f"{optimizer.name} ({rates}), {shape.name} schedule, {shape.warmup_steps} steps of warm-up",
        "memory": f"{memory['total']} a rank: weights {memory['weights']}, gathered {memory['gathered']},"
        f" gradients {memory['gradients']}, optimizer {memory['optimizer']}; activations come on top",
        "compute": f"{recipe.precision.compute}; {format_count(run['flops_per_token'])} operations a token,"
        f" {run['flops']:.3g} in all",
        "folder": str(Path(recipe.run.output_dir) / recipe.run.name),
    }
    width = max(map(len, rows))
    return "\n".join(f"{title:<{width}}  {text}" for title, text in rows.items())


def main(argv: list[str]) -> int:
    """`titanlite check`: print what a recipe will do, or all that is wrong with it (exit code 2)."""
    parser = argparse.ArgumentParser(
        prog="titanlite check",
        usage="titanlite check RECIPE [--section.key=value ...] [--world N] [--json] | --explain KEY",
        description="Say what a run will be, and what is wrong with its recipe. Touches no device.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", nargs="?", help="recipe file (TOML)")
    parser.add_argument("--world", type=int, default=1, metavar="N", help="ranks (devices) the run would have")
    parser.add_argument("--json", action="store_true", help="print an object instead of a table")
    parser.add_argument("--explain", metavar="KEY", help="explain a section or a key, such as training.steps")
    arguments, overrides = parse_with_overrides(parser, argv)
    if arguments.explain is not None:
        text = explain(arguments.explain)
        path = tuple(arguments.explain.split("."))
        print(json.dumps(key_schema(path), indent=2, ensure_ascii=False) if arguments.json else text)
        return EXIT_DONE
    if arguments.recipe is None:
        raise UsageError("titanlite check needs a recipe, such as configs/debug.toml, or --explain KEY.")
    if arguments.world < 1:
        raise UsageError(f"--world {arguments.world}: a run has at least one rank.")
    if arguments.json:
        return _print_json(arguments.recipe, overrides, arguments.world)
    loaded = load_recipe(arguments.recipe, overrides)
    warnings = checked(loaded, arguments.world)
    print(report(loaded.recipe, arguments.world))
    for finding in warnings:
        print(f"\nwarning: {finding}")
    return EXIT_DONE


def _print_json(path: str, overrides: list[str], world: int) -> int:
    """One object on stdout: `describe` and the findings, or the findings alone where there are errors."""
    run: dict[str, Any] = {}
    try:
        loaded = load_recipe(path, overrides)
        findings = checked(loaded, world)
        run = describe(loaded.recipe, world)
    except RecipeError as error:
        findings = error.findings
    print(json.dumps({**run, "findings": [dataclasses.asdict(finding) for finding in findings]}, indent=2))
    return EXIT_DONE if run else EXIT_RECIPE
