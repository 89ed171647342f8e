"""torch.compile per unit: each block is compiled once and its code reused by all of them, so start-up stays short."""

from __future__ import annotations

import os
import stat

import torch
import torch.distributed as dist
from torch import nn

from titanlite.errors import UsageError
from titanlite.models.spec import ModelSpec, is_named_by


def compile_units(model: nn.Module, spec: ModelSpec) -> None:
    """Compile, in place and at first use, every submodule that the spec names; parameter names do not change."""
    _require_own_cache()
    for name, module in model.named_modules():
        if is_named_by(spec.compile_units, name):
            module.compile(dynamic=False)


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
    enable_symm_mem_for_group(group.group_name)
