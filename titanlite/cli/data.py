"""`titanlite data`: texts into token files, and a look at what runs read of them. No torch."""

from __future__ import annotations

import argparse
import json
import sys
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from titanlite.checkpoint.format import Manifest, folder_name
from titanlite.checkpoint.storage import BEGINS_WITH, checkpoint_steps, read_manifest
from titanlite.corpus.prepare import find_inputs, prepare, texts_folder
from titanlite.corpus.token_file import TokenFile, TokenInfo, TokenizerInfo, paths_of
from titanlite.corpus.tokenizers import Tokenizer, Tokens, describe_separator, open_tokenizer, separator_warning
from titanlite.corpus.train_tokenizer import add_train_tokenizer_command
from titanlite.corpus.units import Request
from titanlite.corpus.workers import cores
from titanlite.data.read_log import READ, Audit, Span, audit, history, read_records, reordered_steps, samples_of
from titanlite.data.splits import Split, open_data
from titanlite.errors import EXIT_DONE, DamagedCheckpointError, DataError, GuardStop, UsageError
from titanlite.plan.layout import BatchPlan, sample_schedule
from titanlite.recipe.load import load_recipe, load_run_recipe
from titanlite.recipe.paths import input_argument, path_argument, text_argument
from titanlite.text import format_bytes, format_count, pluralize


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="titanlite data", description="Make token files, and look at what runs read.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_train_tokenizer_command(commands)
    added = {}
    for name, action, line in (
        ("prepare", _prepare, "tokenize texts into PREFIX.bin, .idx and .json; after a kill, it goes on where it was"),
        ("verify", _verify, "read token files from end to end, and name those that are damaged"),
        ("show", _show, "print the very text of a step's samples, of a run that was or of one to come"),
        ("audit", _audit, "prove from what ranks wrote down that a run read every sample once, over all its restarts"),
    ):
        added[name] = commands.add_parser(name, help=line, description=line, allow_abbrev=False)
        added[name].set_defaults(action=action)
        if name != "verify":
            added[name].add_argument("--json", action="store_true", help="print an object for machines")
    add = added["prepare"].add_argument
    add("inputs", nargs="+", type=input_argument, metavar="INPUT",
        help="text, .jsonl (both also .gz, .zst), .parquet, .arrow: files, folders, globs; or a folder that a Hugging "
             "Face dataset was saved to")  # fmt: skip
    add("--out", type=path_argument, required=True, metavar="PREFIX", help="where; no suffix")
    add("--tokenizer", type=text_argument, default="bytes", help="as data.tokenizer in a recipe")
    add("--separator", help="as data.separator in a recipe")
    add("--special-token", action="append", default=[], metavar="TOKEN", help="as in data.special_tokens; repeatable")
    add("--text-key", default="text", help="JSONL field, or column, that holds the text")
    add("--workers", type=int, default=0, metavar="N", help="processes; as many as cores if not given")
    add("--dedup", action="store_true", help="drop documents that are equal to an earlier one")
    line = "lines and rows without a text: stop at the first, or count them"
    add("--bad-lines", choices=("stop", "skip"), default="stop", help=line)
    line = "share of the documents for PREFIX-validation, chosen as by data.validation_percent"
    add("--held-out", type=float, default=0.0, metavar="PERCENT", help=line)
    add("--force", action="store_true", help="overwrite what PREFIX is now, once the new one is done")
    added["verify"].add_argument("prefixes", nargs="+", type=path_argument, metavar="PREFIX", help="as of prepare")
    add = added["show"].add_argument
    line = "of a run folder, what the step did read; of a recipe, what it will read if the run does not go back"
    add("recipe", type=path_argument, metavar="RECIPE|RUN", help=line)
    add("--step", type=int, required=True, metavar="N", help="step, from 1")
    add("--rank", type=int, metavar="R", help="only what data rank R reads, from 0")
    add("--data-ranks", type=int, metavar="D", help="with a recipe: of how many")
    line = "at most these of each sample; 0: all (default 1000)"
    add("--limit", type=int, default=1000, metavar="CHARACTERS", help=line)
    added["audit"].add_argument("run", type=path_argument, metavar="RUN", help="run folder, such as runs/debug")
    arguments = parser.parse_args(argv)
    arguments.action(arguments)
    return EXIT_DONE


def _prepare(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.held_out < 100:
        raise UsageError("--held-out must be a percentage from 0 to below 100.")
    if arguments.workers < 0:
        raise UsageError("--workers must be at least 1.")
    paths_of(arguments.out)  # refuses a folder
    special = tuple(arguments.special_token)
    tokenizer = open_tokenizer(arguments.tokenizer, arguments.separator, special)
    print(f"documents are separated by {describe_separator(tokenizer)}", file=sys.stderr)
    if finding := separator_warning(tokenizer, arguments.separator):
        print(f"warning: {finding.problem} give --separator.", file=sys.stderr)
    request = Request(
        inputs=tuple(arguments.inputs), out=arguments.out, tokenizer=TokenizerInfo.of(arguments.tokenizer, tokenizer),
        separator=arguments.separator, special_tokens=special, text_key=arguments.text_key,
        held_out_percent=arguments.held_out, skip_bad_lines=arguments.bad_lines == "skip", force=arguments.force,
        drop_duplicates=arguments.dedup, workers=arguments.workers or cores(),
    )  # fmt: skip
    made = prepare(request, find_inputs(request.inputs, request.text_key))
    if arguments.json:
        print(json.dumps({str(prefix): info.model_dump() for prefix, info in made.items()}, indent=1))
        return
    for prefix, info in made.items():
        print(f"{prefix}: {format_count(info.tokens)} tokens, {format_bytes(info.bin_bytes + info.idx_bytes)}")
        print("\n".join(f"  {line}" for line in describe_token_info(info)))


def _verify(arguments: argparse.Namespace) -> None:
    for prefix in arguments.prefixes:
        file = TokenFile.open(prefix)
        if file.info is None:
            raise UsageError(f"{prefix}.json: missing; without it nothing is known that could be verified.")
        file.verify_hashes()
        print(f"{prefix}: whole: {file.documents:,} documents, {len(file.tokens):,} tokens")


def describe_token_info(info: TokenInfo) -> Iterator[str]:
    """The statistics, for people."""
    yield f"documents        {info.documents:,}"
    yield f"tokens           {info.tokens:,} as {info.dtype}, separators among them"
    yield f"bytes per token  {info.text_bytes / info.tokens:.3f}"
    yield f"lengths          {', '.join(f'{name} {count:,}' for name, count in info.lengths.items())}"
    if info.duplicates:
        yield f"duplicates       {info.duplicates:,} dropped"
    if info.bad_lines:
        yield f"bad lines        {info.bad_lines:,} skipped"
        yield from (f"  {line}" for line in info.bad_line_examples)
    if (more := info.bad_lines - len(info.bad_line_examples)) > 0:
        yield f"  and {more:,} more"


def _newest_manifest(run: Path) -> Manifest | None:
    """That of the newest checkpoint that has a whole one; None without any."""
    for step in reversed(checkpoint_steps(run / "checkpoints")):
        with suppress(DamagedCheckpointError, FileNotFoundError):  # what deletes old ones may do so just now
            return read_manifest(run / "checkpoints" / folder_name(step))
    return None


def _audit(arguments: argparse.Namespace) -> None:
    run: Path = arguments.run
    recipe = load_run_recipe(run)
    manifest = _newest_manifest(run)  # before the records, which are brought to the disk before a checkpoint is
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


def _report(found: Audit, unsaved: int) -> Iterator[str]:
    others = f"; {pluralize(unsaved, 'step')} after the newest checkpoint do not count" if unsaved else ""
    layouts = ", ".join(f"{each['data_ranks']} (steps {_span(each['steps'])})" for each in found.layouts)
    yield f"steps       {found.steps}{others}"
    yield f"samples     {found.samples}"
    yield f"lost        {_spans(found.lost)}"
    yield f"repeated    {_spans(found.repeated)}"
    yield f"digest      {found.digest}"
    yield f"restarts    {found.restarts}"
    yield f"data ranks  {layouts or 'none'}"
    if found.unrecorded:
        yield f"steps without a record  {_spans(found.unrecorded)}"
    if not found.in_order:
        yield "order       a step read samples that come before those of the step before it"
    for step in found.reordered:
        yield f"order       another one from step {step} on: some texts may be read twice, others never"
    for each in found.skipped:
        where = "before" if each["by"] == "data.skip_steps" else "after"
        yield f"passed over samples {_span(each['samples'])} {where} step {each['step']} ({each['by']})"


def _size(spans: Sequence[Span]) -> int:
    return sum(last - first + 1 for first, last in spans)


def _span(span: Span) -> str:
    return f"{span[0]} to {span[1]}"


def _spans(spans: Sequence[Span]) -> str:
    shown = ", ".join(map(_span, spans[:10])) + ", …" * (len(spans) > 10)
    return f"{_size(spans)}: {shown}" if spans else "none"


def _show(arguments: argparse.Namespace) -> None:
    path, step, rank, ranks = arguments.recipe, arguments.step, arguments.rank, arguments.data_ranks
    if step < 1 or arguments.limit < 0:
        raise UsageError("--step must be at least 1, and --limit at least 0.")
    if is_run := path.is_dir():
        recipe = load_run_recipe(path)
        reads = history(read_records(path))
        reads = reads[reads["kind"] == READ]
        of_step = reads[reads["step"] == step]
        if ranks is not None:
            raise UsageError("--data-ranks is for recipes: a run has written down how many there were.")
        if not of_step.size:
            recorded = f"it has some of steps {reads['step'].min()} to {reads['step'].max()}"
            raise UsageError(f"{path} has no record of step {step}; {recorded}.")
        ranks = int(of_step["ranks"][0])
        numbers = samples_of(of_step if rank is None else of_step[of_step["rank"] == rank]).tolist()
    else:
        recipe = load_recipe(path).recipe
        if (rank is None) != (ranks is None):
            raise UsageError("--rank and --data-ranks go together: which data rank, of how many.")
        plan = BatchPlan(recipe.training.global_batch, ranks or 1, rank or 0, 1)
        numbers = [*plan.samples(sample_schedule(recipe).first_sample(step))]
    if not 0 <= (rank or 0) < (ranks or 1):
        raise UsageError(f"--rank {rank}: there are {ranks} data ranks, counted from 0.")
    context, texts = recipe.training.sequence_length, texts_folder(recipe.run)
    data = open_data(recipe.data, context, recipe.run.seed, validated=False, texts_folder=texts)
    if is_run:
        _require_same_order(path, data.train, step)
    samples = [_describe(data.train, data.tokenizer, number, arguments.limit) for number in numbers]
    batch = min(numbers, default=0) // recipe.training.global_batch + 1
    if arguments.json:
        print(json.dumps({"step": step, "batch": batch, "samples": samples}, indent=1))
        return
    print(f"step {step}: {pluralize(len(samples), 'sample')} of batch {batch} (as data.skip_steps counts)")
    for each in samples:
        document = f", document {each['document']}" if each["document"] is not None else ""
        place = f"{each['file'] or 'texts'}, from token {each['token']}{document}"
        print(f"\nsample {each['sample']}: {each['source']}, window {each['window']} ({place})")
        print("\n".join(f"  | {line}" for line in each["text"].split("\n")))


def _require_same_order(run: Path, split: Split, step: int) -> None:
    """The numbers that a step wrote down must stand for the same texts still."""
    manifest = _newest_manifest(run)
    values, last = (manifest.values, manifest.step) if manifest else ({}, 0)
    if (change := max(reordered_steps(values), default=0)) > step:
        raise DataError(f"{run} went on in another order from step {change} on: the recipe of step {step} is not kept.")
    if step > last:
        print(f"warning: no checkpoint has step {step}: its texts may have changed since", file=sys.stderr)
    past = split.past(manifest.samples) if manifest else {}
    if any(values.get(key, value) != value for key, value in past.items()):
        changed = "a file of its text has changed since, or [data] of its recipe.toml"
        raise DataError(f"the samples are not what {run} was trained on: {changed}.")


def _describe(split: Split, tokenizer: Tokenizer, number: int, limit: int) -> dict[str, Any]:
    """A sample: where it lies (no file or document if texts are tokenized as they are read), and at most `limit`
    characters of its text, inputs and the last label; 0: all."""
    source, window = split.place(number)
    stream, packed, number_there = source.locate(window)
    token = packed.first(number_there)
    file, document = "", None
    if isinstance(stream, TokenFile):
        file, numbers = str(stream.prefix), range(stream.documents)
        document = bisect_right(numbers, token, key=lambda each: int(stream.document_bounds(each, each + 1)[0])) - 1
    text = _readable(source.window(window), tokenizer)
    if limit and (more := len(text) - limit) > 0:
        text = f"{text[:limit]} … and {more} characters more"
    place = {"window": window, "file": file, "token": token, "document": document}
    return {"sample": number, "source": source.name, **place, "text": text}


def _readable(tokens: Tokens, tokenizer: Tokenizer) -> str:
    """The text of tokens, its lines as lines; whatever else does not show, or is no UTF-8, as an escape."""
    pieces = np.split(tokens, np.flatnonzero(tokens == tokenizer.separator))
    decoded = (tokenizer.decode(piece[piece != tokenizer.separator]) for piece in pieces)
    text = "⟨document ends⟩".join(piece.decode("utf-8", "backslashreplace") for piece in decoded)
    shows = (sign == "\n" or unicodedata.category(sign)[0] != "C" for sign in text)
    return "".join(sign if so else sign.encode("unicode_escape").decode() for sign, so in zip(text, shows, strict=True))
