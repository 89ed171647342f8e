"""ZeRO stages (Rajbhandari et al. 2020, section 5) and HSDP on FSDP2 (Zhao et al. 2023): what is cut over the data
ranks, and when it is gathered or summed: docs/layouts.md has the table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from titanlite.models.spec import ModelSpec, is_named_by
from titanlite.parallel.collectives import Part, all_gather, pack, rows_in_float8, unpack
from titanlite.parallel.meshes import Meshes
from titanlite.parallel.model import Sync, no_sync
from titanlite.plan.float8 import Cast
from titanlite.plan.layout import ceil_div
from titanlite.plan.placement import FSDP, Mesh, Placement
from titanlite.precision.casting import compute_dtype, reduce_dtype
from titanlite.precision.float8 import Float8Linear, quantise
from titanlite.recipe.sections import Parallel, Precision


def apply_fsdp(
    model: nn.Module,
    spec: ModelSpec,
    placements: Mapping[str, Placement],
    meshes: Meshes,
    parallel: Parallel,
    precision: Precision,
) -> Sync:
    """Cut the parameters of `model`, in place, over ranks that compute with the same; returns their `Sync`.

    Weights travel in the compute dtype or in float8, gradients in the reduce dtype. Gradients are sums over all ranks,
    never means. With `parallel.offload`, what is cut rests in the host's memory.
    """
    stage, common = parallel.zero_stage, next(iter(meshes.fsdp))
    if all(mesh.size() == 1 for mesh in meshes.fsdp.values()) and not parallel.offload:
        return no_sync
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype(precision), reduce_dtype=reduce_dtype(precision), cast_forward_inputs=False
    )
    pin_memory = meshes.fsdp[common].device_type == "cuda"
    offload = CPUOffloadPolicy(pin_memory=pin_memory) if parallel.offload else OffloadPolicy()
    on_mesh = _units(model, spec, placements, common)
    modules = list(on_mesh)
    # Backward begins where forward ended, but in a pipeline: the last unit's weights would be gathered again at once.
    kept = (model, modules[-1]) if meshes.layout.pp == 1 else (model,)
    for module in (*reversed(modules), model):  # what is within another one before it
        mesh, again = meshes.fsdp[on_mesh.get(module, common)], stage == 3 and module not in kept
        sharded = fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=again)
        sharded.set_gradient_divide_factor(1.0)
        # Without this, a factor of 1 still asks for a scaled sum, which gloo does not have.
        sharded.set_force_sum_reduction_for_comms(True)
    units: list[Any] = modules  # FSDP's own by now
    for unit in units:
        # The gradient of a table does not depend on its values.
        unit.set_unshard_in_backward(not isinstance(unit, nn.Embedding))
        if precision.float8.all_gather and (shards := on_mesh[unit].degree(FSDP)) > 1:
            inner = (each for each in unit.modules() if each is not unit and each in on_mesh)
            within = {each for other in inner for each in other.modules()}
            gather = Float8Gather([each for each in unit.modules() if each not in within], shards)
            if any(cast for _, _, cast in gather.parameters):
                unit.set_custom_all_gather(gather)
    _prefetch(units, parallel.prefetch)
    assert isinstance(model, FSDPModule)
    return MicrobatchSync(model, stage)


def _units(
    model: nn.Module, spec: ModelSpec, placements: Mapping[str, Placement], common: Mesh
) -> dict[nn.Module, Mesh]:
    """The submodules that are gathered one by one, each with the mesh of its parameters: those that the spec names, and
    those whose parameters are not on the mesh `common` to most. What shares a tied weight is left to the whole model.
    """
    owners = Counter(parameter for module in model.modules() for parameter in module.parameters(recurse=False))
    units = {}
    for name, module in model.named_modules():
        own = (placements.get(f"{name}.{key}") for key, _ in module.named_parameters(recurse=False))
        mesh = next((each.mesh for each in own if each is not None), common)
        alone = all(owners[parameter] == 1 for parameter in module.parameters())
        if alone and (is_named_by(spec.shard_units, name) or mesh != common):
            units[module] = mesh
    return units


def _prefetch(units: list[FSDPModule], depth: int) -> None:
    """Have each unit ask for the weights of the next `depth` ones before it runs, in the order of either pass."""
    for index, unit in enumerate(units):
        if depth:
            unit.set_modules_to_forward_prefetch(units[index + 1 : index + 1 + depth])
            earlier = [one for one in units[max(index - depth, 0) : index][::-1] if not isinstance(one, nn.Embedding)]
            # Without any, FSDP2 would take the unit that ran before this one: a table whose values backward does not
            # need or, in a pipeline, another microbatch's last block. Asking for itself, it asks for nothing.
            unit.set_modules_to_backward_prefetch(earlier or [unit])


class MicrobatchSync:
    """A `Sync`: stages 0 and 1 add gradients up over the microbatches and sum them over ranks once; stage 2 at every
    microbatch, with weights gathered from forward to backward; stage 3 gathers them anew for each.
    """

    def __init__(self, model: FSDPModule, stage: int) -> None:
        self._model, self._stage = model, stage
        self._set_for_last = True  # as FSDP2 begins

    def __call__(self, last: bool) -> None:
        if last == self._set_for_last:
            return  # each switch below visits every module
        self._set_for_last = last
        self._model.set_is_last_backward(last)
        if self._stage <= 2:
            self._model.set_reshard_after_backward(last)
        if self._stage <= 1:
            self._model.set_requires_gradient_sync(last)
        else:
            # Each microbatch is reduce-scattered; the copies of an HSDP mesh meet once a step.
            self._model.set_requires_all_reduce(last)


# ---- weights that travel in float8: ranks hold whole rows and cast their own with a scale a row; what arrives has the
# compute dtype again. As scales are powers of two, a product's cast of it rounds only what is close to nothing.


class Float8Gather:
    """An all-gather of a unit's parameters (torch's `AllGather`, by shape)."""

    def __init__(self, modules: Iterable[nn.Module], ranks: int) -> None:
        self.parameters: list[tuple[int, int, Cast | None]] = []
        """In FSDP's order, rows and columns that each rank sends (the last ranks' may be padded), and in what format;
        None: in the compute dtype."""
        for module in modules:
            multiply = getattr(module, "multiply", None)
            cast = multiply.settings.sent_weights if isinstance(multiply, Float8Linear) else None
            for parameter in module.parameters(recurse=False):
                rows, *rest = parameter.shape
                self.parameters.append((ceil_div(rows, ranks), prod(rest), cast))

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what is gathered."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Gather `input_tensor`, this rank's parts of the parameters one after the other, into `output_tensor`."""
        received = all_gather(self._message(input_tensor), group)
        self._unpack(received.view(group.size(), -1), output_tensor.view(group.size(), -1))

    def _message(self, flat: Tensor) -> Tensor:
        parts: list[Tensor] = []
        for cast, values in self._split(flat):
            parts += quantise(values, cast) if cast else (values,)
        return pack(parts)

    def _unpack(self, messages: Tensor, out: Tensor) -> None:
        """The values of the ranks' messages [ranks, bytes], all at once, into what is gathered [ranks, numbers]."""
        shapes: list[Part] = []
        for rows, columns, cast in self.parameters:
            shapes += rows_in_float8(rows, columns, cast) if cast else [((rows, columns), out.dtype)]
        parts = iter(unpack(messages, shapes))
        for cast, values in self._split(out):
            if cast:
                torch.mul(next(parts).to(values.dtype), next(parts).to(values.dtype), out=values)
            else:
                values.copy_(next(parts))

    def _split(self, flat: Tensor) -> Iterator[tuple[Cast | None, Tensor]]:
        """The format and [..., rows, columns] of each parameter in `flat` [..., numbers]."""
        pieces = flat.split([rows * columns for rows, columns, _ in self.parameters], dim=-1)
        for (rows, columns, cast), piece in zip(self.parameters, pieces, strict=True):
            yield cast, piece.unflatten(-1, (rows, columns))
