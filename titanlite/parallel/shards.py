"""What this rank holds of each parameter, where its gradient comes from, and how sharded matrices come together.

Optimizers, clipping, initialisation and checkpoints see plain tensors, each with its place in the whole, as
`plan.placement` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titanlite.models.shard import Shard
from titanlite.parallel.collectives import all_gather
from titanlite.parallel.meshes import Meshes
from titanlite.plan.layout import ceil_div
from titanlite.plan.placement import Placement, Slices


class Shards:
    """All parameters on this rank, by the names that they have in the whole model."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        placements: Mapping[str, Placement],
        buffers: Mapping[str, Tensor],
        rank: int = 0,
        meshes: Meshes | None = None,
    ) -> None:
        """`buffers`: those that are saved, the same on all ranks of a stage. No `meshes`: a model that is whole on its
        only rank.
        """
        self._parameters, self._placements, self._meshes, self._rank = dict(parameters), placements, meshes, rank
        self.table = {name: self._shard(name, parameter) for name, parameter in parameters.items()}
        copies = meshes.layout.size // meshes.layout.pp if meshes is not None else 1
        self.buffers = {name: Shard.whole(each, copies, rank % copies) for name, each in buffers.items()}
        like, shares = next(iter(self.table.values())).tensor, [1 / shard.copies for shard in self.table.values()]
        self._shares = torch.tensor(shares, dtype=like.dtype, device=like.device)
        """For each tensor of `local`, 1 over the ranks that hold the same part: in the norm, it counts once."""
        self._summands: list[tuple[list[Tensor], dist.ProcessGroup]] = []
        """Tensors whose gradient is a sum over the ranks of a group."""
        here = {name: placements[name] for name in self.table}
        if meshes is not None and meshes.layout.tp > 1:
            copied = (name for name, each in here.items() if each.mesh.degree("tp") > 1 and not each.cut_over("tp"))
            self._summands.append(([self.table[name].tensor for name in copied], meshes.tp))
        if meshes is not None and meshes.ends is not None:
            shared = (name for name, each in here.items() if len(each.stages) > 1)
            self._summands.append(([self.table[name].tensor for name in shared], meshes.ends))

    def _shard(self, name: str, parameter: nn.Parameter) -> Shard:
        placement = self._placements[name]
        held = parameter
        if self._meshes is not None:
            held = parameter.to_local().detach() if hasattr(parameter, "to_local") else parameter
        offset, size = placement.part(self._rank)
        assert tuple(held.shape) == size, f"{name}: {tuple(held.shape)} is held where {size} was expected"
        return Shard(held, offset, placement.shape, *placement.copies(self._rank))

    def local(self) -> dict[str, Tensor]:
        """Parameter name -> what is held here; after `take_gradients` each carries its gradient in `.grad`."""
        return {name: shard.tensor for name, shard in self.table.items()}

    def take_gradients(self) -> None:
        """Hand the parameters' gradients to the tensors of `local`, summed over ranks that have parts of the sum."""
        for name, parameter in self._parameters.items():
            held = self.table[name].tensor
            if held is not parameter:
                held.grad = parameter.grad.to_local()  # type: ignore[union-attr]
        for tensors, group in self._summands:
            _all_reduce_gradients(tensors, group)

    @torch.no_grad()
    def clip_gradients(self, clip_norm: float) -> Tensor:
        """Scale all gradients by min(1, clip_norm / norm), or not at all for 0; the norm before that, on the device.

        A scalar in at least float32, the same bits on every rank: were it formed within each copy of the model, copies
        could drift apart. One that is not finite scales nothing into sense: `resilience.guards` judges the step.
        """
        gradients = [shard.tensor.grad for shard in self.table.values()]
        total = torch.stack(torch._foreach_norm(gradients)).square() @ self._shares  # type: ignore[arg-type]
        if self._meshes is not None:
            dist.all_reduce(total)
        norm = total.sqrt()
        if clip_norm > 0:
            torch._foreach_mul_(gradients, (clip_norm / (norm + 1e-6)).clamp(max=1.0))  # type: ignore[arg-type]
        return norm

    def drop_gradients(self) -> None:
        """Free all gradients."""
        for name, parameter in self._parameters.items():
            parameter.grad = None
            self.table[name].tensor.grad = None

    def shards_of(self, held: Mapping[str, Tensor]) -> dict[str, Shard]:
        """Which part of which whole tensor each of `held` is.

        The name of a tensor that is sharded is a parameter's, or has it before its last slash, as optimizer state does
        (`norm.weight/average`); tensors of any other name are the same on every rank.
        """
        ranks = self._meshes.layout.size if self._meshes is not None else 1
        found = {}
        for name, tensor in held.items():
            like = self.table.get(name) or self.table.get(name.rpartition("/")[0])
            found[name] = Shard.whole(tensor, ranks, self._rank) if like is None else like.of(tensor)
        return found

    def exchange(self) -> MatrixExchange | None:
        """How sharded matrices come together and replicas divide the work; None where a rank is alone with its part."""
        if self._meshes is None or self._meshes.matrix.size() * self._meshes.dp_replicate.size() == 1:
            return None
        ranks = dist.get_process_group_ranks(self._meshes.matrix)
        cuts = {
            name: MatrixCut(shard.shape, tuple(map(self._placements[name].part, ranks)))
            for name, shard in self.table.items()
        }
        return MatrixExchange(self._meshes.matrix, self._meshes.dp_replicate, cuts)


def _all_reduce_gradients(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sum the gradients of `tensors` over the group, in one message."""
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


class MatrixCut(NamedTuple):
    """What each rank of the matrix group holds of a matrix. Equal ones are exchanged together."""

    shape: tuple[int, ...]
    slices: tuple[Slices, ...]


@dataclass(frozen=True)
class MatrixExchange:
    """Sharded matrices to whole ones and back, each whole on one rank, the matrices divided evenly.

    Two all-to-alls a step move what an all-gather would move once, and no rank repeats another's work: each replica
    takes a part of the matrices, and gathers what the others made of theirs.
    """

    group: dist.ProcessGroup  # the ranks that hold parts of one replica
    replicas: dist.ProcessGroup  # those that hold the same parts
    cuts: Mapping[str, MatrixCut]

    def apply(self, function: Callable[[Tensor], Tensor], held: Tensor, cut: MatrixCut) -> Tensor:
        """`function` of n whole matrices [share of n, rows, columns], from and to [n, rows here, columns here]; the
        share of this rank is ceil(ceil(n / replicas) / ranks).
        """
        ranks, of_replica = self.group.size(), ceil_div(len(held), self.replicas.size())
        own = held[self.replicas.rank() * of_replica :][:of_replica]  # the last replicas may have fewer, or none
        count, rows, columns = own.shape
        share = ceil_div(of_replica, ranks)
        largest = (max(sizes) for sizes in zip(*(size for _, size in cut.slices), strict=True))
        parts = held.new_zeros(ranks, share, *largest)
        parts.flatten(0, 1)[:count, :rows, :columns] = own
        whole = held.new_empty(share, *cut.shape)
        for part, (offset, size) in zip(self._all_to_all(parts), cut.slices, strict=True):
            _slice(whole, offset, size).copy_(_slice(part, (0, 0), size))
        whole = function(whole)
        for part, (offset, size) in zip(parts, cut.slices, strict=True):
            _slice(part, (0, 0), size).copy_(_slice(whole, offset, size))
        own = self._all_to_all(parts).flatten(0, 1)[:of_replica, :rows, :columns]
        return all_gather(own.contiguous(), self.replicas)[: len(held)] if self.replicas.size() > 1 else own

    def _all_to_all(self, sent: Tensor) -> Tensor:
        """An equal part of [ranks, …] to each rank, and one from each."""
        if self.group.size() == 1:
            return sent
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        return received


def _slice(matrices: Tensor, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """These rows and columns of each of [n, rows, columns]."""
    return matrices[:, offset[0] : offset[0] + size[0], offset[1] : offset[1] + size[1]]
