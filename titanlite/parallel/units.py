"""What is done to each unit of a model, such as a block: recomputation and compilation."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titanlite.errors import UsageError
from titanlite.models.attention.varlen import register_flops
from titanlite.models.layers import multiply
from titanlite.models.loss import TokenLoss
from titanlite.models.spec import ModelSpec, is_named_by
from titanlite.parallel.collectives import OVERLAPPED
from titanlite.parallel.modules import Wrapper, replace_module
from titanlite.plan.float8 import BLOCK
from titanlite.recipe.sections import Keep, Recompute

# Products take long to compute for the memory that their results need. So does attention, which `selective` always
# keeps, and what ranks have summed, which would have to be asked of them again. What they gather is kept by none: it
# would be there as often as there are ranks.
_PRODUCTS = "aten.mm", "aten.bmm", "aten.addmm", "aten._scaled_mm", "aten._grouped_mm", "aten._scaled_grouped_mm"
_KEPT = "titanlite.attend", "_c10d_functional.reduce_scatter_tensor"


def recompute_units(model: nn.Module, spec: ModelSpec, section: Recompute) -> None:
    """Have every `section.every`-th of the submodules that the spec names drop its activations, in place, and compute
    them a second time in the backward pass (Chen et al. 2016).
    """
    if section.mode == "none":
        return
    units = [(name, module) for name, module in model.named_modules() if is_named_by(spec.recompute_units, name)]
    for name, module in units[:: section.every]:
        replace_module(model, name, Recomputed(module, section.mode, section.keep))


class Recomputed(Wrapper):
    """A module whose activations are dropped and computed a second time."""

    def __init__(self, whole: nn.Module, mode: Literal["selective", "full"], keep: Keep) -> None:
        """`keep`: what besides attention, in mode `selective`."""
        super().__init__(whole)
        # Training draws no random numbers, so there is no state of generators to keep for the second time.
        self.settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        self.mode = mode
        if mode == "selective":
            self.settings["context_fn"] = partial(_contexts, keep)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return checkpoint(self.whole, *arguments, **self.settings, **named)

    def extra_repr(self) -> str:
        return f"{type(self.whole).__name__}, {self.mode}"


def _contexts(keep: Keep) -> Any:
    """A pass forward with its recomputation, each with a policy that counts anew: many may be under way at a time."""
    return create_selective_checkpoint_contexts(_policy(keep))


def _policy(keep: Keep) -> Callable[..., CheckpointPolicy]:
    products = {False: 0, True: 0}  # seen so far, going forward and, where torch before 2.13 asks again, recomputing

    def choose(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
        name = str(getattr(operation, "overloadpacket", operation))
        if name in _PRODUCTS:
            products[context.is_recompute] += 1
            # Not the odd ones: the last of a block's seven, which no gradient needs, would be kept for nothing.
            kept = keep == "products" or (keep == "every_second_product" and products[context.is_recompute] % 2 == 0)
        elif name == "aten.amax":  # of float8: a number a matrix or row, but too many where each block has its own
            kept = arguments[0].shape[-1:] > (BLOCK,)
        else:
            kept = name in _KEPT or name.startswith("aten._scaled_dot_product_")
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return choose


def compile_units(
    model: nn.Module, spec: ModelSpec, tokens: int, budget: float | None = None, *, whole: bool = True
) -> None:
    """Compile, in place and at first use, every submodule that the spec names; code is reused by all that are alike. A
    head stays as it is if its loss takes `tokens` tokens, those of a pass, by chunks.

    `whole`: each to one graph. FSDP's hooks on a part of it would break that: torch raises `Unsupported` at first use.
    `budget`: the part of the activations' memory that the compiler keeps, in every graph of this process; None: all.
    """
    _require_own_cache()
    # Of one block: a graph for each window of attention, and for each size that a table of documents has had.
    torch._dynamo.config.recompile_limit = 64
    if budget is not None:
        register_flops()  # which the compiler weighs against memory
        torch._functorch.config.activation_memory_budget = budget
    for name, module in model.named_modules():
        if is_named_by(spec.compile_units, name) and not _by_chunks(module, tokens):
            module.compile(dynamic=False, fullgraph=whole)


def _by_chunks(module: nn.Module, tokens: int) -> bool:
    """Whether a module's loss takes so many tokens by chunks: compiled, it could not scale gradients where they lie."""
    loss, plain = getattr(module, "loss", None), getattr(module, "multiply", multiply) is multiply
    return plain and isinstance(loss, TokenLoss) and loss.by_chunks(tokens, len(module.get_parameter("weight")))


def _require_own_cache() -> None:
    """Raise `UsageError` if other users can write where the compiler keeps pickles: anyone can guess its default."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    folder = cache_dir()  # made, if it is not there
    if folder != default_cache_dir():
        return  # the user's choice
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & stat.S_IWOTH:
        raise UsageError(
            f"{folder}, where torch keeps compiled programs as pickles, can be written by other users: set "
            "TORCHINDUCTOR_CACHE_DIR to a folder of your own, or write compile.enabled = false."
        )


def overlap_tensor_parallel(group: dist.ProcessGroup, device: torch.device) -> None:
    """Have the compiler cut products beside collectives of `group` into steps that overlap (async tensor parallelism).

    Raises `UsageError` where torch does not offer it: it needs memory that the GPUs of one machine share.
    """
    import torch._inductor.config as inductor
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        raise UsageError(
            "parallel.async_tp: torch overlaps tensor parallelism on GPUs of compute capability 9.0 and later that "
            f"NVLink joins, and this is {name}. Write async_tp = false."
        )
    inductor._micro_pipeline_tp = True
    OVERLAPPED.add(group.group_name)
    enable_symm_mem_for_group(group.group_name)
