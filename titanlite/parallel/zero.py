"""ZeRO stages and HSDP on FSDP2: what is cut over the data ranks, and when it is gathered or summed.

Stage 0 keeps everything on every rank and sums gradients once a step. Stage 1 cuts the optimizer's states: gradients
add up unsharded over the microbatches and are reduce-scattered once. Stage 2 reduce-scatters them at every
microbatch, and keeps the weights gathered from forward to backward. Stage 3 gathers the weights anew for each
(Rajbhandari et al. 2020, section 5; Zhao et al. 2023 for the sharding itself).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from titanlite.models.spec import ModelSpec, is_named_by


def shard_model(
    model: nn.Module, spec: ModelSpec, mesh: DeviceMesh, stage: int, compute: torch.dtype, reduce: torch.dtype
) -> FSDPModule:
    """Cut the parameters of `model`, in place, over the mesh's last dimension; its first, if it has two, holds copies.

    Weights travel in `compute`, gradients in `reduce`. Gradients are sums over all ranks, never means.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=False)
    units = [module for name, module in model.named_modules() if is_named_by(spec.shard_units, name)]
    for module in (*units, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=stage == 3)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Without this, a factor of 1 still asks for a scaled sum, which gloo does not have.
            module.set_force_sum_reduction_for_comms(True)
    assert isinstance(model, FSDPModule)
    return model


class MicrobatchSync:
    """Tells a sharded model, before each microbatch's backward, what to communicate and what to keep."""

    def __init__(self, model: FSDPModule, stage: int) -> None:
        self._model = model
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]  # type: ignore[attr-defined]
        self._stage = stage
        self._set_for_last = True  # as FSDP2 begins

    def before(self, last: bool) -> None:
        """`last`: whether this is the step's last microbatch."""
        if last == self._set_for_last:
            return  # each switch below visits every module
        self._set_for_last = last
        self._model.set_is_last_backward(last)
        if self._stage <= 1:
            self._model.set_requires_gradient_sync(last)
            self._model.set_reshard_after_backward(last)
        else:
            # Each microbatch is reduce-scattered; the copies of an HSDP mesh meet once a step.
            self._model.set_requires_all_reduce(last)

    def after_evaluation(self) -> None:
        """Drop gathered weights: those of stages below 3 would outlive the next update, and be stale."""
        for module in self._modules:
            module.reshard()
