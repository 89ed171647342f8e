"""A recipe of the same layout that runs in seconds, with a smaller model and less data; `check` accepts it too."""

from __future__ import annotations

import math
from typing import Any

from titanlite.models.spec import spec_of
from titanlite.plan.layout import BatchPlan, Layout, batch_plan, ceil_div, require_layout
from titanlite.plan.stages import stages_per_rank, takes_microbatches
from titanlite.recipe.sections import Compile, Data, Float8, Parallel, Recipe, Recompute, Schedule, Training

_HEAD_DIM = 8
_WIDTH = 256  # where grouped heads would make the model wider than this, groups get smaller
_VOCABULARY = 272
_SEQUENCE_LENGTH = 32
_SPREAD = 0.5  # standard deviation of the first logits
_MOST_MOVED = 0.01  # of an initial weight, by AdamW in a step: if more, rounding takes the two runs different ways
_REFERENCE_MICROBATCH = 16


def shrink(recipe: Recipe, world: int, steps: int) -> Recipe:
    """`recipe`, which `check` accepts on `world` ranks, with a small model, short sequences and `steps` steps.

    `[parallel]`, `[precision]`, `[recompute]` and `[compile]` stay, but for counts of blocks and microbatches, and for
    float8, which would hide what is compared. The learning rate is at its peak from the first step on.
    """
    layout, pipeline = require_layout(recipe.parallel, world), dict(recipe.parallel.pipeline)
    real = batch_plan(recipe, layout, 0)
    microbatches = _microbatches(recipe, real, layout)
    blocks = pipeline["blocks_per_stage"] if layout.pp > 1 else None
    if layout.pp > 1 and pipeline["microbatches"] is not None:
        pipeline["microbatches"] = microbatches
    if blocks is not None:
        # None where there are none, one where there are few, two where there are more.
        few = min(filter(None, blocks))
        pipeline["blocks_per_stage"] = blocks = tuple(min(number, 1 + (number > few)) for number in blocks)
    model = _model(recipe, layout, blocks)
    small = change(
        recipe,
        model=model,
        optimizer={"lr": min(recipe.optimizer.lr, _MOST_MOVED * model["init_std"])},
        precision={"float8": Float8()},
        parallel={"pipeline": pipeline},
        run={"stop_after_step": None, "stop_after_minutes": None},
    )
    data = Data(document_mask=recipe.data.document_mask, packing=recipe.data.packing)
    training = _training(real, layout, microbatches, steps)
    parts = {"data": data, "training": training, "schedule": Schedule(name="constant")}
    unused = {name: getattr(Recipe(), name) for name in ("validation", "checkpoint", "metrics", "debug")}
    return small.model_copy(update={**parts, **unused})


def reference_of(recipe: Recipe) -> Recipe:
    """The same training in one process: nothing shared, recomputed or compiled, and other microbatches."""
    recipe = change(recipe, training={"microbatch": min(recipe.training.global_batch, _REFERENCE_MICROBATCH)})
    return recipe.model_copy(update={"parallel": Parallel(), "recompute": Recompute(), "compile": Compile()})


def without_compiler(recipe: Recipe) -> Recipe:
    """Not compiled, and without what only the compiler can do."""
    return change(recipe, compile={"enabled": False}, recompute={"budget": None}, parallel={"async_tp": False})


def change(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """With some keys of these sections replaced, and checked again."""
    before = {name: getattr(recipe, name) for name in sections}
    after = {name: type(old).model_validate({**dict(old), **sections[name]}) for name, old in before.items()}
    return recipe.model_copy(update=after)


def _model(recipe: Recipe, layout: Layout, blocks: tuple[int, ...] | None) -> dict[str, Any]:
    """A narrow model whose heads, rows and blocks come out as even, or as uneven, over the ranks as the real one's."""
    real, tp = spec_of(recipe.model.preset).configure(recipe.model), layout.tp
    kv_heads = min(real.kv_heads, 2) if tp == 1 else tp + real.kv_heads % tp
    head_dim = min(real.head_dim, _HEAD_DIM)
    group = min(real.heads // real.kv_heads, max(2, _WIDTH // (kv_heads * head_dim)))
    dim = kv_heads * group * head_dim
    return {
        "dim": dim,
        "layers": sum(blocks) if blocks is not None else _layers(recipe, layout, real.layers),
        "heads": kv_heads * group,
        "kv_heads": kv_heads,
        "ffn_dim": _congruent(2 * dim, real.ffn_dim, tp),
        "vocab_size": _congruent(min(real.vocab_size, _VOCABULARY), real.vocab_size, tp),
        # Sums over so narrow a model have few terms: with the real one's, attention and logits would all be alike.
        "init_std": _SPREAD / math.sqrt(dim),
    }


def _congruent(least: int, real: int, ranks: int) -> int:
    """The smallest number from `least` on that leaves the same rest over `ranks` as `real` does."""
    return least + (real - least) % ranks


def _layers(recipe: Recipe, layout: Layout, real: int) -> int:
    """A block for each stage, one more if the real ones do not come out even, and one that is not recomputed."""
    stages = layout.pp * stages_per_rank(recipe.parallel.pipeline) if layout.pp > 1 else 1
    kinds = recipe.recompute.every + 1 if recipe.recompute.mode != "none" else 1
    return min(real, max(stages + (real % stages > 0), kinds, 2))


def _microbatches(recipe: Recipe, real: BatchPlan, layout: Layout) -> int:
    """As few as show that gradients add up, and as the pipeline's schedule takes; never more than the real ones."""
    if layout.pp == 1:
        return min(real.microbatches, 3)
    schedule, pp = recipe.parallel.pipeline.schedule, layout.pp
    candidates = range(min(real.microbatches, 2 * pp), real.microbatches + 1)
    return next(number for number in candidates if takes_microbatches(schedule, pp, number))


def _training(real: BatchPlan, layout: Layout, microbatches: int, steps: int) -> Training:
    """Short sequences that all ranks can share, one of them missing where the real batch leaves padding."""
    microbatch = min(real.microbatch, 2)
    padded = real.global_batch < real.microbatches * real.microbatch * real.data_ranks
    batch = microbatches * microbatch * real.data_ranks - (padded and microbatch * real.data_ranks > 1)
    unit = 2 * layout.cp * layout.tp
    length = ceil_div(_SEQUENCE_LENGTH, unit) * unit
    return Training(steps=steps, sequence_length=length, global_batch=batch, microbatch=microbatch)
