"""Rules about `[parallel]`: the mesh, who shares matrices and sequences, and how the batch falls on the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import lcm, prod

from titanlite.errors import Finding
from titanlite.optim.base import OPTIMIZERS
from titanlite.plan.checkpoint_parts import MAX_CHUNKS, count_parts
from titanlite.plan.layout import batch_plan, ceil_div, layout_of
from titanlite.plan.placement import find_placements, pattern_of
from titanlite.plan.rules.lookup import divisors, find_config, find_spec, warning
from titanlite.plan.rules.run import heads
from titanlite.plan.stages import splits_backward
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
    open_ended = parallel.dp_shard == -1
    if open_ended:
        fixes = [f"{name} = {join_choices(divisors(room))}" for name, room in fitting.items()]
        start = f"start a multiple of {asked} ranks (titanlite check --world {asked})"
    else:
        fixes = [f"{name} = {room}" for name, room in fitting.items()]
        if world % (asked // max(parallel.dp_shard, 1)) == 0:
            fixes = ["dp_shard = -1 for all that are left"]
        start = f"start {pluralize(asked, 'rank')} (titanlite check --world {asked})"
    product = " x ".join(f"{name} {degree}" for name, degree in given.items()) or "dp_shard 1"
    problem = f"{product} = {asked}" if len(given) > 1 else product
    verb = "does not divide" if open_ended else "does not give"
    key = "dp_shard" if not open_ended else next(iter(fitting or given))
    fix = f"write {', or '.join(fixes)}; or {start}." if fixes else f"{start}."
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
    unsound = next(heads(recipe, world), None) is not None  # the sizes do not fit together: there are no parts
    if spec is None or unsound or tp == 1 or tp > spec.cut_limit(config):
        return
    names: dict[int, list[str]] = {}
    patterns = {pattern_of(name): shape for name, shape in spec.shapes(config).items()}
    for name, placement in find_placements(patterns, spec.sharding(config)).items():
        if placement.units % tp:
            names.setdefault(placement.units, []).append(name.removesuffix(".weight").rpartition(".")[2])
    for units, modules in names.items():
        idle = 1 - units / (ceil_div(units, tp) * tp)
        problem = (
            f"{units} parts of {', '.join(modules)} are dealt out to {tp} ranks: {idle:.1%} of their time is waiting;"
        )
        even = [degree for degree in divisors(units) if degree <= spec.cut_limit(config)]
        yield warning("parallel.tp", problem, f"{join_choices(even)} would be even.")


def sequences(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Ranks that share a sequence have parts of the same length."""
    cp, tp, length = recipe.parallel.cp, recipe.parallel.tp, recipe.training.sequence_length
    parts = cp * lcm(2, tp) if cp > 1 else tp
    if length % parts == 0:
        return
    if cp == 1:
        problem = f"{length} tokens cannot be shared out evenly to tp = {tp} ranks;"
    else:
        ranks = f"cp = {cp}" if tp == 1 else f"cp = {cp} x tp = {tp}"
        problem = (
            f"{length} tokens cannot be cut into {parts} parts: for {ranks} ranks, each with two ends of the text;"
        )
    fix = f"choose a multiple of {parts}, such as {ceil_div(length, parts) * parts}."
    yield Finding("training.sequence_length", problem, fix)


def machines(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Tensor parallelism communicates within every block: it belongs inside one machine."""
    tp, most = recipe.parallel.tp, RANKS_IN_A_MACHINE
    if tp > most:
        problem = f"{tp} ranks are more than the {most} devices of most machines, and every block would wait for the"
        fix = f"if yours have fewer than {tp}, use pp or dp_shard."
        yield warning("parallel.tp", f"{problem} network between machines;", fix)
    elif world > most and most % tp:
        problem = f"groups of {tp} do not fill machines of {most} devices, and in those that lie across two every block"
        yield warning(
            "parallel.tp", f"{problem} waits for the network;", "use a degree that divides a machine's devices."
        )


def parts(recipe: Recipe, world: int) -> Iterator[Finding]:
    """A checkpoint's table of parts is not longer than what can be read back."""
    spec, layout = find_spec(recipe), layout_of(recipe.parallel, world)
    if spec is None or layout is None or any(heads(recipe, world)) or recipe.optimizer.name not in OPTIMIZERS:
        return
    most, number = MAX_CHUNKS - _OTHER_PARTS, count_parts(recipe, spec, layout)
    if number > most:
        problem = f"a checkpoint would be a table of {number:,} parts, and {MAX_CHUNKS:,} can be read back;"
        copies = ((layout.dp_replicate * each, layout.dp_shard // each) for each in divisors(layout.dp_shard))
        meshes = (replace(layout, dp_replicate=one, dp_shard=other) for one, other in copies)
        fits = next((each for each in meshes if count_parts(recipe, spec, each) <= most), None)
        fix = "give a smaller model, or fewer ranks."
        if fits is not None:
            degrees = f"dp_replicate = {fits.dp_replicate}, dp_shard = {fits.dp_shard}"
            fix = f"cut the weights over fewer ranks, such as by {degrees}."
        yield Finding("parallel.dp_replicate" if fits else "model", problem, fix)


def rounded_sums(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Gradients that wait on a rank to be sent add up in the dtype that they will travel in."""
    layout, parallel = layout_of(recipe.parallel, world), recipe.parallel
    if layout is None or recipe.precision.reduce != "bfloat16" or recipe.precision.compute == "float64":
        return
    passes = batch_plan(recipe, layout, 0).microbatches
    halved = layout.pp > 1 and splits_backward(parallel.pipeline.schedule)
    waits = parallel.zero_stage <= 1 or halved or layout.dp_replicate > 1
    if (layout.data_ranks * layout.cp > 1 or parallel.offload) and passes > 1 and waits:
        problem = (
            f"gradients of {passes} microbatches add up in bfloat16 before they are sent, and lose small summands;"
        )
        yield warning("precision.reduce", problem, "write float32, or have zero_stage = 2 or 3 without dp_replicate.")


def padding(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Sequences that are computed and weigh nothing, because the batch does not divide evenly."""
    layout = layout_of(recipe.parallel, world)
    if layout is None or next(microbatches(recipe, world), None):
        return
    training, plan, ranks = recipe.training, batch_plan(recipe, layout, 0), layout.data_ranks
    computed = plan.microbatches * plan.microbatch * ranks
    if computed == training.global_batch:
        return
    share = ceil_div(training.global_batch, ranks)
    waste = f"{(computed - training.global_batch) / computed:.0%} are padding;"
    problem = f"{format_batch(ranks, plan.microbatches, plan.microbatch)} = {computed} sequences: {waste}"
    if share % plan.microbatch and training.microbatch is not None:
        fix = f"a microbatch that divides a rank's share of {share} wastes nothing."
        yield warning("training.microbatch", problem, fix)
    elif plan.microbatches * plan.microbatch > share:
        fix = f"a number that divides a rank's share of {share} wastes nothing."
        yield warning("parallel.pipeline.microbatches", problem, fix)
    else:
        even = ceil_div(training.global_batch, ranks) * ranks
        yield warning("training.global_batch", problem, f"the next batch that {ranks} ranks share evenly is {even}.")


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
