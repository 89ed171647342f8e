"""Rules about `[parallel]`: the mesh, who shares matrices, sequences and the batch, stages and their schedules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import lcm, prod

from titanlite.errors import Finding
from titanlite.optim.base import OPTIMIZERS
from titanlite.plan.layout import batch_plan, ceil_div, layout_of
from titanlite.plan.memory import MAX_CHUNKS, count_parts
from titanlite.plan.placement import find_placements, pattern_of
from titanlite.plan.rules.lookup import divisors, find_config, find_spec, warning
from titanlite.plan.rules.run import heads
from titanlite.plan.stages import IN_ROUNDS, fixes_stages, splits_backward, stages_per_rank, takes_microbatches
from titanlite.recipe.sections import Recipe
from titanlite.text import format_batch, join_choices, pluralize

_OTHER_PARTS = 1000
"""More than a checkpoint holds beside weights and moments."""
RANKS_IN_A_MACHINE = 8
"""Devices that most machines have, joined by the fast links that tensor parallelism lives on."""


def mesh(recipe: Recipe, world: int) -> Iterator[Finding]:
    """The mesh has as many places as there are ranks."""
    parallel = recipe.parallel
    if parallel.dp_shard == 0:
        yield Finding("parallel.dp_shard", "a model cannot be cut over 0 ranks;", "write -1 for all that are left.")
        return
    if layout_of(parallel, world) is not None:
        return
    degrees = {name: getattr(parallel, name) for name in ("dp_replicate", "dp_shard", "cp", "tp", "pp")}
    given = {name: degree for name, degree in degrees.items() if degree > 1}
    asked = prod(given.values())
    fitting = {name: world // rest for name in given if world % (rest := asked // given[name]) == 0}
    product = " x ".join(f"{name} {degree}" for name, degree in given.items()) or "dp_shard 1"
    problem = f"{product} = {asked}" if len(given) > 1 else product
    if parallel.dp_shard == -1:
        key, verb, ranks = next(iter(fitting or given)), "does not divide", f"a multiple of {asked} ranks"
        fixes = [f"{name} = {join_choices(divisors(room))}" for name, room in fitting.items()]
    else:
        key, verb, ranks = "dp_shard", "does not give", pluralize(asked, "rank")
        open_ended = world % (asked // max(parallel.dp_shard, 1)) == 0
        fixes = ["dp_shard = -1"] if open_ended else [f"{name} = {room}" for name, room in fitting.items()]
    others = f"write {', or '.join(fixes)}; or " if fixes else ""
    fix = f"{others}start {ranks} (titanlite check --world {asked})."
    yield Finding(f"parallel.{key}", f"{problem} {verb} {pluralize(world, 'rank')};", fix)


def standing_by(active: int, world: int) -> Finding:
    """Ranks that have no place in the mesh, where the recipe lets them wait."""
    problem = f"the largest mesh that fits takes {pluralize(active, 'rank')}: {world - active} of {world} stand by"
    return warning("resilience.standby", problem, "until the run starts with other ranks.")


def cuts(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Every tensor parallel rank has a part of every matrix."""
    spec, config, tp = find_spec(recipe), find_config(recipe), recipe.parallel.tp
    if spec is None or tp <= (limit := spec.cut_limit(config)):
        return
    problem = f"{tp} ranks are more than the {pluralize(limit, 'part')} that the model's matrices can be cut into"
    fix = f"write {join_choices([degree for degree in divisors(tp) if degree <= limit])}."
    yield Finding("parallel.tp", f"{problem} (a key and value head stays whole);", fix)


def uneven_cuts(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Matrices whose parts are of different sizes: the ranks with less wait."""
    spec, config, tp = find_spec(recipe), find_config(recipe), recipe.parallel.tp
    if spec is None or any(heads(recipe, world)) or tp == 1 or tp > spec.cut_limit(config):
        return
    names: dict[int, list[str]] = {}
    patterns = {pattern_of(name): shape for name, shape in spec.shapes(config).items()}
    for name, placement in find_placements(patterns, spec.sharding(config)).items():
        if placement.units % tp:
            names.setdefault(placement.units, []).append(name.removesuffix(".weight").rpartition(".")[2])
    for units, modules in names.items():
        idle = 1 - units / (ceil_div(units, tp) * tp)
        problem = f"{units} parts of {', '.join(modules)} on {tp} ranks: {idle:.1%} of their time is waiting;"
        even = [degree for degree in divisors(units) if degree <= spec.cut_limit(config)]
        yield warning("parallel.tp", problem, f"{join_choices(even)} would be even.")


def sequences(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Ranks that share a sequence have parts of the same length."""
    cp, tp, length = recipe.parallel.cp, recipe.parallel.tp, recipe.training.sequence_length
    parts = cp * lcm(2, tp) if cp > 1 else tp
    if length % parts:
        ends = ", each with two ends of the text" if cp > 1 else ""
        problem = f"{length} tokens cannot be cut into {parts} parts, for cp = {cp} x tp = {tp} ranks{ends};"
        fix = f"choose a multiple of {parts}, such as {ceil_div(length, parts) * parts}."
        yield Finding("training.sequence_length", problem, fix)


def machines(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Tensor parallelism communicates within every block: it belongs inside one machine."""
    tp = recipe.parallel.tp
    if world > RANKS_IN_A_MACHINE and RANKS_IN_A_MACHINE % tp:
        problem = f"groups of {tp} ranks lie across machines of {RANKS_IN_A_MACHINE} devices, as most have, and every"
        fix = "use a degree that divides a machine's devices, and pp or dp_shard between machines."
        yield warning("parallel.tp", f"{problem} block would wait for the network;", fix)


def parts(recipe: Recipe, world: int) -> Iterator[Finding]:
    """A checkpoint's table of parts is not longer than what can be read back."""
    spec, layout = find_spec(recipe), layout_of(recipe.parallel, world)
    if spec is None or layout is None or any(heads(recipe, world)) or recipe.optimizer.name not in OPTIMIZERS:
        return
    most, number = MAX_CHUNKS - _OTHER_PARTS, count_parts(recipe, spec, layout)
    if number > most:
        problem = f"a checkpoint would be a table of {number:,} parts, and {MAX_CHUNKS:,} can be read back;"
        replicate, shard = layout.dp_replicate, layout.dp_shard
        meshes = (replace(layout, dp_replicate=replicate * n, dp_shard=shard // n) for n in divisors(shard))
        fits = next((each for each in meshes if count_parts(recipe, spec, each) <= most), None)
        if fits is None:
            yield Finding("model", problem, "give a smaller model, or fewer ranks.")
        else:
            degrees = f"dp_replicate = {fits.dp_replicate}, dp_shard = {fits.dp_shard}"
            yield Finding("parallel.dp_replicate", problem, f"cut the weights over fewer ranks, such as by {degrees}.")


def rounded_sums(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Gradients that wait on a rank to be sent add up in the dtype that they will travel in."""
    layout, parallel = layout_of(recipe.parallel, world), recipe.parallel
    if layout is None or recipe.precision.reduce != "bfloat16" or recipe.precision.compute == "float64":
        return
    passes = batch_plan(recipe, layout, 0).microbatches
    halved = layout.pp > 1 and splits_backward(parallel.pipeline.schedule)
    waits = parallel.zero_stage <= 1 or halved or layout.dp_replicate > 1
    if (layout.data_ranks * layout.cp > 1 or parallel.offload) and passes > 1 and waits:
        problem = f"gradients of {passes} microbatches add up in bfloat16 before they are sent: small ones are lost;"
        yield warning("precision.reduce", problem, "write float32, or have zero_stage = 2 or 3 without dp_replicate.")


def padding(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Sequences that are computed and weigh nothing, because the batch does not divide evenly."""
    layout = layout_of(recipe.parallel, world)
    if layout is None or any(microbatches(recipe, world)):
        return
    training, plan, ranks = recipe.training, batch_plan(recipe, layout, 0), layout.data_ranks
    computed = plan.microbatches * plan.microbatch * ranks
    if computed == training.global_batch:
        return
    share = ceil_div(training.global_batch, ranks)
    waste = f"{(computed - training.global_batch) / computed:.0%} are padding;"
    problem = f"{format_batch(ranks, plan.microbatches, plan.microbatch)} = {computed} sequences: {waste}"
    if plan.microbatches * plan.microbatch == share:
        fix = f"the next batch that {ranks} ranks share evenly is {share * ranks}."
        yield warning("training.global_batch", problem, fix)
    else:
        key = "parallel.pipeline.microbatches" if training.microbatch is None else "training.microbatch"
        yield warning(key, problem, f"a number that divides a rank's share of {share} wastes nothing.")


def microbatches(recipe: Recipe, world: int) -> Iterator[Finding]:
    """The two ways to say how a rank's share of the batch is cut agree."""
    layout, training = layout_of(recipe.parallel, world), recipe.training
    wanted, size = recipe.parallel.pipeline.microbatches, training.microbatch
    if layout is None or layout.pp == 1 or wanted is None or size is None:
        return
    share = ceil_div(training.global_batch, layout.data_ranks)
    made = ceil_div(share, size)
    if made != wanted:
        cut = f"{pluralize(share, 'sequence')} makes {pluralize(made, 'microbatch')} of {size}"
        fix = "leave it out, or training.microbatch."
        yield Finding("parallel.pipeline.microbatches", f"a rank's share of {cut}, not {wanted};", fix)


def stages(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Each stage has a part of the model."""
    spec, layout, section = find_spec(recipe), layout_of(recipe.parallel, world), recipe.parallel.pipeline
    if spec is None or layout is None or layout.pp == 1:
        return
    pieces = len(spec.pieces(find_config(recipe), recipe.training.sequence_length))
    number, blocks, given = layout.pp * stages_per_rank(section), pieces - 2, section.blocks_per_stage
    if given is None and number > pieces:
        problem = f"{number} stages ({layout.pp} ranks x {stages_per_rank(section)}) are more than {blocks} blocks,"
        key = "parallel.pp" if fixes_stages(section.schedule) else "parallel.pipeline.stages_per_rank"
        yield Finding(key, f"{problem} the embedding and the head can fill;", f"have at most {pieces} stages.")
    if given is None:
        return
    key, fix = "parallel.pipeline.blocks_per_stage", f"give {number} numbers that add up to {blocks}, or leave it out."
    if len(given) != number:
        problem = f"{len(given)} stages are given where {section.schedule} on {layout.pp} ranks has {number};"
        yield Finding(key, problem, fix)
    elif sum(given) != blocks:
        problem = f"{' + '.join(map(str, given))} = {sum(given)} blocks, and the model has {blocks};"
        yield Finding(key, problem, fix)
    elif not all(given[1:-1]):
        fix = "only the first (with the embedding) and the last (with the head) can do without blocks."
        yield Finding(key, f"stage {given.index(0, 1)} would be empty;", fix)


def rounds(recipe: Recipe, world: int) -> Iterator[Finding]:
    """The schedule can go through a rank's microbatches."""
    layout, schedule = layout_of(recipe.parallel, world), recipe.parallel.pipeline.schedule
    if layout is None or layout.pp == 1:
        return
    pp, number = layout.pp, batch_plan(recipe, layout, 0).microbatches
    if takes_microbatches(schedule, pp, number):
        return
    if schedule in IN_ROUNDS:
        rounds = number // pp
        more = min((number // rounds + 1) * rounds, pp * (rounds + 1))
        problem = f"{schedule} goes through {number} microbatches in {rounds} rounds, which do not divide them;"
    else:
        more = pp if schedule == "1F1B" else 2 * pp
        problem = f"{schedule} on {pp} ranks fills its stages with {more} microbatches or more, not {number};"
    fix = f"have {more}: by a smaller training.microbatch or another global_batch."
    yield Finding("parallel.pipeline.microbatches", problem, fix)
