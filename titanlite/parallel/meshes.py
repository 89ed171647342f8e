"""The process groups of a layout: which ranks share what."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from titanlite.plan.layout import Coordinates, Layout
from titanlite.recipe.sections import Parallel


@dataclass(frozen=True)
class Meshes:
    """One rank's groups. Every rank makes them in the same order."""

    layout: Layout
    rank: int
    coordinates: Coordinates
    parameters: DeviceMesh
    """Dimensions (copies, cut): the ranks that hold the same weights of their stage and tensor parallel slice, and
    those that each of these is cut over."""
    tp: dist.ProcessGroup
    cp: dist.ProcessGroup | None
    """None where no sequence is shared."""
    pp: dist.ProcessGroup
    ends: dist.ProcessGroup | None
    """The first and the last stage of this rank's pipeline, if it is one of them and they share a weight."""
    matrix: dist.ProcessGroup
    """The ranks that hold parts of the same matrices once: cut x tp, tp the faster."""

    @property
    def copies(self) -> dist.ProcessGroup:
        return self.parameters.get_group("copies")

    @property
    def cut(self) -> dist.ProcessGroup:
        return self.parameters.get_group("cut")

    @staticmethod
    def of(
        layout: Layout, rank: int, parallel: Parallel, device: torch.device, ends_share_a_weight: bool = False
    ) -> Meshes:
        """Form the groups of `layout`; collective over all ranks of the default process group."""
        copies, cut = layout.weights(parallel.zero_stage)
        waits = timedelta(seconds=parallel.timeout_seconds)
        pp, cp, tp = layout.pp, layout.cp, layout.tp
        mesh = init_device_mesh(device.type, (pp, copies, cut, tp), mesh_dim_names=("pp", "copies", "cut", "tp"))
        # Torch's would wait for its own default time, not for the recipe's.
        for group in mesh.get_all_groups():
            _set_pg_timeout(waits, group)
        ranks = mesh.mesh  # [pp, copies, cut, tp]
        sequences = ranks.reshape(-1, cp, tp).transpose(1, 2).flatten(0, 1)
        matrices = ranks.reshape(-1, cut * tp)
        return Meshes(
            layout=layout,
            rank=rank,
            coordinates=layout.coordinates(rank),
            parameters=mesh["copies", "cut"],
            tp=mesh.get_group("tp"),
            cp=_group_of(rank, sequences, "cp", waits) if cp > 1 else None,
            pp=mesh.get_group("pp"),
            ends=_group_of(rank, ranks.flatten(1).T[:, [0, -1]], "ends", waits) if ends_share_a_weight else None,
            matrix=_group_of(rank, matrices, "matrix", waits) if tp > 1 else mesh.get_group("cut"),
        )


def _group_of(rank: int, groups: Tensor, name: str, waits: timedelta) -> dist.ProcessGroup | None:
    """Form a group of each row; this rank's, if it is in one."""
    mine = None
    for ranks in groups.tolist():
        group = dist.new_group(ranks, timeout=waits, group_desc=name)
        if rank in ranks:
            mine = group
    return mine
