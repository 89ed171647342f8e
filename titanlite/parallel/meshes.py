"""The process groups of a layout: which ranks share what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from titanlite.plan.layout import Coordinates, Layout
from titanlite.plan.placement import FSDP, Mesh, meshes_of
from titanlite.recipe.sections import Parallel


@dataclass(frozen=True)
class Meshes:
    """One rank's groups. Every rank forms them in the same order."""

    layout: Layout
    rank: int
    coordinates: Coordinates
    fsdp: Mapping[Mesh, DeviceMesh]
    """For the parameters of each mesh, what FSDP shards over: dimension dp_shard, with dp_replicate before it where
    weights have replicas."""
    dp_replicate: dist.ProcessGroup  # ranks that hold the same part of the same weights
    dp_shard: dist.ProcessGroup  # ranks that the weights of a stage and tensor parallel part are sharded over
    tp: dist.ProcessGroup
    cp: dist.ProcessGroup | None  # None where no sequence is shared
    pp: dist.ProcessGroup
    ep: dist.ProcessGroup | None  # None where no rank has a part of the experts alone
    ends: dist.ProcessGroup | None
    """The first and the last stage of this rank's pipeline, if it is one of them and they share a weight."""
    matrix: dist.ProcessGroup  # the ranks that hold parts of the same matrices once: dp_shard x tp, tp the faster

    @staticmethod
    def of(
        layout: Layout, rank: int, parallel: Parallel, device: torch.device, ends_share_a_weight: bool = False
    ) -> Meshes:
        """Form the groups of `layout`; collective over all ranks of the default process group."""
        timeout = timedelta(seconds=parallel.timeout_seconds)
        formed = {}
        for each in meshes_of(layout, parallel.zero_stage).values():
            names, degrees = zip(*each.degrees, strict=True)
            formed[each] = init_device_mesh(device.type, degrees, mesh_dim_names=names)
            # Torch's would wait for its own default time, not for the recipe's.
            for group in formed[each].get_all_groups():
                _set_pg_timeout(timeout, group)
        mesh, *others = formed.values()
        ranks = mesh.mesh  # [pp, dp_replicate, dp_shard, tp]
        sequences = ranks.reshape(-1, layout.cp, layout.tp).transpose(1, 2).flatten(0, 1)
        ends, matrices = ranks.flatten(1).T[:, [0, -1]], ranks.flatten(2).flatten(0, 1)
        return Meshes(
            layout=layout,
            rank=rank,
            coordinates=layout.coordinates(rank),
            fsdp={
                each: torchs["dp_replicate", FSDP] if each.degree("dp_replicate") > 1 else torchs[FSDP]
                for each, torchs in formed.items()
            },
            dp_replicate=mesh.get_group("dp_replicate"),
            dp_shard=mesh.get_group(FSDP),
            tp=mesh.get_group("tp"),
            cp=_group_of(rank, sequences, "cp", timeout) if layout.cp > 1 else None,
            pp=mesh.get_group("pp"),
            ep=others[0].get_group("ep") if others else None,
            ends=_group_of(rank, ends, "ends", timeout) if ends_share_a_weight else None,
            matrix=(_group_of(rank, matrices, "matrix", timeout) if layout.tp > 1 else None) or mesh.get_group(FSDP),
        )


def _group_of(rank: int, groups: Tensor, name: str, timeout: timedelta) -> dist.ProcessGroup | None:
    """Form a group of each row; this rank's, if it is in one."""
    formed = [(ranks, dist.new_group(ranks, timeout=timeout, group_desc=name)) for ranks in groups.tolist()]
    return next((group for ranks, group in formed if rank in ranks), None)
