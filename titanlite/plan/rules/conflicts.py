"""Keys that are right by themselves and cannot be had together, or would be regretted."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

from titanlite.errors import Finding
from titanlite.plan.kernels import OPERATIONS, QUANTISE
from titanlite.plan.layout import layout_of
from titanlite.plan.rules.lookup import find_config, find_spec, warning
from titanlite.plan.stages import V_SHAPED, splits_backward
from titanlite.recipe.sections import WATCHDOG_PATIENCE, Recipe


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
    if recipe.parallel.async_tp and recipe.parallel.tp > 1 and not compiled:
        problem = "it is the compiler that splits the products and overlaps their parts with communication;"
        yield Finding("parallel.async_tp", problem, "write compile.enabled = true, or async_tp = false.")
    if recompute.budget is not None and not compiled:
        problem = "it is the compiler that chooses what to recompute within a budget;"
        fix = 'write compile.enabled = true, or recompute.mode = "selective" instead.'
        yield Finding("recompute.budget", problem, fix)
    if recompute.budget is not None and recompute.mode != "none":
        problem = f'budget and mode = "{recompute.mode}" both choose what is recomputed;'
        yield Finding("recompute.budget", problem, "give one of the two.")
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
        problem = (
            "with data.document_mask, scores are formed without a kernel, in float32: right, and many times slower;"
        )
        yield warning("parallel.cp_method", problem, 'write "all-gather".')


def split_backward(recipe: Recipe, world: int) -> Iterator[Finding]:
    """Schedules that compute gradients of inputs and of weights at different times, and V-shaped ones, exclude much."""
    schedule, layout, spec = recipe.parallel.pipeline.schedule, layout_of(recipe.parallel, world), find_spec(recipe)
    if layout is None or layout.pp == 1:
        return
    other = "choose 1F1B or Interleaved1F1B."
    if spec is not None and spec.tied(find_config(recipe)) and schedule in V_SHAPED:
        problem = f"{schedule} has the first and the last stage on one rank, and they share the tied embedding;"
        fix = "choose another schedule, or model.tie_embeddings = false."
        yield Finding("parallel.pipeline.schedule", problem, fix)
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
        problem = f"{apart} float8 linears only know both;"
        yield Finding("precision.float8.enabled", problem, f"write false, or {other}")
    # Before 2.13, torch takes the sum of the gradients of a function with several results, such as the fused RMSNorm,
    # for the first one's, and frees functions written in Python that it comes back to, such as the loss by chunks.
    found = version("torch")
    if tuple(map(int, found.split(".")[:2])) < (2, 13):
        problem = f"{schedule} needs torch 2.13, and this is {found}, which may compute wrong gradients of weights;"
        yield Finding("parallel.pipeline.schedule", problem, f"install torch 2.13, or {other}")
