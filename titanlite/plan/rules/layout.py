"""Rules about how devices share the work: the mesh, matrices, sequences, the batch, stages, products in float8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import lcm, prod

from titanlite.errors import Finding, warning
from titanlite.models.spec import ModelConfig, ModelSpec, is_named_by
from titanlite.optim.base import OPTIMIZERS
from titanlite.plan import float8
from titanlite.plan.layout import Layout, batch_plan, ceil_div, divisors, layout_of
from titanlite.plan.memory import MAX_CHUNKS, count_parts
from titanlite.plan.placement import pattern_of, place
from titanlite.plan.rules.run import find_model
from titanlite.plan.stages import FIXED_STAGES, IN_ROUNDS, SPLIT_BACKWARD, stages_per_rank, takes_microbatches
from titanlite.recipe.sections import Recipe
from titanlite.text import format_batch, join_choices, pluralize

_OTHER_PARTS = 1000  # more than a checkpoint holds beside weights and moments
RANKS_IN_A_MACHINE = 8  # devices that most machines have, joined by the fast links that tensor parallelism lives on


def mesh(recipe: Recipe, world: int) -> Iterator[Finding]:
    """The mesh has as many places as there are ranks."""
    parallel = recipe.parallel
    if parallel.dp_shard == 0:
        yield Finding("parallel.dp_shard", "a model cannot be cut over 0 ranks;", "write -1 for all that are left.")
    if parallel.dp_shard == 0 or layout_of(parallel, world) is not None:
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


def cuts(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Every tensor parallel rank has a part of every matrix."""
    (spec, config), tp = find_model(recipe), recipe.parallel.tp
    if spec is not None and tp > (limit := spec.cut_limit(config)):
        problem = f"{tp} ranks are more than the {pluralize(limit, 'part')} of matrices (key heads stay whole);"
        fits = [degree for degree in divisors(tp) if degree <= limit]
        yield Finding("parallel.tp", problem, f"write {join_choices(fits)}.")


def uneven_cuts(recipe: Recipe, spec: ModelSpec, config: ModelConfig, layout: Layout) -> Iterator[Finding]:
    """Matrices whose parts are of different sizes: the ranks with less wait."""
    tp = layout.tp
    names: dict[int, dict[str, None]] = {}
    for name, placement in place(recipe, layout).items():
        cut = placement.cut_over("tp")
        if cut is not None and (units := placement.shape[cut.dimension] // cut.unit) % tp:
            names.setdefault(units, {})[name.removesuffix(".weight").rpartition(".")[2]] = None
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


def experts(recipe: Recipe, spec: ModelSpec, config: ModelConfig, layout: Layout) -> Iterator[Finding]:
    """Ranks that experts are dealt out to are ranks of one model copy, and each has some."""
    ep, room = layout.ep, layout.dp_shard * layout.cp * layout.tp
    if ep == 1:
        return
    key, rules = "parallel.ep", [rule for rule in spec.sharding(config) if rule.style == "experts"]
    modules = tuple(rule.pattern for rule in rules)
    own = {name: shape for name, shape in spec.shapes(config).items() if is_named_by(modules, name.rpartition(".")[0])}
    if not own:
        yield Finding(key, f"the model has no experts to deal out to {ep} ranks;", "write 1.")
        return
    experts = min(shape[0] for shape in own.values()) // max(rule.unit for rule in rules)
    if recipe.parallel.zero_stage == 0:
        yield Finding(key, "dealing out experts cuts weights, and zero_stage = 0 cuts none;", "write zero_stage = 1.")
    elif room % ep or ep > experts:
        problem = f"{ep} does not divide dp_shard x cp x tp = {room}, or is more than the {experts} experts;"
        fits = [degree for degree in divisors(room) if degree <= experts]
        yield Finding(key, problem, f"write {join_choices(fits)}.")


def machines(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Tensor parallelism communicates within every block: it belongs inside one machine."""
    tp = recipe.parallel.tp
    if world > RANKS_IN_A_MACHINE and RANKS_IN_A_MACHINE % tp:
        problem = f"groups of {tp} lie across machines of {RANKS_IN_A_MACHINE} devices: blocks wait for the network;"
        yield warning("parallel.tp", problem, f"use a divisor of {RANKS_IN_A_MACHINE}, and pp or dp_shard beside it.")


def parts(recipe: Recipe, spec: ModelSpec, config: ModelConfig, layout: Layout) -> Iterator[Finding]:
    """A checkpoint's table of parts is not longer than what can be read back."""
    if recipe.optimizer.name not in OPTIMIZERS:
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


def rounded_sums(recipe: Recipe, layout: Layout) -> Iterator[Finding]:
    """Gradients that wait on a rank to be sent add up in the dtype that they will travel in."""
    parallel, passes = recipe.parallel, batch_plan(recipe, layout, 0).microbatches
    rounds = recipe.precision.reduce == "bfloat16" and recipe.precision.compute != "float64"
    halved = layout.pp > 1 and parallel.pipeline.schedule in SPLIT_BACKWARD
    waits = parallel.zero_stage <= 1 or halved or layout.dp_replicate > 1
    if rounds and waits and passes > 1 and (layout.data_ranks * layout.cp > 1 or parallel.offload):
        problem = f"gradients of {passes} microbatches add up in bfloat16 before they are sent: small ones are lost;"
        yield warning("precision.reduce", problem, "write float32, or have zero_stage = 2 or 3 without dp_replicate.")


def padding(recipe: Recipe, layout: Layout) -> Iterator[Finding]:
    """The two ways to cut a rank's share of the batch agree, and leave no sequences that weigh nothing."""
    training, plan, ranks = recipe.training, batch_plan(recipe, layout, 0), layout.data_ranks
    share, wanted = ceil_div(training.global_batch, ranks), recipe.parallel.pipeline.microbatches
    computed = plan.microbatches * plan.microbatch * ranks
    made = ceil_div(share, plan.microbatch)
    if layout.pp > 1 and training.microbatch is not None and wanted not in (None, made):
        cut = f"{pluralize(share, 'sequence')} makes {pluralize(made, 'microbatch')} of {plan.microbatch}"
        fix = "leave it out, or training.microbatch."
        yield Finding("parallel.pipeline.microbatches", f"a rank's share of {cut}, not {wanted};", fix)
    elif computed > training.global_batch:
        waste = f"{(computed - training.global_batch) / computed:.0%} are padding;"
        problem = f"{format_batch(ranks, plan.microbatches, plan.microbatch)} = {computed} sequences: {waste}"
        key = "parallel.pipeline.microbatches" if training.microbatch is None else "training.microbatch"
        fix = f"a number that divides a rank's share of {share} wastes nothing."
        if computed == share * ranks:
            key, fix = "training.global_batch", f"the next batch that {ranks} ranks share evenly is {computed}."
        yield warning(key, problem, fix)


def stages(recipe: Recipe, layout: Layout) -> Iterator[Finding]:
    """Each stage has a part of the model."""
    section, (spec, config) = recipe.parallel.pipeline, find_model(recipe)
    if spec is None or layout.pp == 1:
        return
    pieces, each = len(spec.pieces(config, recipe.training.sequence_length)), stages_per_rank(section)
    number, blocks, given = layout.pp * each, pieces - 2, section.blocks_per_stage
    key, fix = "parallel.pipeline.blocks_per_stage", f"give {number} numbers that add up to {blocks}, or leave it out."
    if given is None:
        if number > pieces:
            key = "parallel.pp" if section.schedule in FIXED_STAGES else "parallel.pipeline.stages_per_rank"
            problem = f"{number} stages ({layout.pp} ranks x {each}) are more than embedding, {blocks} blocks and head;"
            yield Finding(key, problem, f"have at most {pieces} stages.")
    elif len(given) != number:
        problem = f"{len(given)} stages are given where {section.schedule} on {layout.pp} ranks has {number};"
        yield Finding(key, problem, fix)
    elif sum(given) != blocks:
        problem = f"{' + '.join(map(str, given))} = {sum(given)} blocks, and the model has {blocks};"
        yield Finding(key, problem, fix)
    elif not all(given[1:-1]):
        fix = "only the first (with the embedding) and the last (with the head) can do without blocks."
        yield Finding(key, f"stage {given.index(0, 1)} would be empty;", fix)


def rounds(recipe: Recipe, layout: Layout) -> Iterator[Finding]:
    """The schedule can go through a rank's microbatches."""
    pp, schedule = layout.pp, recipe.parallel.pipeline.schedule
    number = batch_plan(recipe, layout, 0).microbatches
    if pp == 1 or takes_microbatches(schedule, pp, number):
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


def conversions(recipe: Recipe, spec: ModelSpec, config: ModelConfig) -> Iterator[Finding]:
    """Float8 finds something to convert, and each pattern of `exclude` is the name of a linear."""
    section = recipe.precision.float8
    found = float8.decide_linears(spec, config, section)
    if found and all(each.skipped is not None for each in found):
        fix = "lower min_size or shorten exclude, or write enabled = false."
        yield warning("precision.float8.enabled", f"{float8.summarize_linears(found)};", fix)
    for pattern in section.exclude:
        if found and not any(is_named_by((pattern,), each.name) for each in found):
            fix = f"names are such as {found[0].name}, with * for a number (titanlite check --json has them all)."
            yield Finding("precision.float8.exclude", f"no linear is named '{pattern}';", fix)


def converted_parts(recipe: Recipe, spec: ModelSpec, config: ModelConfig, layout: Layout) -> Iterator[Finding]:
    """What each tensor parallel rank has of a converted linear can be multiplied in float8, and is worth it.

    Left as it is on this layout alone, it would have other numbers than on others.
    """
    section = recipe.precision.float8
    linears = float8.decide_linears(spec, config, section) if layout.tp > 1 else ()
    converted = {pattern_of(f"{each.name}.weight") for each in linears if each.skipped is None}
    placed = {pattern_of(name): each for name, each in place(recipe, layout).items() if each.cut_over("tp")}
    for name in (name for name in placed if name in converted):
        module, placement = name.removesuffix(".weight"), placed[name]
        first = placement.stages[0] * layout.size // layout.pp
        parts = sorted({placement.part(first + rank, gathered=True)[1] for rank in range(layout.tp)})
        misfit = next((part for part in parts if not float8.aligned(part, section)), None)
        rows, columns = misfit or parts[0]
        problem = f"of {module}, a rank has {rows} x {columns}"
        if misfit is not None:
            problem = f"{problem}, and {section.recipe} takes multiples of {float8.SETTINGS[section.recipe].alignment};"
            yield Finding("parallel.tp", problem, f'choose another tp, or add "{module}" to precision.float8.exclude.')
        elif float8.mean_size(rows, columns) < section.min_size:
            problem = f"{problem}, less than min_size counts on: float8 costs time;"
            yield warning("precision.float8.exclude", problem, f'add "{module}".')


def sent(recipe: Recipe, spec: ModelSpec, config: ModelConfig, layout: Layout) -> Iterator[Finding]:
    """What ranks gather can be sent in float8, where it is asked for."""
    key, section = "precision.float8.all_gather", recipe.precision.float8
    if not section.all_gather or not float8.decide_linears(spec, config, section):
        return
    cut = layout.weights(recipe.parallel.zero_stage)[1] > 1
    if cut and float8.SETTINGS[section.recipe].sent_weights is None:
        problem = f"weights of {section.recipe} travel in the compute dtype: a cast of their rows would take bits;"
        yield warning(key, problem, "for float8, choose tensorwise or rowwise_with_hp_grad_weight.")
    found = float8.plan_gathers(spec, config, section) if layout.tp > 1 else ()
    if found and all(each.cast is None for each in found):
        fix = "for that, choose tensorwise and have the linears that share an input converted together."
        yield warning(key, f"over tp nothing travels in float8: {'; '.join(float8.format_gathers(found))};", fix)
