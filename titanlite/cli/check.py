"""`titanlite check`: what a run will be, and what is wrong with it, before any device is touched."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from titanlite.data.survey import survey
from titanlite.errors import EXIT_DONE, EXIT_RECIPE, Finding, RecipeError, UsageError
from titanlite.optim.base import optimizer_spec
from titanlite.plan import timetable
from titanlite.plan.describe import describe_model, describe_run, format_sharding_table, sharding_table
from titanlite.plan.kernels import describe_attention, describe_kernels
from titanlite.plan.launch import launch_environment_or_default
from titanlite.plan.layout import active_ranks, batch_plan, require_layout
from titanlite.plan.rules import apply_rules
from titanlite.plan.stages import stages_of
from titanlite.recipe.explain import explain, find_key
from titanlite.recipe.load import LoadedRecipe, RecipeParser, load_recipe, parse_with_overrides
from titanlite.recipe.paths import expand
from titanlite.recipe.sections import Recipe
from titanlite.text import format_batch, format_bytes, format_count, format_shape, format_table, pluralize


def check_recipe(loaded: LoadedRecipe, world: int = 1) -> list[Finding]:
    """The warnings about a loaded recipe, with file and line. Raises `RecipeError` with all errors if there are any."""
    findings = loaded.locate(apply_rules(loaded.recipe, world))
    if errors := [finding for finding in findings if finding.severity == "error"]:
        raise RecipeError(errors)
    return findings


def format_description(recipe: Recipe, world: int = 1, data: dict[str, Any] | None = None) -> str:
    """`describe_run` for people, with the survey of its data."""
    run = describe_run(recipe, world)
    rows = [*_model_rows(run), *_data_rows(data or survey(recipe.data)[0], recipe, run)]
    return "\n".join(format_table([*rows, *_layout_rows(run), *_pipeline_rows(run), *_cost_rows(recipe, run)]))


Rows = Iterator[tuple[str, str]]  # titles and texts; a line that goes on has no title


def _model_rows(run: dict[str, Any]) -> Rows:
    looked_up = f"({format_count(run['embedding_parameters'])} only looked up)"
    yield "model", f"{describe_model(run)}: {format_count(run['parameters'])} parameters {looked_up}"
    yield "", format_sizes(run)
    scaling = run["rope_scaling"]
    scaled = "" if scaling is None else f" scaled by {scaling['factor']:g} from {scaling['original_context']} tokens"
    head = "shared with the embedding" if run["tie_embeddings"] else "apart from the embedding"
    norms = f"norm_eps {run['norm_eps']:g}, {'with' if run['qk_norm'] else 'no'} qk_norm"
    yield "", f"{run['architecture']}: rope_theta {run['rope_theta']:g}{scaled}, {norms}, head {head}"


def format_sizes(run: dict[str, Any]) -> str:
    """`4 layers, dim 128, …`."""
    heads = f"{run['heads']} heads ({run['kv_heads']} of keys and values)"
    blocks = f"{run['layers']} layers, dim {run['dim']}, {heads}, ffn_dim {run['ffn_dim']}"
    return f"{blocks}, vocabulary {run['vocab_size']}"


def _data_rows(data: dict[str, Any], recipe: Recipe, run: dict[str, Any]) -> Rows:
    used = f"uses {data['tokenizer_tokens']:,} of the {run['vocab_size']:,} rows of the vocabulary"
    yield "data", f"tokenizer {data['tokenizer']} {used}; documents are separated by {data['separator_in_words']}"
    for source in data["sources"]:
        weight = f", weight {source['weight']:g}" if source.get("weight") is not None else ""
        yield "", f"{source['name']}: {_texts_in_words(source)}{weight}"
    for stage in data["stages"]:
        until = "to the end" if stage["until"] is None else f"until {format_count(stage['until'])} tokens"
        yield "", f"{until}: {', '.join(f'{name} {weight:g}' for name, weight in stage['weights'].items())}"
    yield "", f"packing {data['packing']}, attention {describe_attention(recipe)}"
    every, section = recipe.validation.every_steps, recipe.data
    held_out = f"{section.validation_percent:g} % of the texts, held out"
    sets = "; ".join(f"{each['name']}: {_texts_in_words(each)}" for each in data["validation"]) or held_out
    number = f"{pluralize(recipe.validation.sequences, 'sequence')} every {pluralize(every, 'step')}"
    yield "", f"validation: {number}, of {sets}" if every else "validation: none"


def _texts_in_words(found: dict[str, Any]) -> str:
    number = f"{'more than ' * found['more_files']}{pluralize(found['files'], 'file')}, {format_bytes(found['bytes'])}"
    tokens = f", {format_count(found['tokens'])} tokens" if found["tokens"] else ""
    return ", ".join(found["paths"]) + (f" ({number}{tokens})" if found["files"] else "")


def _layout_rows(run: dict[str, Any]) -> Rows:
    step = f"{run['global_batch']} sequences x {run['sequence_length']} tokens"
    yield "training", f"{format_count(run['tokens'])} tokens = {run['steps']} steps x {step}"
    share = format_batch(run["data_ranks"], run["microbatches"], run["microbatch"])
    yield "batch", f"{share}; {format_count(run['tokens_per_step'])} tokens a step"
    waiting = f"; {pluralize(run['standby'], 'rank')} standing by" if run["standby"] else ""
    yield "mesh", ", ".join(f"{dimension} {degree}" for dimension, degree in run["mesh"].items()) + waiting
    if run["world"] == 1:
        return
    used, kept = (format_count(run[f"parameters_{which}"]) for which in ("used", "kept"))
    yield "a rank", f"computes with {used} parameters and keeps {kept} of them, at most"
    cut = {name: sizes for name, sizes in run["shapes"].items() if sizes["used"] != sizes["whole"]}
    for index, (name, sizes) in enumerate(cut.items()):
        local = f"{name.removesuffix('.weight')}: {format_shape(sizes['whole'])} -> {format_shape(sizes['used'])}"
        kept = "" if sizes["kept"] == sizes["used"] else f", of which it keeps {format_shape(sizes['kept'])}"
        yield "" if index else "shapes", local + kept


def _pipeline_rows(run: dict[str, Any]) -> Rows:
    if (pipeline := run["pipeline"]) is None:
        return
    stages, bubble = pipeline["stages"], pipeline["bubble_share"]
    idle = "" if bubble is None else f"; ranks idle {bubble:.1%} of the time where stages are even"
    yield "pipeline", f"{pipeline['schedule']}, {len(stages)} stages, balance {pipeline['balance']:.1%}{idle}"
    for stage in stages:
        first, *others = stage["modules"]
        ends = f"{first} … {others[-1]}" if others else first
        blocks, share = pluralize(stage["blocks"], "block"), f"{stage['flops_share']:.1%} of the operations"
        where = f"stage {stage['stage']} on pp {stage['rank']}: {ends} ({blocks})"
        yield "", f"{where}, {share}, {format_count(stage['parameters'])} parameters"


def _cost_rows(recipe: Recipe, run: dict[str, Any]) -> Rows:
    optimizer, shape = recipe.optimizer, recipe.schedule
    rates = ", ".join(f"{key} {getattr(optimizer, key):g}" for key in optimizer_spec(optimizer.name).rates)
    yield "optimizer", f"{optimizer.name} ({rates}), {shape.name} schedule, {shape.warmup_steps} steps of warm-up"
    memory = {part: format_bytes(size) for part, size in run["state_bytes"].items()}
    total = memory.pop("total")
    where = "; all but what is gathered in the host's" if recipe.parallel.offload else ""
    yield "memory", f"{total} a rank without activations: {', '.join(map(' '.join, memory.items()))}{where}"
    yield "", "the peak of a step is above that, by its activations: titanlite check --dry-run counts it"
    kept = f"the newest {recipe.checkpoint.keep_last}" if recipe.checkpoint.keep_last else "all"
    yield "disk", f"{format_bytes(run['checkpoint_bytes'])} a checkpoint, of which {kept} are kept"
    operations = f"{format_count(run['flops_per_token'])} operations a token, {run['flops']:.3g} in all"
    yield "compute", f"{recipe.precision.compute}; {operations}"
    yield "kernels", describe_kernels(recipe)
    if (float8 := run["float8"]) is not None:
        yield "float8", float8["summary"]
        yield from (("", f"{name}: {_product(factors)}") for name, factors in float8["settings"].items())
        if float8["sends_weights"]:
            yield "", "sent, shards of weights: e4m3"
        yield from (("", f"sent over tp, {gathered}") for gathered in float8["gathers_in_words"])
    yield "folder", str(expand(recipe.run.output_dir) / recipe.run.name)


def _product(factors: dict[str, Any] | None) -> str:
    if factors is None:
        return "in the compute dtype"
    left, right = (f"{factors[side]['format']}, a scale a {factors[side]['scale']}" for side in ("left", "right"))
    return f"{left if left == right else f'{left}, times {right}'}{'; fast sums' * factors['fast_accumulation']}"


def main(argv: list[str]) -> int:
    """`titanlite check`: print what a recipe will do, or all that is wrong with it (exit code 2)."""
    usage = "[--world N] [--show-plan | --show-schedule | --dry-run [--rank R]] [--json] | --explain KEY"
    description = "Say what a run will be, and what is wrong with its recipe. Touches no device."
    parser = RecipeParser("check", usage, description, nargs="?")
    started = launch_environment_or_default().size
    parser.add_argument("--world", type=int, default=started, metavar="N", help="ranks (devices); as many as started")
    parser.add_argument("--show-plan", action="store_true", help="how tp and cp share the model, module by module")
    parser.add_argument("--show-schedule", action="store_true", help="what each rank of a pipeline does when")
    parser.add_argument("--dry-run", action="store_true", help="run a rank's program on fake tensors: messages, memory")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="the rank of --dry-run; 0 if not given")
    parser.add_argument("--json", action="store_true", help="print an object instead of a table")
    parser.add_argument("--explain", metavar="KEY", help="explain a section or a key, such as training.steps")
    arguments, overrides = parse_with_overrides(parser, argv)
    if arguments.explain is not None:
        schema = find_key(arguments.explain)[1]
        print(json.dumps(schema, indent=2, ensure_ascii=False) if arguments.json else explain(arguments.explain))
        return EXIT_DONE
    if arguments.recipe is None:
        raise UsageError("titanlite check needs a recipe, such as configs/debug.toml, or --explain KEY.")
    if not 1 <= arguments.world < 2**31:
        raise UsageError(f"--world {str(arguments.world)[:20]}: a run has 1 rank or more, and fewer than 2^31.")
    shown: Any = {}
    try:
        loaded = load_recipe(arguments.recipe, overrides)
        findings = check_recipe(loaded, arguments.world)
        data, missing = survey(loaded.recipe.data)
        findings += loaded.locate(missing)  # warnings: the run may be on another machine
        shown = _view(loaded.recipe, arguments, data)
    except RecipeError as error:
        if not arguments.json:
            raise
        findings = error.findings
    if arguments.json:
        print(json.dumps({**shown, "findings": [dataclasses.asdict(finding) for finding in findings]}, indent=2))
        return EXIT_DONE if shown else EXIT_RECIPE
    print(shown, *(f"warning: {finding}" for finding in findings), sep="\n\n")
    return EXIT_DONE


def _view(recipe: Recipe, arguments: argparse.Namespace, data: dict[str, Any]) -> Any:
    """What was asked for: as a mapping with --json, else as text."""
    active = active_ranks(recipe, arguments.world)
    if arguments.show_plan:
        table = sharding_table(recipe)
        return {"plan": table} if arguments.json else format_sharding_table(table)
    if arguments.show_schedule:
        layout = require_layout(recipe.parallel, active)
        if layout.pp == 1:
            raise UsageError("--show-schedule: parallel.pp is 1, and one stage has no schedule.")
        microbatches = batch_plan(recipe, layout, 0).microbatches
        made = timetable.timetable(recipe.parallel.pipeline, stages_of(recipe, layout), layout.pp, microbatches)
        return {"schedule": made} if arguments.json else timetable.draw_timetable(made)
    if arguments.dry_run:
        from titanlite.dryrun.report import describe_dry_run, report  # needs torch

        run = (recipe, active, arguments.rank)
        return {"dry_run": describe_dry_run(*run)} if arguments.json else report(*run)
    if arguments.json:
        return {**describe_run(recipe, arguments.world), "data": data}
    return format_description(recipe, arguments.world, data)
