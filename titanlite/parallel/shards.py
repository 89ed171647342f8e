"""Which part of each parameter this rank holds, where its gradient comes from, and how cut matrices come together.

A parameter is cut up to three times: by pipeline stage (a rank has it or not), by tensor parallelism (one dimension),
and by FSDP2 (whole leading rows of what is left: ceil(rows / ranks) each, the last ranks fewer or none). Optimizers,
clipping, initialisation and checkpoints see plain tensors, each with its place in the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titanlite.models.shard import Shard
from titanlite.parallel.meshes import Meshes
from titanlite.parallel.tensor import all_gather
from titanlite.plan.layout import ceil_div
from titanlite.plan.slicing import GroupRank, Placement, Slices, local_slices


class Shards:
    """All parameters on this rank, by the names that they have in the whole model."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        meshes: Meshes | None = None,
        placements: Mapping[str, Placement] | None = None,
        tied: frozenset[str] = frozenset(),
    ) -> None:
        """Without `meshes`: a model that is whole on its only rank. `tied`: parameters that both ends of a pipeline
        hold a copy of.
        """
        self._meshes = meshes
        self._placements = dict(placements or {})
        self._parameters = dict(parameters)
        self.table = {name: self._shard(name, parameter, name in tied) for name, parameter in parameters.items()}
        self._tied = [self.table[name].tensor for name in self.table if name in tied]
        tp = meshes.layout.tp if meshes is not None else 1
        self._summed_over_tp = [s.tensor for name, s in self.table.items() if tp > 1 and name not in self._placements]

    @staticmethod
    def of(model: nn.Module) -> Shards:
        """Those of a model that is whole on its only rank."""
        return Shards(dict(model.named_parameters()))

    def _shard(self, name: str, parameter: nn.Parameter, tied: bool) -> Shard:
        if self._meshes is None:
            return Shard.whole(parameter)
        meshes, shape = self._meshes, list(parameter.shape)
        placement = self._placements.get(name)
        copies, copy = meshes.copies.size(), meshes.copies.rank()
        if placement is not None:
            shape[placement.dimension] = placement.size
        else:
            copies, copy = copies * meshes.tp.size(), copy * meshes.tp.size() + meshes.tp.rank()
        if tied:
            copies, copy = 2 * copies, 2 * copy + (meshes.coordinates.pp > 0)
        held = parameter.to_local().detach() if hasattr(parameter, "to_local") else parameter
        offset, size = self._box(name, tuple(shape), meshes.cut.rank(), meshes.tp.rank())
        assert tuple(held.shape) == size, f"{name}: {tuple(held.shape)} is held where {size} was expected"
        return Shard(held, offset, tuple(shape), copies, copy)

    def _box(self, name: str, shape: tuple[int, ...], cut_rank: int, tp_rank: int) -> Slices:
        """What the rank with these coordinates holds of the parameter."""
        assert self._meshes is not None
        tp, cut = GroupRank(tp_rank, self._meshes.tp.size()), GroupRank(cut_rank, self._meshes.cut.size())
        return local_slices(shape, self._placements.get(name), tp, cut)

    def local(self) -> dict[str, Tensor]:
        """Parameter name -> what is held here; after `take_gradients` each carries its gradient in `.grad`."""
        return {name: shard.tensor for name, shard in self.table.items()}

    def shares(self) -> Tensor:
        """For each tensor of `local`, 1 over the ranks that hold the same part; with its norm, it counts once."""
        like = next(iter(self.table.values())).tensor
        return torch.tensor([1 / shard.copies for shard in self.table.values()], dtype=like.dtype, device=like.device)

    def take_gradients(self) -> None:
        """Hand the gradients that the backward pass left on the parameters to the tensors of `local`, summed over the
        ranks that each have a part of the sum.
        """
        for name, parameter in self._parameters.items():
            held = self.table[name].tensor
            if held is not parameter:
                held.grad = parameter.grad.to_local()  # type: ignore[union-attr]
        if self._meshes is not None:
            _sum_together(self._summed_over_tp, self._meshes.tp)
            if self._tied:
                _sum_together(self._tied, self._meshes.ends)

    def drop_gradients(self) -> None:
        """Free all gradients."""
        for name, parameter in self._parameters.items():
            parameter.grad = None
            self.table[name].tensor.grad = None

    def windows(self, held: Mapping[str, Tensor]) -> dict[str, Shard]:
        """Which part of which whole tensor each of `held` is.

        The name of a tensor that is cut is a parameter's, or has it before its last slash, as optimizer state does
        (`norm.weight/average`); tensors of any other name are the same on every rank.
        """
        return {name: self._like(name, tensor) for name, tensor in held.items()}

    def _like(self, name: str, tensor: Tensor) -> Shard:
        shard = self.table.get(name) or self.table.get(name.rpartition("/")[0])
        if shard is not None:
            return shard.of(tensor)
        ranks = self._meshes.layout.size if self._meshes is not None else 1
        rank = self._meshes.rank if self._meshes is not None else 0
        return Shard(tensor, (0,) * tensor.dim(), tuple(tensor.shape), ranks, rank)

    def exchange(self) -> MatrixExchange | None:
        """How cut matrices come together whole, and copies share the work; None where a rank is alone with its part."""
        if self._meshes is None or self._meshes.matrix.size() * self._meshes.copies.size() == 1:
            return None
        cuttings = {name: self._cutting(name) for name in self.table}
        return MatrixExchange(self._meshes.matrix, self._meshes.copies, cuttings)

    def _cutting(self, name: str) -> Cutting:
        assert self._meshes is not None
        shape, tp = self.table[name].shape, self._meshes.tp.size()
        ranks = range(self._meshes.matrix.size())
        return Cutting(shape, tuple(self._box(name, shape, *divmod(rank, tp)) for rank in ranks))


def _sum_together(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sum the gradients of `tensors` over the group, in one message."""
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    pieces = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [piece.view_as(g) for piece, g in zip(pieces, gradients, strict=True)])


@dataclass(frozen=True)
class Cutting:
    """How a matrix is cut: the box of each rank of the matrix group. Equal ones are exchanged together."""

    shape: tuple[int, ...]
    boxes: tuple[Slices, ...]


class MatrixExchange:
    """Cut matrices to whole ones and back, each whole on one rank, the matrices shared out evenly.

    Two all-to-alls a step move what an all-gather would move once, and no rank repeats another's work: of several
    copies each takes a share of the matrices, and gathers what the others made of theirs.
    """

    def __init__(self, group: dist.ProcessGroup, copies: dist.ProcessGroup, cuttings: Mapping[str, Cutting]) -> None:
        """`group`: the ranks that hold parts of one copy; `copies`: those that hold the same parts."""
        self._group = group
        self._copies = copies
        self._cuttings = cuttings

    def cutting(self, name: str) -> Cutting:
        return self._cuttings[name]

    def collect(self, held: Tensor, cutting: Cutting) -> Tensor:
        """[n, rows here, columns here] of n matrices -> [share, rows, columns]: those that are this rank's to work on,
        ceil(ceil(n / copies) / ranks) of them.
        """
        share = ceil_div(len(held), self._copies.size())
        held = held[self._copies.rank() * share :][:share]  # the last copies may have fewer, or none
        count, rows, columns = held.shape
        ranks, height, width = self._padded(cutting)
        share = ceil_div(share, ranks)
        sent = held.new_zeros(ranks * share, height, width)
        sent[:count, :rows, :columns] = held
        received = self._exchanged(sent)
        whole = held.new_empty(share, *cutting.shape)
        for piece, (offset, size) in zip(received.view(ranks, share, height, width), cutting.boxes, strict=True):
            _part(whole, offset, size).copy_(_part(piece, (0, 0), size))
        return whole

    def give_back(self, whole: Tensor, cutting: Cutting, count: int) -> Tensor:
        """The inverse of `collect`: -> [count, rows here, columns here]."""
        ranks, height, width = self._padded(cutting)
        share = whole.shape[0]
        sent = whole.new_zeros(ranks, share, height, width)
        for piece, (offset, size) in zip(sent, cutting.boxes, strict=True):
            _part(piece, (0, 0), size).copy_(_part(whole, offset, size))
        received = self._exchanged(sent)
        rows, columns = cutting.boxes[self._group.rank()][1]
        own = received.view(ranks * share, height, width)[: ceil_div(count, self._copies.size()), :rows, :columns]
        return self._of_all_copies(own)[:count]

    def _exchanged(self, sent: Tensor) -> Tensor:
        """One piece to each rank, and one from each."""
        if self._group.size() == 1:
            return sent
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._group)
        return received

    def _of_all_copies(self, own: Tensor) -> Tensor:
        """[share, rows here, columns here] -> [copies * share, rows here, columns here]."""
        if self._copies.size() == 1:
            return own
        return all_gather(own.contiguous(), self._copies)

    def _padded(self, cutting: Cutting) -> tuple[int, int, int]:
        """Ranks, and the rows and columns of the largest box."""
        sizes = [size for _, size in cutting.boxes]
        return len(sizes), max(rows for rows, _ in sizes), max(columns for _, columns in sizes)


def _part(matrices: Tensor, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """The box of each of [n, rows, columns]."""
    return matrices[:, offset[0] : offset[0] + size[0], offset[1] : offset[1] + size[1]]
