"""torch.compile per unit: each block is compiled once and its code reused by all of them, so start-up stays short."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from titanlite.errors import UsageError
from titanlite.models.spec import ModelSpec, is_named_by


def compile_units(model: nn.Module, spec: ModelSpec) -> None:
    """Compile, in place and at first use, every submodule that the spec names; parameter names do not change."""
    for name, module in model.named_modules():
        if is_named_by(spec.compile_units, name):
            module.compile(dynamic=False)


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
