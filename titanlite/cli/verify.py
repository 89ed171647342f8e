"""`titanlite verify`: check the recipe, shrink it, run it against one process, print the differences."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from titanlite.cli.check import check_recipe, format_sizes
from titanlite.errors import EXIT_DONE, CommandLineError, GuardStop
from titanlite.plan.describe import describe_run
from titanlite.plan.launch import launch_environment
from titanlite.plan.layout import active_ranks
from titanlite.plan.rules import apply_rules
from titanlite.recipe.load import RecipeParser, load_recipe, parse_with_overrides
from titanlite.recipe.sections import Recipe
from titanlite.text import format_count, format_table
from titanlite.verify.shrink import shrink
from titanlite.verify.verdict import Comparison, NumberDifference, first_difference

_LEAST_TIMEOUT_SECONDS = 600.0  # other ranks wait while the first one runs, and perhaps compiles, alone
_MOST_STEPS = 1000


def main(argv: list[str]) -> int:
    """`titanlite verify`: 0 if the layout computes what one process does, else `GuardStop` (exit code 3)."""
    description = "Prove, by a small model, that a layout computes what one process does. Start it like the training."
    parser = RecipeParser("verify", "[--steps N] [--json]", description)
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="optimizer steps to compare (4)")
    parser.add_argument("--json", action="store_true", help="print an object instead of tables")
    arguments, overrides = parse_with_overrides(parser, argv)
    if not 1 <= arguments.steps <= _MOST_STEPS:
        raise CommandLineError(f"--steps {arguments.steps}: give 1 to {_MOST_STEPS}; a wrong layout shows in a few.")
    launch = launch_environment()
    loaded = load_recipe(arguments.recipe, overrides)
    check_recipe(loaded, launch.size)
    recipe = loaded.recipe
    if (active := active_ranks(recipe, launch.size)) < launch.size:
        raise CommandLineError(f"the layout has places for {active} ranks; start {active}: here, none stands by.")
    small = shrink(recipe, launch.size, arguments.steps)
    errors = [finding for finding in apply_rules(small, launch.size) if finding.severity == "error"]
    assert not errors, f"shrinking made a legal recipe illegal: {errors}"
    notes = ["float8 is left out: products are compared in the compute dtype"] * recipe.precision.float8.enabled
    if notes and launch.is_first:
        print(*notes, file=sys.stderr)
    found = verify(small, report=launch.is_first and not arguments.json)
    difference = first_difference(found)
    if launch.is_first and arguments.json:
        values = {
            "notes": notes,
            "same": difference is None,
            "first_difference": difference,
            "run": describe_run(small, launch.size),
            "passes": [{**asdict(each), "same": first_difference([each]) is None} for each in found],
        }
        print(json.dumps(values, indent=2))
    if difference is not None:
        raise GuardStop(
            f"{difference}. Do not train with it. To find out where it comes from, run this again with less of "
            "[parallel], or without compile and recompute: whatever makes the difference go away takes part in it."
        )
    return EXIT_DONE


def verify(recipe: Recipe, report: bool) -> list[Comparison]:
    """Compare a shrunken recipe's layout with one process on all ranks; `report`: print each part as it is done."""
    from titanlite.parallel.world import explain_full_memory, join_world
    from titanlite.verify.compare import compare_layout

    def show(*lines: str) -> None:
        if report:
            print(*lines, sep="\n", flush=True)

    found = []
    timeout = max(recipe.parallel.timeout_seconds, _LEAST_TIMEOUT_SECONDS)
    with join_world(recipe.run.deterministic, timeout) as world, explain_full_memory():
        show(*_header(recipe, world.size, world.device.type))
        for each in compare_layout(recipe, world):
            found.append(each)
            show("", *_table(each))
    show("", _verdict(found))
    return found


def _header(recipe: Recipe, world: int, device: str) -> Iterator[str]:
    run, parallel = describe_run(recipe, world), recipe.parallel
    parts = {
        **{f"{dimension} {degree}": degree > 1 for dimension, degree in run["mesh"].items()},
        f"ZeRO stage {parallel.zero_stage}": world > 1,
        parallel.pipeline.schedule: parallel.pp > 1,
        f"{parallel.cp_method} keys": parallel.cp > 1,
        f"{recipe.recompute.mode} recomputation": recipe.recompute.mode != "none",
        "compiled": recipe.compile.enabled,
        f"{run['microbatches']} x {run['microbatch']} sequences a rank": True,
    }
    yield f"layout     {', '.join(part for part, shown in parts.items() if shown)}, on {world} x {device}"
    yield "reference  one process, nothing shared, recomputed or compiled"
    size = f"{format_count(run['parameters'])} parameters: {format_sizes(run)}"
    yield f"model      {run['preset']}, shrunken to {size}"
    batch = f"{run['global_batch']} sequences x {run['sequence_length']} tokens"
    yield f"training   {run['steps']} steps of {batch}, {recipe.optimizer.name}"


def _table(found: Comparison) -> Iterator[str]:
    allowed = found.tolerance
    explained = f"{allowed.loss:.1e} of the loss, {allowed.grad_norm:.1e} of the gradient norm"
    yield f"{found.compute}: rounding explains {explained}"
    yield from found.notes
    compared = ("loss", "reference", "apart", "grad norm", "reference", "apart")
    rows: list[tuple[str, ...]] = [("step", *compared, "weights", "allowed", "the weight that differs most")]
    for row in found.rows:
        numbers = [*_format_number(row.loss), *_format_number(row.grad_norm)] if row.step else [""] * 6
        weight = row.weight
        rows.append((str(row.step), *numbers, f"{weight.difference:.1e}", f"{weight.allowed:.1e}", weight.name))
    yield from format_table(rows, right=range(9))


def _format_number(number: NumberDifference) -> tuple[str, str, str]:
    return f"{number.here:.9f}", f"{number.reference:.9f}", f"{number.difference:.1e}"


def _verdict(found: Sequence[Comparison]) -> str:
    if first_difference(found) is not None:
        return "NOT the same"
    parts = []
    for each in found:
        most = [max(getattr(row, part).difference for row in each.rows) for part in ("loss", "grad_norm", "weight")]
        parts.append("{}: loss {:.1e}, gradient norm {:.1e}, weights {:.1e}".format(each.compute, *most))
    return f"the same; at most apart in {'; in '.join(parts)}"
