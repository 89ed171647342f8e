"""`titanlite data audit`: proves from a run's records that no sample was lost or read twice."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from titanlite.checkpoint.examine import BEGINS_WITH
from titanlite.checkpoint.format import DamagedCheckpointError, Manifest
from titanlite.checkpoint.storage import checkpoint_steps, read_manifest
from titanlite.data.audit import Audit, Span, audit, history, reordered_steps
from titanlite.data.read_log import READ, read_records
from titanlite.errors import GuardStop, UsageError
from titanlite.recipe.load import load_recipe
from titanlite.recipe.paths import path_argument
from titanlite.recipe.sections import Recipe
from titanlite.text import pluralize


def add_audit_command(commands: Any) -> None:
    """Add it to the parsers of `titanlite data`."""
    line = "prove from what the ranks wrote down that a run read every sample once, over all its restarts"
    command = commands.add_parser("audit", help=line, description=line, allow_abbrev=False)
    command.set_defaults(action=_audit)
    command.add_argument("run", type=path_argument, metavar="RUN", help="run folder, such as runs/debug")
    command.add_argument("--json", action="store_true", help="print the findings for machines")


def recipe_of_run(run: Path) -> Recipe:
    """The resolved recipe of a run. Raises `UsageError`."""
    if not (run / "recipe.toml").is_file():
        raise UsageError(f"{run} is no run folder: it holds no recipe.toml.")
    return load_recipe(run / "recipe.toml", stored=True).recipe


def newest_manifest(run: Path) -> Manifest | None:
    """That of the newest checkpoint that has a whole one; None without any."""
    for step in reversed(checkpoint_steps(run / "checkpoints")):
        try:
            return read_manifest(run / "checkpoints" / f"step-{step:08d}")
        except (DamagedCheckpointError, FileNotFoundError):  # what deletes old ones may do so just now
            continue
    return None


def _audit(arguments: argparse.Namespace) -> None:
    run: Path = arguments.run
    recipe = recipe_of_run(run)
    manifest = newest_manifest(run)  # before the records, which are brought to the disk before a checkpoint is
    records = read_records(run)
    step, end = (manifest.step, manifest.samples) if manifest else (0, 0)
    elsewhere = (run / "checkpoints" / BEGINS_WITH).exists()
    found = audit(records, step, end, elsewhere, reordered_steps(manifest.values if manifest else {}))
    whole = history(records)
    unsaved = len(set(whole["step"][(whole["kind"] == READ) & (whole["step"] > step)].tolist()))
    if arguments.json:
        sizes = {name: _size(getattr(found, name)) for name in ("lost", "repeated", "unrecorded")}
        spans = {"lost_samples": found.lost, "repeated_samples": found.repeated, "unrecorded_steps": found.unrecorded}
        print(json.dumps({**asdict(found), **sizes, **spans, "unsaved_steps": unsaved}, indent=1))
    else:
        verdict = f"{'' if found.whole else 'NOT '}every sample was read in its turn, and once"
        print(f"{run}: {verdict if found.steps else 'no step is saved yet'}", *_report(found, unsaved), sep="\n")
    if not found.whole:
        why = " (debug.overfit_one_batch repeats the first samples on purpose)" * recipe.debug.overfit_one_batch
        raise GuardStop(f"{run}: not every sample was read in its turn, and once{why}.")


def _report(found: Audit, unsaved: int) -> list[str]:
    others = f"; {pluralize(unsaved, 'step')} after the newest checkpoint do not count" if unsaved else ""
    layouts = ", ".join(f"{each['data_ranks']} (steps {_span(each['steps'])})" for each in found.layouts)
    lines = [
        f"steps       {found.steps}{others}",
        f"samples     {found.samples}",
        f"lost        {_spans(found.lost)}",
        f"repeated    {_spans(found.repeated)}",
        f"digest      {found.digest}",
        f"restarts    {found.restarts}",
        f"data ranks  {layouts or 'none'}",
    ]
    if found.unrecorded:
        lines.append(f"steps without a record  {_spans(found.unrecorded)}")
    if not found.in_order:
        lines.append("order       a step read samples that come before those of the step before it")
    for step in found.reordered:
        lines.append(f"order       another one from step {step} on: some texts may be read twice, others never")
    for each in found.skipped:
        where = "before" if each["by"] == "data.skip_steps" else "after"
        lines.append(f"passed over samples {_span(each['samples'])} {where} step {each['step']} ({each['by']})")
    return lines


def _size(spans: Sequence[Span]) -> int:
    return sum(last - first + 1 for first, last in spans)


def _span(span: Span) -> str:
    return f"{span[0]} to {span[1]}"


def _spans(spans: Sequence[Span]) -> str:
    shown = ", ".join(map(_span, spans[:10])) + ", …" * (len(spans) > 10)
    return f"{_size(spans)}: {shown}" if spans else "none"
